"""Our cells beside those of other tools on the same model and tokens: `make bench-peers`.

    python tests/benchmarks/peers/compare.py [--repeats 3] [--peers llm_compressor] [--environments .peers]

Each peer gets an environment of its own below --environments, with the versions of PEERS (made once, a few minutes), and runs in
processes of its own, in turn with ours. Every figure is the median of CPU seconds of one thread from the model's files to the
files of the result, without imports; the ratio is the peer's time over ours. Peers that cannot be installed or that fail are listed
with their last line of output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_memory import write_model

HERE = Path(__file__).parent
PEERS = {"llm_compressor": ("torch==2.13.0", "llmcompressor==0.14.0.1")}
EIGHT = "2g64,3g64,4g64,8g64,2g128,3g128,4g128,8g128"
WORKS = (  # hidden size of 4 blocks, tokens of 32 windows, method
    (256, 256, "gptq"),
    (512, 512, "gptq"),
    (512, 512, "rtn"),
)


class PeerError(Exception):
    """A peer that cannot be installed, or a process that failed."""


def environment(name: str, folder: Path) -> Path:
    """The peer's Python. Raises PeerError when its packages cannot be installed."""
    python = folder / name / "bin" / "python"
    done = folder / name / ".installed"
    if done.exists() and done.read_text().split() == list(PEERS[name]):
        return python
    print(f"making {folder / name}: {', '.join(PEERS[name])}", flush=True)
    run([sys.executable, "-m", "venv", str(folder / name)])
    run([str(python), "-m", "pip", "install", "--quiet", *PEERS[name]])
    done.write_text("\n".join(PEERS[name]))
    return python


def run(command: list[str], **environ: str) -> str:
    """What a command printed. Raises PeerError with its last line where it fails."""
    result = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise PeerError(lines[-1] if lines else f"exit status {result.returncode}")
    return result.stdout


def seconds(python: Path, script: str, folder: Path, method: str, *more: str) -> float:
    """CPU seconds of one run of a script of this folder."""
    with tempfile.TemporaryDirectory() as scratch:
        output = run(
            [
                str(python),
                str(HERE / f"{script}.py"),
                str(folder / "model"),
                str(folder / "tokens.safetensors"),
                f"{scratch}/out",
                method,
                *more,
            ],
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            CUDA_VISIBLE_DEVICES="",
        )
    return float(json.loads(output.splitlines()[-1])["cpu"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    given = parser.parse_args()
    ours = Path(sys.executable)
    print("model            work              peer                       theirs    ours   ratio")
    for name in given.peers.split(","):
        try:
            python = environment(name, given.environments.resolve())
        except PeerError as error:
            print(f"{name}: cannot be installed: {error}")
            continue
        for hidden, length, method in WORKS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                size = write_model(folder / "model", 4, hidden) / 4e6
                tokens = torch.randint(
                    0, 256, (32, length), generator=torch.Generator().manual_seed(0)
                )
                save_file({"tokens": tokens}, folder / "tokens.safetensors")
                works = [("w4g128", 1, ())] + ([("8 schemes", 8, (EIGHT,))] * (method == "gptq"))
                try:
                    pairs = {
                        title: (
                            [
                                (
                                    seconds(python, name, folder, method),
                                    seconds(ours, "ours", folder, method, *more),
                                )
                                for _ in range(given.repeats)
                            ],
                            count,
                        )
                        for title, count, more in works
                    }
                except PeerError as error:
                    print(f"{size:5.1f} M   {method}: failed: {error}", flush=True)
                    continue
            for title, (found, count) in pairs.items():
                theirs = count * statistics.median(pair[0] for pair in found)
                mine = statistics.median(pair[1] for pair in found)
                print(
                    f"{size:5.1f} M parameters {method:5}{title:12} {PEERS[name][-1]:26} "
                    f"{theirs:6.2f}  {mine:6.2f}  {theirs / mine:5.2f}×",
                    flush=True,
                )


if __name__ == "__main__":
    main()
