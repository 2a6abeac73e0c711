"""Where models and texts come from, and the digests that identify them. Loads without torch.

A model's source is "demo" (the embedded model), "demo:<variant>" (with outliers planted), "tiny:<family>" (random weights, for
trying out), a folder, or a hub id; a text's source is

    demo                                        the embedded corpus
    hub:<owner>/<name>[/<config>][@<revision>]  a data set of the hub
    hub:<owner>/<name>[@<revision>]:<file>      one file of a data set's repository
    a file or a folder                          .jsonl[.gz], .txt[.gz], .parquet; in a folder the split names the file

A row is its text, or an instruction with its answer (Alpaca, FLAN), which becomes one text in Alpaca's words.

Digests name content, not places: a folder may move without changing a key, and what comes from the hub is named by its commit.
What a branch stands for is asked once and kept (`hub_commit`). Nothing here asks the network for what this machine already knows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import random
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.cell import digest
from harness.core.errors import DataError, HarnessError, unknown_name
from harness.core.text import first_line
from harness.data import json_lines
from harness.data.digests import file_digest
from harness.data.hub import COMMIT, hub_commit, hub_error, hub_rows, missing_data_set

DEMO, TINY = "demo", "tiny"
RANDOM_ASCII = "random_ascii"  # a text that is computed, not read
RANDOM_TOKENS = "random_tokens"  # no text at all: windows are drawn from a tokenizer's vocabulary
TEXT_FIELDS = ("text", "page", "sentence")  # of a row, in order of preference
ASKED_AND_ANSWERED = (
    ("instruction", "output"),
    ("inputs", "targets"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
KIND = "text"  # of a file, in messages
LOOK_BYTES = 64 * 2**20  # a plan reads a text of at most so many bytes to its end,
# and of a larger one so many rows: a fault behind them is found when the text is used
LOOK_ROWS = 1000
# of benchmarks: ARC's, PIQA's
QUESTIONS = (("question", "choices", "answerKey"), ("goal", "sol1", "sol2", "label"))
RESPONSE = "### Response:"  # in an instruction's text, what stands before the answer (Alpaca)
TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".txt.gz", ".parquet")
HUB_TEXT = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w.-]+))?(?::(?P<file>.+))?"
)


# --- paths ---------------------------------------------------------------------------------------------------------------------


def resolve_path(value: str, base: Path | None = None) -> Path:
    """An absolute path: below `base` (the folder of a sweep file) when `value` exists there, else below the working directory."""
    path = Path(value).expanduser()
    if base is not None and not path.is_absolute() and (base / path).exists():
        path = base / path
    return Path(os.path.abspath(path))


# --- texts ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubText:
    """A parsed "hub:" source."""

    repo: str
    config: str | None
    revision: str | None
    file: str | None

    @property
    def is_pinned(self) -> bool:
        """Whether its revision is a commit."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    @property
    def unpinned(self) -> HubText:
        """The same source without a revision."""
        return dataclasses.replace(self, revision=None)

    @property
    def source(self) -> str:
        """The source as text."""
        revision = self.revision and self.revision.replace("refs/convert/", "refs-convert-")
        parts = (
            self.config and f"/{self.config}",
            revision and f"@{revision}",
            self.file and f":{self.file}",
        )
        return f"hub:{self.repo}{''.join(part for part in parts if part)}"


def read_corpus(source: str, split: str) -> list[str]:
    """The documents (rows) of a text in their order. Raises DataError naming the file, line or field that is missing."""
    if source == DEMO:
        from harness.data.demo import corpus

        return corpus.documents(split)
    if source == RANDOM_ASCII:
        return random_ascii(split)
    if source == RANDOM_TOKENS:
        raise DataError(f"{RANDOM_TOKENS} are windows for calibration, not a text")
    if not source.startswith("hub:"):
        return [text for path in corpus_files(source, split) for text in _read_texts(path)]
    hub = hub_text(source)
    if hub.file:
        return list(_read_texts(_hub_file(hub)))
    rows = hub_rows(hub.repo, hub.config, split, hub.revision)
    fields = _text_fields(rows.column_names, hub.repo)
    return [
        _text(row, f"{hub.repo}, row {number}")
        for number, row in enumerate(rows.select_columns(list(fields)), start=1)
    ]


def missing_text(source: str, split: str) -> list[str]:
    """Why a text cannot be read here, or would have no identity; empty when all is well. Looks into its files (`LOOK_BYTES`)."""
    try:
        corpus_digest(source, split)
        if source not in (DEMO, RANDOM_ASCII, RANDOM_TOKENS) and not source.startswith("hub:"):
            for path in corpus_files(source, split):
                status = path.stat()
                if reason := _fault(path, status.st_size, status.st_mtime_ns):
                    return [reason]
        reason = (
            missing_data_set(hub_text(source).repo, hub_text(source).revision)
            if source.startswith("hub:")
            else None
        )
    except HarnessError as error:
        return [str(error)]
    return (
        [f"{reason}; set data.root to a folder with text/<name>/{split}.jsonl.gz"] if reason else []
    )


@functools.lru_cache(maxsize=256)
def _fault(path: Path, size: int, modified: int) -> str | None:
    """Why a file's rows are no texts, as far as a look shows; asked again when the file changes."""
    try:
        if path.name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            try:
                _text_fields(pyarrow.parquet.read_schema(path).names, str(path))
            except (pyarrow.ArrowException, OSError) as error:
                raise _no_parquet(path, error) from error
        else:
            found = _read_texts(path)
            for _ in found if size <= LOOK_BYTES else itertools.islice(found, LOOK_ROWS):
                pass
    except DataError as error:
        return str(error)
    return None


def random_ascii(split: str) -> list[str]:
    """256 documents of 4,096 punctuation characters each, uniform and independent: text without meaning (arXiv 2405.20835)."""
    characters = random.Random(f"{RANDOM_ASCII} {split}")
    return ["".join(characters.choices(string.punctuation, k=4096)) for _ in range(256)]


def corpus_digest(source: str, split: str) -> str:
    """Identity of what `read_corpus` would return, without reading it: a data set of the hub by its commit, files by SHA-256."""
    if source == DEMO:
        from harness.data.demo import corpus

        return corpus.corpus_digest(split)
    if source in (RANDOM_ASCII, RANDOM_TOKENS):
        return digest([source, split])
    if source.startswith("hub:"):
        hub = hub_text(source)
        return digest(["hub", hub.repo, hub.config, hub.file, hub.revision, split])
    return digest([file_digest(path) for path in corpus_files(source, split)])


def plain_bytes(source: str, split: str) -> int | None:
    """Bytes of a local text in plain files, of which no token has less than one; None for texts of other kinds."""
    if source in (DEMO, RANDOM_ASCII, RANDOM_TOKENS) or source.startswith("hub:"):
        return None
    files = corpus_files(source, split)
    plain = all(path.name.endswith((".txt", ".json", ".jsonl")) for path in files)
    return sum(path.stat().st_size for path in files) if plain else None


def corpus_files(source: str, split: str) -> list[Path]:
    """The files of a local text: the file itself, or <folder>/<split>.<suffix>, or <folder>/<split>-*.parquet in order."""
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(TEXT_SUFFIXES):
            raise DataError(
                f"text {path}: unknown kind of file; one of {', '.join(TEXT_SUFFIXES)} is expected"
            )
        return [path]
    if not path.is_dir():
        raise DataError(
            f'text "{source}": no such file or folder, nor "{DEMO}" or "hub:<owner>/<name>"'
        )
    for suffix in TEXT_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return [path / f"{split}{suffix}"]
    shards = sorted(path.glob(f"{split}-*.parquet"))
    if not shards:
        splits = {
            entry.name.split(".")[0]
            for entry in path.iterdir()
            if entry.name.endswith(TEXT_SUFFIXES)
        }
        raise DataError(unknown_name("split", split, splits, f"text {path}"))
    return shards


def pin(source: str, pins: Mapping[str, str], ask: bool = True) -> str:
    """A "hub:" source at a commit: that of its revision, else the one in `pins` (data set -> commit), else of the branch main.

    As it was where the commit is unknown (ask=False: not looked for), with `hub_text(source).is_pinned` false. Raises DataError
    for what is no such source.
    """
    hub = hub_text(source)
    commit = pins.get(hub.repo) if hub.revision is None else None
    if commit is None and ask:
        commit = hub_commit(hub.repo, "dataset", hub.revision)
    return source if commit is None else dataclasses.replace(hub, revision=commit).source


def hub_text(source: str) -> HubText:
    """The parts of a "hub:" source. Raises DataError for any other source."""
    match = HUB_TEXT.fullmatch(source)
    if match is None:
        raise DataError(
            f'text "{source}": expected hub:<owner>/<name>[/<config>][@<revision>][:<file>]'
        )
    # "refs-convert-parquet": the slashes of that branch would end a config's name
    revision = match["revision"]
    return HubText(
        match["repo"],
        match["config"],
        revision and revision.replace("refs-convert-", "refs/convert/"),
        match["file"],
    )


def _hub_file(hub: HubText) -> Path:
    from huggingface_hub import hf_hub_download

    assert hub.file is not None
    try:
        return Path(hf_hub_download(hub.repo, hub.file, repo_type="dataset", revision=hub.revision))
    except Exception as error:
        raise hub_error(f"text {hub.repo}:{hub.file}", error) from error


def _read_texts(path: Path) -> Iterator[str]:
    if path.name.endswith(".parquet"):
        yield from _parquet_texts(path)
    elif ".txt" in path.suffixes:
        yield json_lines.plain_text(path, KIND)  # verbatim: a plain text is one document
    else:
        for number, row in json_lines.rows(path, KIND):
            where = f"{path}, line {number}"
            yield _text({name: row[name] for name in _text_fields(row, where)}, where)


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from error
    columns = table.select(list(_text_fields(table.column_names, str(path))))
    number = 0
    for batch in columns.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield _text(row, f"{path}, row {number}")


def _no_parquet(path: Path, error: Exception) -> DataError:
    return DataError(
        f"text {path}: not a Parquet file: {first_line(error)}; fetch or copy it again"
    )


def _text_fields(fields: Iterable[str], where: str) -> tuple[str, ...]:
    """The field that holds a row's text; else those of an instruction and its answer, and of what the instruction is about."""
    present = set(fields)
    for name in TEXT_FIELDS:
        if name in present:
            return (name,)
    for names in QUESTIONS:
        if present >= set(names):
            return names
    for pair in ASKED_AND_ANSWERED:
        if present >= set(pair):
            return (*pair, *({"input"} & present if pair[0] == "instruction" else ()))
    pairs = ", ".join(" and ".join(pair) for pair in ASKED_AND_ANSWERED)
    raise DataError(
        f"text {where}: none of the fields {', '.join(TEXT_FIELDS)}, nor {pairs}; there are {', '.join(sorted(present)) or 'none'}"
    )


def _text(row: Mapping[str, Any], where: str) -> str:
    """A row with one field is its text; an instruction with its answer is written as Alpaca's own texts are; a question of a
    benchmark is followed by its right answer. Raises DataError for a value that is no text: the word "None" is none."""
    if tuple(row) in QUESTIONS:
        return _answered(row, where)
    asked, *others = [_string(row, name, where, optional=name == "input") for name in row]
    if not others:
        return asked
    answered, *about = others
    context = f"\n\n### Input:\n{about[0]}" if about and about[0] else ""
    with_it = ", paired with an input that provides further context" if context else ""
    return (
        f"Below is an instruction that describes a task{with_it}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{asked}{context}\n\n{RESPONSE}\n{answered}"
    )


def _string(row: Mapping[str, Any], name: str, where: str, optional: bool = False) -> str:
    value = row[name]
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        kind = "null" if value is None else f"{value!r:.40}"
        raise DataError(
            f'text {where}: the field "{name}" is {kind}, and a string is expected; leave the row out, or write the text'
        )
    return value


def _answered(row: Mapping[str, Any], where: str) -> str:
    """Question and right answer on one line; the question alone where the answer is withheld."""
    try:
        if "goal" in row:
            label, goal = int(row["label"]), _string(row, "goal", where)
            return f"{goal} {_string(row, f'sol{label + 1}', where)}" if label in (0, 1) else goal
        question = _string(row, "question", where)
        choices = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
        answer = row["answerKey"]
        return f"{question} {_string(choices, answer, where)}" if answer in choices else question
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"text {where}: not a question with its choices as ARC or PIQA has them: {error}"
        ) from error
