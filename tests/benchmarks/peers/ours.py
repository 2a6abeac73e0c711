"""Cells by this project, from files to files: `python ours.py MODEL TOKENS OUTPUT METHOD [SCHEMES]`; prints JSON.

METHOD is gptq or rtn; SCHEMES, "4g128" unless given, is a list such as "2g64,3g64,4g128" that one pass makes. Imports are not
timed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from small import GPTQ, RTN, cell, failures, quantize


def main() -> None:
    folder, tokens, output, method, *schemes = sys.argv[1:]
    torch.set_num_threads(1)
    cpu, wall = time.process_time(), time.monotonic()
    windows = load_file(tokens)["tokens"]
    named = [each.split("g") for each in (schemes[0] if schemes else "4g128").split(",")]
    cells = [
        cell(Path(folder), GPTQ if method == "gptq" else RTN, int(bits), int(group))
        for bits, group in named
    ]
    failed = failures(quantize(cells, Path(folder), Path(output), windows))
    assert not failed, failed
    print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}))


if __name__ == "__main__":
    main()
