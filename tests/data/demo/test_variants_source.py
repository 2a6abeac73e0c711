"""Planted variants are model sources like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.cell import Model
from harness.core.errors import ModelError
from harness.data.model_folders import model_digest, model_folder


def test_a_variant_is_a_source_with_its_own_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    folder = model_folder(Model("demo", "demo:weight_outliers"))
    assert folder.parent == tmp_path and (folder / "model.safetensors").is_file()
    digests = {
        model_digest(source, None)
        for source in ("demo", "demo:weight_outliers", "demo:activation_outliers")
    }
    assert len(digests) == 3


def test_an_unknown_variant_lists_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="activation_outliers"):
        model_folder(Model("demo", "demo:outliers"))
