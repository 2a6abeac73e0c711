"""A model larger than the memory that a process may take is quantized, block by block, from sharded files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from bench_memory import write_model

BLOCKS, HIDDEN = 24, 512  # 308 MB of weights
# RLIMIT_DATA counts what a process allocates, and not files that it maps: the limit is set above what imports took.
CHILD = """
import json, os, resource, sys
from pathlib import Path
import torch, transformers
from harness.core import plugins
from harness.core.cell import Cell, Method, Model, Part, Scheme, WeightScheme, quantize_key
from harness.core.events import Failed
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.pipeline.passes import run_pass
from transformers import AutoModelForCausalLM, LlamaForCausalLM
folder, store, allowed, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
plugins.load("rounding", "rtn")
torch.set_num_threads(1)
torch.eye(64) @ torch.eye(64)
taken = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (taken + allowed, taken + allowed))
held = []
try:
    while len(held) < size // 2**22:
        held.append(torch.ones(2**20))
except RuntimeError:
    fits = False
else:
    fits = True
del held
scheme = Scheme("w", WeightScheme(group_size=128))
cell = Cell(Model("large", str(folder), digest="large"), Method("rtn", rounding=Part("rtn")), scheme)
writers = {quantize_key(cell): CheckpointWriter(store, {})}
failed = [event.reason for event in run_pass([cell], folder, None, writers) if isinstance(event, Failed)]
print(json.dumps({"whole_fits": fits, "failed": failed, "done": (store / "manifest.json").exists()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are Linux's")
def test_a_model_larger_than_the_memory_limit_is_quantized(tmp_path: Path) -> None:
    size = write_model(tmp_path / "model", BLOCKS, HIDDEN)
    allowed = size // 3
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == BLOCKS + 1

    command = [
        sys.executable,
        "-c",
        CHILD,
        f"{tmp_path}/model",
        f"{tmp_path}/store",
        str(allowed),
        str(size),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    # the limit is real: the model's bytes do not fit
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "whole_fits": False,
        "failed": [],
        "done": True,
    }
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["blocks"] == BLOCKS and manifest["coverage"]["linears"] == 7 * BLOCKS
