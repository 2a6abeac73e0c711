"""`python -m harness`, and the entry point of the command `harness`."""

from __future__ import annotations

import errno
import os
import sys

from harness.cli import terminal
from harness.cli.commands import app
from harness.core.errors import HarnessError

REMEDIES = {  # of what the system refuses, by its number
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path, or make it",
    errno.ENOTDIR: "a part of the path is a file; check it",
    errno.EISDIR: "it is a folder, and a file is expected",
    errno.EACCES: "ask for the right to read and write it, or choose another place",
    errno.EPERM: "ask for the right to read and write it, or choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.ENOSPC: "the disk is full; free space, or choose another place",
    errno.EDQUOT: "the quota of the disk is used up; free space, or choose another place",
    errno.EMFILE: "too many files are open; raise the limit (`ulimit -n`)",
    errno.ENFILE: "too many files are open on this machine",
}


def main() -> None:
    """Run the command line: errors meant for the user are printed without a traceback, unless HARNESS_DEBUG=1.

    So is what the system refuses of a named file. Any other exception is a defect of the harness and keeps its traceback.
    """
    terminal.make_encodable()
    try:
        app(standalone_mode=True)
    except HarnessError as error:
        if os.environ.get("HARNESS_DEBUG") == "1":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the finished work", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `harness table … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if os.environ.get("HARNESS_DEBUG") == "1" or error.filename is None:
            raise
        print(f"{type(error).__name__}: {refusal(error)}", file=sys.stderr)
        raise SystemExit(HarnessError.exit_code) from None


def refusal(error: OSError) -> str:
    """What the system refused, of which file, and what to do, in one sentence."""
    name = (
        os.fsdecode(error.filename)
        if isinstance(error.filename, str | bytes)
        else str(error.filename)
    )
    said = (error.strerror or "refused").lower()
    return f"{said}: {name}; {REMEDIES.get(error.errno or 0, 'check the path')}"


if __name__ == "__main__":
    main()
