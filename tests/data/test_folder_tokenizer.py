"""Whether a model folder has a tokenizer is seen without loading one."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.data.folder_check import _tokenizer


@pytest.mark.parametrize(
    ("files", "facts"),
    [
        ({}, ("no tokenizer", "tokenizer.json")),
        ({"tokenizer_config.json": "{}"}, ("no tokenizer",)),
        (
            {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"},
            ("Git LFS", "lfs pull"),
        ),
        ({"tokenizer.json": '{"model": '}, ("tokenizer.json", "JSON")),
        ({"tokenizer.json": "[1]"}, ("tokenizer.json", "object")),
        ({"tokenizer.json": "{}"}, ()),
        ({"vocab.json": "{}", "merges.txt": ""}, ()),
        ({"qwen.tiktoken": ""}, ()),
        ({"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'}, ()),
    ],
)
def test_what_the_files_show(tmp_path: Path, files: dict[str, str], facts: tuple[str, ...]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    _, faults = _tokenizer(tmp_path)
    assert bool(faults) == bool(facts)
    assert all(fact in str(faults) for fact in facts)


def test_a_model_without_tokenizer_is_refused_in_the_plan(tmp_path: Path) -> None:
    import shutil

    from harness.config.grid import load_sweep
    from harness.core.cell import Model
    from harness.data import model_folders
    from harness.planning.planner import make
    from harness.storage.store import Store

    folder = tmp_path / "bare"
    shutil.copytree(model_folders.model_folder(Model("demo", "demo")), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    sweep = load_sweep(
        None,
        [
            f"+model={folder}",
            "method=rtn",
            "scheme=w8",
            "evaluations=demo_perplexity",
            "cluster=local",
            "tracking=none",
            f"runs={tmp_path / 'runs'}",
        ],
    )
    plan = make(sweep, Store(tmp_path / "runs"))
    assert plan.refused and all("no tokenizer" in str(each.reasons) for each in plan.refused)
