"""The hub's own clients against a hub on the loopback interface: a sweep run with network and from its bundle is one sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback_hub import LoopbackHub, serving

ROOT = Path(__file__).parents[2]
PINS = yaml.safe_load((ROOT / "conf" / "data_sets.yaml").read_text())
MODEL_COMMIT, TEXT_COMMIT = (
    "0123456789abcdef0123456789abcdef01234567",
    "89abcdef0123456789abcdef0123456789abcdef",
)
SWEEP = """
model: someone/tiny
calibration: own
grids: [{method: gptq, scheme: w4g32}]
evaluations: [{own_text: {length: 32}}, {piqa: {scorer: lm_eval}}]
"""
OWN_TEXT = "source: hub:someone/text/short\nsplit: {split}\n"
CARD = """---
configs:
- config_name: short
  data_files: [{split: train, path: short/train.jsonl}, {split: test, path: short/test.jsonl}]
---
"""
PULL = "from harness.data import bundle\nprint(*bundle.pull(sweep, Path(sys.argv[3])), sep='\\n')\n"
RUN = """
import json, sys
from pathlib import Path
import harness
from harness.config.grid import load_sweep
from harness.core.cell import cell_key, score_key
sweep = load_sweep(sys.argv[1], sys.argv[4:])
PULL
harness.run(sys.argv[1], *sys.argv[4:])
scores = {}
for cell in sweep.cells:
    for evaluation in cell.evaluations:
        path = Path(sys.argv[2]) / "cells" / cell_key(cell) / "scores" / f"{score_key(cell, evaluation)}.json"
        scores[str(path.relative_to(sys.argv[2]))] = json.loads(path.read_text())["metrics"]
Path(sys.argv[2], "scores.json").write_text(json.dumps(scores))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    text, piqa = tmp_path / "origin" / "text", tmp_path / "origin" / "piqa"
    (text / "short").mkdir(parents=True)
    piqa.mkdir()
    (text / "README.md").write_text(CARD)
    for split in ("train", "test"):
        rows = [
            {"text": f"The {split} of row {number}: a cat sat on mat {number * 7}, and slept."}
            for number in range(60)
        ]
        (text / "short" / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    items = [
        {"goal": f"to sit {n}", "sol1": "take a chair", "sol2": "take the fish", "label": n % 2}
        for n in range(8)
    ]
    for split in ("train", "validation"):
        (piqa / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    repositories = {
        "models/someone/tiny": (ROOT / "harness" / "data" / "demo" / "model", MODEL_COMMIT),
        "models/someone/gated": (ROOT / "harness" / "data" / "demo" / "model", MODEL_COMMIT),
        "datasets/someone/text": (text, TEXT_COMMIT),
        "datasets/baber/piqa": (piqa, PINS["baber/piqa"]),
    }
    with serving(LoopbackHub(repositories, gated={"models/someone/gated"})) as served:
        yield served


def python(
    code: str, *arguments: str, folder: Path, home: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A process with an empty cache of its own; the hub's clients read their environment when they are imported."""
    own = {
        "HF_HOME": str(folder / home),
        "HARNESS_CACHE": str(folder / home / "cache"),
        **environment,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**kept, **own},
        capture_output=True,
        text=True,
    )


def write_sweep(folder: Path) -> Path:
    for group, split, rest in (
        ("calibration", "train", "samples: 2\nlength: 16\n"),
        ("evaluation", "test", ""),
    ):
        (folder / "conf" / group).mkdir(parents=True)
        text = OWN_TEXT.format(split=split)
        if group == "evaluation":
            text = (
                "evaluator: perplexity\nsettings: {source: 'hub:someone/text/short', split: test}\n"
            )
        (
            folder / "conf" / group / f"own{'_text' if group == 'evaluation' else ''}.yaml"
        ).write_text(text + rest)
    (folder / "small.yaml").write_text(SWEEP)
    return folder / "small.yaml"


def test_a_run_from_a_bundle_is_the_run_with_network(hub: LoopbackHub, tmp_path: Path) -> None:
    sweep, common = (
        write_sweep(tmp_path),
        ["tracking=none", "device=cpu", "cluster=local", "cluster.workers=1"],
    )

    def run(
        pull: str, runs: str, *overrides: str, **environment: str
    ) -> tuple[str, dict[str, Any]]:
        arguments = [
            str(sweep),
            str(tmp_path / runs),
            str(tmp_path / "bundle"),
            *common,
            f"runs={tmp_path / runs}",
            *overrides,
        ]
        ran = python(
            RUN.replace("PULL", pull),
            *arguments,
            folder=tmp_path,
            home=f"home_{runs}",
            **environment,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout, json.loads((tmp_path / runs / "scores.json").read_text())

    said, online = run(PULL, "online", HF_ENDPOINT=hub.address)
    assert (
        f"model someone/tiny@{MODEL_COMMIT[:12]}" in said
        and f"text hub:someone/text/short@{TEXT_COMMIT} train: 60 rows" in said
    )
    known = json.loads((tmp_path / "home_online" / "cache" / "commits.json").read_text())
    assert known == {
        "model someone/tiny@main": MODEL_COMMIT,
        "dataset someone/text@main": TEXT_COMMIT,
    }, "baber/piqa is pinned"
    asked = len(hub.asked)
    _, offline = run(
        "",
        "offline",
        f"data.root={tmp_path / 'bundle'}",
        HF_HUB_OFFLINE="1",
        HF_ENDPOINT=hub.address,
    )
    assert offline == online and len(online) == 4 and len(hub.asked) == asked


def test_what_the_hub_refuses_is_said(hub: LoopbackHub, tmp_path: Path) -> None:
    code = (
        "from harness.data import hub, model_folders\n"
        "from harness.core.cell import Model\nfrom harness.core.errors import ModelError\n"
        "for name in ('someone/gated', 'someone/absent'):\n"
        "    try:\n        model_folders.model_folder(Model('m', name, digest=model_folders.model_digest(name)))\n"
        "    except ModelError as error:\n        print(error)\n"
        "print(hub.missing_data_set('someone/absent', None))\n"
    )
    ran = python(code, folder=tmp_path, home="home", HF_ENDPOINT=hub.address)
    gated, absent, data = ran.stdout.strip().splitlines()
    assert "the hub answered 403" in gated and "accept its licence and set HF_TOKEN" in gated
    assert "the hub answered 404: misspelt" in absent
    assert (
        "the commit of the data set someone/absent is not known" in data
        or "not in the local cache" in data
    )
