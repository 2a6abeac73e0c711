"""`python -m harness`, and the entry point of the command `harness`."""

from __future__ import annotations

import os
import sys

from harness.cli.commands import app
from harness.core.errors import HarnessError


def main() -> None:
    """Run the command line; errors for the user are printed without a traceback unless HARNESS_DEBUG=1."""
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


if __name__ == "__main__":
    main()
