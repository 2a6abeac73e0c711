"""Fixtures that every test may use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # no test may reach out, wherever it runs
    os.environ.setdefault(switch, "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# files are tested side by side, and their models are tiny
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(autouse=True)
def no_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a test takes must not decide which events it sees: no task reads what its process takes."""
    monkeypatch.setattr("harness.execution.process.USAGE_SECONDS", math.inf)


@pytest.fixture
def shared() -> Path:
    """The folder of real benchmark subsets and small trained models beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture
def demo_sweep(tmp_path: Path) -> Callable[..., Any]:
    """demo_sweep("method=rtn", "scheme=w4", …) -> a Sweep of the embedded model in this process, results in tmp_path/runs."""

    def make(*overrides: str) -> Any:
        from harness.config.grid import load_sweep

        own = ["model=demo", f"runs={tmp_path / 'runs'}", "tracking=none", "device=cpu"]
        if any("gptq" in override or "awq" in override for override in overrides):
            own += ["calibration=demo", "calibration.samples=4", "calibration.length=64"]
        if not any(override.startswith("cluster") for override in overrides):
            own += ["cluster=local", "cluster.workers=1"]
        return load_sweep(None, [*own, *overrides])

    return make


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """tiny_model("llama", num_hidden_layers=2) -> a folder with config, safetensors and a byte tokenizer of 259 tokens.

    Random weights from a fixed seed, with input channels of unequal size and non-zero biases, so that methods have work to do.
    `dtype` ("float32") is the stored type, `shards` (1) the number of weight files; everything else goes to the model's config.
    """

    def make(family: str = "llama", **settings: Any) -> Path:
        from harness.data.demo.tiny import build

        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        build(family, folder, **settings)
        return folder

    return make
