"""Our scores against lm-eval's own command line, as its users run it: one model, one benchmark whole, to the last item."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from subjects import last, stories

from harness.core.cell import Evaluation
from harness.data import task_files
from harness.evaluation.evaluators.lm_eval_tasks import Evaluator

TASK = "winogrande"


def test_every_item_is_that_of_lm_evals_command(shared: Path, tmp_path: Path) -> None:
    (file,) = task_files.members(TASK)
    local = task_files.local_data(file, shared / "data")
    assert local is not None
    config = {
        "include": str(file.path),
        "task": f"{TASK}_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in local.splits.items()}
        },
        **{key: None for key in task_files.SPLITS if str(file.config.get(key)) not in local.splits},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(config))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--tasks",
        f"{TASK}_local",
        "--batch_size",
        "16",
        "--device",
        "cpu",
        "--model_args",
        f"pretrained={shared / 'models' / 'stories260K'},dtype=float32",
        "--include_path",
        str(tmp_path / "tasks"),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "DISABLE_MULTIPROC": "1",
    }
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    theirs = {
        sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())
    }

    evaluator = Evaluator(Evaluator.Settings(task=TASK, data_root=str(shared / "data")))
    ours = last(evaluator.score(stories(shared), Evaluation("w", "lm")))
    assert (
        ours.details["scorer"] == "shared_prefix"
        and "smoke" not in ours.details
        and ours.items is not None
    )
    assert (
        ours.metrics["w/acc"]
        == json.loads(results.read_text())["results"][f"{TASK}_local"]["acc,none"]
    )
    assert ours.items["doc_id"] == sorted(theirs) and len(theirs) == len(local.rows("validation"))
    for doc, right, likelihoods in zip(
        ours.items["doc_id"], ours.items["acc"], ours.items["log_likelihoods"], strict=True
    ):
        assert right == float(theirs[doc]["acc"])
        assert likelihoods == pytest.approx(
            [float(response[0][0]) for response in theirs[doc]["resps"]], abs=2e-3, rel=1e-5
        )
