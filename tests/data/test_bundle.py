"""Bundles: pulled from a stand-in for the hub, then a sweep planned and read from them with the hub switched off."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.cli.commands import app
from harness.config import grid
from harness.core.errors import ConfigError, DataError
from harness.core.package import PACKAGE
from harness.data import bundle, model_folders, task_files
from harness.data import texts as sources
from harness.data.bundle import Bundle, pull, verify

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/tiny"
WIKITEXT = "hub:Salesforce/wikitext/wikitext-2-raw-v1@b08601e04326c79dfdd32d625aee71d232d685c3"  # as conf/data_sets.yaml pins it
SWEEP = f"""
model: {MODEL}
calibration: wikitext2
calibration.samples: 2
calibration.length: 16
grids: [{{method: gptq, scheme: w4g32}}]
evaluations:
  - wikitext2: {{length: 32}}
  - ptb: {{length: 32}}
  - piqa
"""


class StandIn:
    """Gives the demo model and made-up rows under the names that are asked for; counts what it gave."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def commit(self, repository: str, kind: str, revision: str) -> str:
        return COMMIT

    def model(self, repository: str, commit: str) -> Path:
        self.asked.append(repository)
        return PACKAGE / "data" / "demo" / "model"

    def texts(self, source: str, split: str) -> Iterable[str]:
        self.asked.append(f"{source} {split}")
        return [f"row {n} of {split}: the cat sat on the mat" for n in range(40)]

    def rows(
        self, repository: str, name: str | None, split: str, commit: str
    ) -> Iterable[dict[str, Any]]:
        self.asked.append(f"{repository} {split}")
        return [{"goal": "to sit", "sol1": "take a chair", "sol2": "take a fish", "label": 0}]


@pytest.fixture
def sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no_cache"))
    path = tmp_path / "tiny_sweep.yaml"
    path.write_text(SWEEP)
    return str(path)


def test_a_sweep_runs_from_its_bundle_without_the_hub(sweep_file: str, tmp_path: Path) -> None:
    hub, folder = StandIn(), tmp_path / "bundle"
    lines = list(pull(grid.load_sweep(sweep_file), folder, hub))
    assert any(line.startswith(f"model {MODEL}@0123") for line in lines)
    assert f"{WIKITEXT} train" in hub.asked  # pinned, and calibration's own split
    assert verify(folder) == []

    sweep = grid.load_sweep(sweep_file, [f"data.root={folder}", f"runs={tmp_path / 'runs'}"])
    cell = sweep.cells[-1]
    assert (
        cell.model.digest == COMMIT
        and model_folders.model_folder(cell.model) == folder / "models" / "someone--tiny"
    )
    assert cell.calibration is not None
    assert sources.read_corpus(cell.calibration.source, cell.calibration.split)[0].startswith(
        "row 0 of train"
    )
    by_name = {evaluation.name: dict(evaluation.settings) for evaluation in cell.evaluations}
    assert sources.read_corpus(by_name["wikitext2"]["source"], by_name["wikitext2"]["split"])[
        0
    ].startswith("row 0 of test")
    (task,) = task_files.members("piqa")
    local = task_files.local_data(task, by_name["piqa"]["data_root"])
    assert local is not None and local.rows("validation")[0]["sol2"] == "take a fish"


def test_a_model_of_another_commit_is_no_substitute(sweep_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    list(pull(grid.load_sweep(sweep_file), folder, StandIn()))
    assert (folder / "models" / "someone--tiny" / "generation_config.json").is_file(), (
        "what ends a generated text comes too"
    )
    for revision in (COMMIT, "main"):
        grid.load_sweep(sweep_file, [f"data.root={folder}", f"model.revision={revision}"])
    with pytest.raises(ConfigError, match=f"has commit {COMMIT}"):
        grid.load_sweep(sweep_file, [f"data.root={folder}", f"model.revision={'f' * 40}"])


def test_what_is_here_is_not_fetched_again(sweep_file: str, tmp_path: Path) -> None:
    sweep, folder = grid.load_sweep(sweep_file), tmp_path / "bundle"
    list(pull(sweep, folder, StandIn()))
    again = StandIn()
    assert (
        all(line.endswith("here already") for line in pull(sweep, folder, again))
        and again.asked == []
    )


def test_the_same_rows_give_the_same_bytes(sweep_file: str, tmp_path: Path) -> None:
    sweep = grid.load_sweep(sweep_file)
    for name in ("a", "b"):
        list(pull(sweep, tmp_path / name, StandIn()))
    first, second = Bundle.open(tmp_path / "a"), Bundle.open(tmp_path / "b")
    assert first is not None and second is not None and first.files == second.files
    (hashes,) = (tmp_path / "a/tasks/piqa").glob("validation.jsonl.rows")
    assert len(hashes.read_text().split()) == 1 and len(hashes.read_text().strip()) == 64


def test_damage_is_found(sweep_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    list(pull(grid.load_sweep(sweep_file), folder, StandIn()))
    (folder / "tasks/piqa/validation.jsonl").write_text("{}\n")
    shutil.rmtree(folder / "models")
    problems = "\n".join(verify(folder))
    assert "task piqa validation" in problems and "config.json is missing" in problems
    result = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert result.exit_code == 1 and "is not what was pulled" in result.output


def test_a_bundle_of_another_sweep_says_what_it_lacks(sweep_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    list(pull(grid.load_sweep(sweep_file), folder, StandIn()))
    with pytest.raises(ConfigError, match="has no text hub:allenai/c4"):
        grid.load_sweep(sweep_file, [f"data.root={folder}", "+evaluations=c4"])


def test_a_pull_that_breaks_off_keeps_what_it_has(sweep_file: str, tmp_path: Path) -> None:
    class Broken(StandIn):
        def texts(self, source: str, split: str) -> Iterable[str]:
            raise DataError("the hub did not give it")

    sweep, folder = grid.load_sweep(sweep_file), tmp_path / "bundle"
    with pytest.raises(DataError):
        list(pull(sweep, folder, Broken()))
    hub = StandIn()
    list(pull(sweep, folder, hub))
    assert MODEL not in hub.asked and verify(folder) == []


def test_the_command(sweep_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PublicHub", StandIn)
    folder = tmp_path / "bundle"
    result = CliRunner().invoke(app, ["data", "pull", sweep_file, "--output", str(folder)])
    assert result.exit_code == 0, result.output
    assert f"data.root={folder}" in result.output and (folder / "bundle.json").is_file()
    assert CliRunner().invoke(app, ["data", "check", str(folder)]).exit_code == 0


def test_the_base_of_a_fine_tune_is_pulled_too() -> None:
    from harness.config.grid import load_sweep
    from harness.data.bundle import _models

    sweep = load_sweep(None, ["model=wizardmath_7b", "method=rtn", "scheme=w4", "evaluations=[]"])
    assert [source for source, _ in _models(sweep)] == [
        "meta-llama/Llama-2-7b-hf",
        "WizardLMTeam/WizardMath-7B-V1.0",
    ]


def test_a_plain_folder_is_no_bundle(tmp_path: Path) -> None:
    assert Bundle.open(tmp_path) is None
    with pytest.raises(DataError, match="not a bundle"):
        verify(tmp_path)
