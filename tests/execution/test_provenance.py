"""Provenance is plain data, and complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.execution import provenance
from harness.storage.store import Store


def test_provenance_is_plain_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "changes", lambda: "- a line\n+ another")
    facts = provenance.collect("cpu", 2, "harness run x", Store(tmp_path))
    assert (tmp_path / facts["changes"]).read_text() == "- a line\n+ another\n"
    installed = (tmp_path / facts["packages"]).read_text().splitlines()
    assert any(line.startswith("torch==") for line in installed) and all(
        "==" in line for line in installed
    )
    assert (
        provenance.collect("cpu", 2, "harness run x", Store(tmp_path))["packages"]
        == facts["packages"]
    )  # kept once
    assert len(list((tmp_path / "provenance").iterdir())) == 2
    assert json.loads(json.dumps(facts)) == facts
    assert (
        facts["threads"] == 2
        and facts["versions"]["torch"]
        and facts["host"]
        and facts["python"].startswith("3.")
    )
