"""Sweeps kept between processes: equal to those that are read, and read again after any change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config import grid, kept_sweeps
from harness.config.locations import config_files
from harness.core.cell import cell_key, score_key
from harness.core.errors import HarnessError
from harness.core.sweep import Sweep
from harness.data import kept
from harness.data.kept import Stamp


@pytest.mark.parametrize("name", ["demo", "llama3_8b_ptq"])
def test_unpacking_gives_the_sweep_that_was_packed(name: str) -> None:
    assert name in config_files("sweeps")
    try:
        sweep = grid.load_sweep(name)
    except HarnessError as error:
        pytest.skip(f"cannot be read here: {error}")
    content = json.loads(json.dumps(kept_sweeps.packed(sweep)))
    again = kept_sweeps.unpacked(content)
    assert again == sweep and kept_sweeps.packed(again) == kept_sweeps.packed(sweep)
    for ours, theirs in zip(again.cells, sweep.cells, strict=True):
        assert (cell_key(ours), ours.title, ours.evaluations) == (
            cell_key(theirs),
            theirs.title,
            theirs.evaluations,
        )
        assert [score_key(ours, e) for e in ours.evaluations] == [
            score_key(theirs, e) for e in theirs.evaluations
        ]


def test_a_kept_sweep_is_read_again_when_its_file_its_text_or_an_override_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "SETTLED_SECONDS", -1.0)  # every stamp counts as settled
    monkeypatch.setattr(kept, "code_stamp", lambda: Stamp("code", 0.0))
    reads: list[str] = []
    read = grid.load_sweep

    def counted(name: str | None, overrides: tuple[str, ...]) -> Sweep:
        reads.append(str(name))
        return read(name, overrides)

    monkeypatch.setattr(grid, "load_sweep", counted)
    text, file = tmp_path / "text.txt", tmp_path / "mine.yaml"
    text.write_text("words " * 200)
    file.write_text("# Mine\nmodel: demo\nmethod: gptq\nscheme: w4\ncalibration: text.txt\n")

    def load(*overrides: str) -> Sweep:
        return kept_sweeps.load_sweep(str(file), overrides)

    first = load()
    assert load() == first and len(reads) == 1
    assert load("scheme=w3").cells != first.cells and len(reads) == 2
    text.write_text("other " * 200)
    os.utime(text, (1, 1))
    changed = load()
    assert len(reads) == 3 and cell_key(changed.cells[-1]) != cell_key(first.cells[-1])
    file.write_text(file.read_text().replace("w4", "w8"))
    assert load().cells[-1].scheme.name == "w8" and len(reads) == 4


def test_what_is_wrong_is_said_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(HarnessError, match="gptq"):
            kept_sweeps.load_sweep(None, ["model=demo", "method=gtpq", "scheme=w4"])
    assert not (tmp_path / "cache" / "answers").exists()


def test_the_environment_in_a_yaml_is_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_sweep: Callable[..., Sweep]
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("WIDTH", "w4")
    file = tmp_path / "mine.yaml"
    file.write_text("model: demo\nmethod: rtn\nscheme: ${oc.env:WIDTH}\n")
    assert kept_sweeps.load_sweep(str(file)).cells[-1].scheme.name == "w4"
    monkeypatch.setenv("WIDTH", "w3")
    assert kept_sweeps.load_sweep(str(file)).cells[-1].scheme.name == "w3"
