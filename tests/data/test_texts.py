"""Texts and models are read from what a folder holds, and named by what is in it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.cell import Cell, Evaluation, Method, Model, Scheme, quantize_key, score_key
from harness.core.errors import DataError, ModelError
from harness.data import digests, hub, model_folders, texts


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    digests._file_digests.cache_clear()
    yield
    digests._file_digests.cache_clear()


def write_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


ROWS = ["first", "", "third\nwith a line", "ünï\u2028code"]


def test_a_generation_config_is_part_of_scores_of_written_text_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders.model_folder(Model("demo", "demo")), folder)
    base = Model(
        "m",
        str(folder),
        digest=model_folders.model_digest(str(folder)),
        generation=model_folders.generation_digest(str(folder)),
    )
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    other = Model(
        "m",
        str(folder),
        digest=model_folders.model_digest(str(folder)),
        generation=model_folders.generation_digest(str(folder)),
    )
    assert base.digest == other.digest and base.generation != other.generation
    cells = [Cell(model, Method("none"), Scheme("full")) for model in (base, other)]
    read, written = (
        Evaluation("a", "lm_eval_tasks"),
        Evaluation("b", "lm_eval_tasks", generates=True),
    )
    assert quantize_key(cells[0]) == quantize_key(cells[1]) and score_key(
        cells[0], read
    ) == score_key(cells[1], read)
    assert score_key(cells[0], written) != score_key(cells[1], written)
    (folder / "generation_config.json").unlink()
    assert (
        model_folders.generation_digest(str(folder))
        == ""
        == model_folders.generation_digest("owner/some-model")
    )


@pytest.mark.parametrize("field", texts.TEXT_FIELDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_come_back_in_order(tmp_path: Path, field: str, suffix: str) -> None:
    text = "".join(json.dumps({field: row}, ensure_ascii=False) + "\n" for row in ROWS)
    content = text.encode()
    (tmp_path / f"test{suffix}").write_bytes(
        gzip.compress(content) if suffix.endswith("gz") else content
    )
    assert texts.read_corpus(str(tmp_path), "test") == ROWS
    assert texts.read_corpus(str(tmp_path / f"test{suffix}"), "any") == ROWS


def test_plain_text_is_one_document_verbatim(tmp_path: Path) -> None:
    text = "a\r\nb\n\n c \n"
    (tmp_path / "plain.txt").write_bytes(text.encode())
    assert texts.read_corpus(str(tmp_path / "plain.txt"), "") == [text]


def test_parquet_shards_are_joined_in_order(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        parquet.write_table(
            pyarrow.table({"text": rows, "id": [0] * len(rows)}),
            tmp_path / f"train-0000{number}-of-00002.parquet",
        )
    assert texts.read_corpus(str(tmp_path), "train") == ROWS


INSTRUCTIONS = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5", "source": "x"},
    {"instruction": "Name a pet.", "input": "", "output": "A newt."},
]


def test_instructions_become_texts_in_the_words_of_alpaca(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in INSTRUCTIONS))
    added, pet = texts.read_corpus(str(tmp_path), "train")
    assert added == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n5"
    )
    assert "### Input" not in pet and pet.endswith(
        "### Instruction:\nName a pet.\n\n### Response:\nA newt."
    )
    for prompt, answer in texts.ASKED_AND_ANSWERED[1:]:
        path = tmp_path / f"{prompt}-{answer}.parquet"
        parquet.write_table(
            pyarrow.table({answer: ["A newt."], "task": [1], prompt: ["Name a pet."]}), path
        )
        assert texts.read_corpus(str(path), "") == [pet]
    (tmp_path / "both.jsonl").write_text(json.dumps({**INSTRUCTIONS[0], "text": "as it is"}) + "\n")
    assert texts.read_corpus(str(tmp_path), "both") == ["as it is"]


def test_questions_of_benchmarks_are_followed_by_their_right_answers(tmp_path: Path) -> None:
    """ARC's and PIQA's rows, in whatever order their fields come; an answer that is withheld is left out."""
    arc = {
        "id": "1",
        "answerKey": "B",
        "question": "Which?",
        "choices": {"text": ["this", "that"], "label": ["A", "B"]},
    }
    rows = [
        arc,
        {**arc, "answerKey": ""},
        {"goal": "Close it.", "sol1": "Pull.", "sol2": "Push.", "label": 1},
        {"goal": "Open it.", "sol1": "Pull.", "sol2": "Push.", "label": -1},
    ]
    for name, part in (("arc", rows[:2]), ("piqa", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert texts.read_corpus(str(tmp_path), "arc") == ["Which? that", "Which?"]
    assert texts.read_corpus(str(tmp_path), "piqa") == ["Close it. Push.", "Open it."]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-12])
    with pytest.raises(DataError, match=r"line 2.*none of the fields text.*body"):
        texts.read_corpus(str(tmp_path), "test")
    with pytest.raises(DataError, match="line 2: not JSON"):
        texts.read_corpus(str(tmp_path), "broken")
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz: cannot be read"):
        texts.read_corpus(str(tmp_path), "torn")
    with pytest.raises(DataError, match='no split "tset"; did you mean "test"'):
        texts.read_corpus(str(tmp_path), "tset")
    with pytest.raises(DataError, match="no such file or folder"):
        texts.read_corpus(str(tmp_path / "nowhere"), "test")
    with pytest.raises(DataError, match="expected hub:"):
        texts.corpus_digest("hub:wikitext", "test")


def test_a_corpus_is_known_by_content_not_by_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text('{"text": "a"}\n')
    first = texts.corpus_digest(str(tmp_path / "a"), "test")
    assert texts.corpus_digest(str(tmp_path / "b"), "test") == first
    (tmp_path / "b" / "test.jsonl").write_text('{"text": "b"}\n')
    assert texts.corpus_digest(str(tmp_path / "b"), "test") != first


def test_a_model_is_known_by_what_changes_its_numbers(tmp_path: Path) -> None:
    digest = model_folders.model_digest(str(write_model(tmp_path / "a")))
    assert model_folders.model_digest(str(write_model(tmp_path / "b"))) == digest
    (tmp_path / "b" / "README.md").write_text("other words")
    assert model_folders.model_digest(str(tmp_path / "b")) == digest
    assert model_folders.model_digest(str(write_model(tmp_path / "c", b"others"))) != digest
    (tmp_path / "b" / "tokenizer.json").write_text('{"other": 1}')
    assert model_folders.model_digest(str(tmp_path / "b")) != digest


def test_large_files_are_hashed_once_and_again_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes(b"x" * (2 << 20))
    first = digests.file_digest(path)
    assert (tmp_path / "cache" / "digests.json").is_file()
    status = path.stat()
    path.write_bytes(b"y" * (2 << 20))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests.file_digest(path) == first, "same path, size and time: remembered"
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert digests.file_digest(path) != first
    (tmp_path / "cache" / "digests.json").write_text("damaged")
    digests._file_digests.cache_clear()
    assert digests.file_digest(path)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        model_folders.model_digest(str(tmp_path / "absent"))
    (tmp_path / "pickled").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        model_folders.model_digest(str(tmp_path / "pickled"))
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin would have to be unpickled"):
        model_folders.model_folder(Model("pickled", str(tmp_path / "pickled")))


def test_a_hub_id_is_a_commit_or_unresolved(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert model_folders.model_digest("owner/name", commit) == commit
    unresolved = model_folders.model_digest("owner/name")
    assert unresolved.startswith(hub.UNRESOLVED)
    with pytest.raises(ModelError, match=r"is not known \(the hub is switched off"):
        model_folders.model_folder(Model("name", "owner/name", digest=unresolved))
    with pytest.raises(ModelError, match="cannot download owner/name"):
        model_folders.model_folder(Model("name", "owner/name", digest=commit))
    refs = tmp_path / "hub" / "hub" / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    assert model_folders.model_digest("owner/name") == commit, (
        "what the hub's cache knows needs no network"
    )


def test_paths_are_relative_to_the_sweep_then_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweeps" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert texts.resolve_path("data", tmp_path / "sweeps") == tmp_path / "sweeps" / "data"
    assert texts.resolve_path("other/../else", tmp_path / "sweeps") == tmp_path / "else"
    assert texts.resolve_path("/absolute", tmp_path) == Path("/absolute")


def test_the_demo_is_a_model_and_a_corpus() -> None:
    assert (model_folders.model_folder(Model("demo", "demo")) / "config.json").is_file()
    assert texts.corpus_digest("demo", "test") != texts.corpus_digest("demo", "calibration")
    assert len(texts.read_corpus("demo", "test")) > 10


def test_shared_texts_are_read(shared: Path) -> None:
    assert len(texts.read_corpus(str(shared / "data" / "text" / "wikitext-2-raw"), "test")) == 4358
    assert len(texts.read_corpus(str(shared / "data" / "text" / "c4"), "calibration")) == 400
