"""Where models and texts come from, and the digests that identify them. Loads without torch.

A model's source is "demo" (the embedded model), "demo:<variant>" (with outliers planted), "tiny:<family>" (random weights, for
trying out), a folder, or a hub id; a text's source is

    demo                                        the embedded corpus
    hub:<owner>/<name>[/<config>][@<revision>]  a data set of the hub
    hub:<owner>/<name>[@<revision>]:<file>      one file of a data set's repository
    a file or a folder                          .jsonl[.gz], .txt[.gz], .parquet; in a folder the split names the file

Digests name content, not places: a folder may move without changing a key. Nothing here asks the network for what the
local cache of the hub already knows.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import string
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.cell import Model, digest
from harness.errors import DataError, HarnessError, ModelError, unknown_name

DEMO, TINY = "demo", "tiny"
RANDOM_ASCII = "random_ascii"                   # a text that is computed, not read
TEXT_FIELDS = ("text", "page", "sentence")      # of a row, in order of preference
TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".txt.gz", ".parquet")
# What changes a model's numbers; a README or a second copy of the weights in another format does not.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*.py",
)
# Downloaded with them: its end tokens end generated texts, from the hub as from a folder. A hub id's identity is its commit.
FETCHED_FILES = (*MODEL_FILES, "generation_config.json")
UNRESOLVED = "unresolved:"                      # digest of a hub id whose commit could not be asked for
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_TEXT = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w.-]+))?(?::(?P<file>.+))?")


# --- paths ---------------------------------------------------------------------------------------------------------------------


def resolve_path(value: str, base: Path | None = None) -> Path:
    """An absolute path: below `base` (the folder of a sweep file) when `value` exists there, else below the working directory."""
    path = Path(value).expanduser()
    if base is not None and not path.is_absolute() and (base / path).exists():
        path = base / path
    return Path(os.path.abspath(path))


def is_hub_id(source: str) -> bool:
    """True for "owner/name" that is no folder of this machine."""
    return HUB_ID.fullmatch(source) is not None and not Path(source).expanduser().exists()


# --- models --------------------------------------------------------------------------------------------------------------------


def model_folder(model: Model) -> Path:
    """The folder with config, tokenizer and safetensors of a model; a hub id is downloaded once into the hub's cache.

    Raises ModelError when the folder lacks a file, or the hub cannot be reached and has no complete copy here.
    """
    if not is_hub_id(model.source):
        return _checked_folder(model.source)
    if model.digest.startswith(UNRESOLVED):
        raise ModelError(
            f'model "{model.name}": the hub could not be asked for the commit of {model.source} when the sweep was read, so its '
            "results would have no identity. Connect to the hub, set `revision:` to a commit, or name a local folder as `model=`."
        )
    revision = model.digest if COMMIT.fullmatch(model.digest) else model.revision
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model.source, revision=revision, allow_patterns=[*FETCHED_FILES]))
    except Exception as error:                  # the hub's client raises its own, httpx's and requests' errors
        raise ModelError(
            f'model "{model.name}": cannot download {model.source}@{revision}: {_first_line(error)}. '
            "A gated model needs its licence accepted and HF_TOKEN set; without network name a local folder as `model=`."
        ) from error
    return _checked_folder(str(folder))


def config_folder(model: Model) -> Path:
    """A folder with the model's config.json: all that a plan reads. Of a hub id that file alone is downloaded."""
    if not is_hub_id(model.source) or model.digest.startswith(UNRESOLVED):
        return model_folder(model)
    from huggingface_hub import hf_hub_download

    revision = model.digest if COMMIT.fullmatch(model.digest) else model.revision
    try:
        return Path(hf_hub_download(model.source, "config.json", revision=revision)).parent
    except Exception as error:                  # as in model_folder
        raise ModelError(
            f'model "{model.name}": cannot read config.json of {model.source}@{revision}: {_first_line(error)}. '
            "A gated model needs its licence accepted and HF_TOKEN set; without network name a local folder as `model=`."
        ) from error


def model_digest(source: str, revision: str | None = None) -> str:
    """Identity of a model's weights, config and tokenizer: SHA-256 over the folder's files, or the hub's commit.

    A hub id is resolved from `revision` if that is a commit, else from the hub's local cache, else over the network; when
    that fails the digest starts with "unresolved:", which can be planned with but which `model_folder` refuses.
    """
    if is_hub_id(source):
        return revision if revision and COMMIT.fullmatch(revision) else _hub_commit(source, revision or "main")
    folder = _checked_folder(source)
    names = sorted({path.name for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    return digest([[name, file_digest(folder / name)] for name in names])


def _checked_folder(source: str) -> Path:
    if source.startswith(f"{DEMO}:"):
        from harness.demo.variants import variant_folder

        return variant_folder(source.removeprefix(f"{DEMO}:"), cache_folder())
    if source.startswith(f"{TINY}:"):
        from harness.demo.tiny import tiny_folder

        return tiny_folder(source.removeprefix(f"{TINY}:"), cache_folder())
    folder = Path(__file__).parent / "demo" / "model" if source == DEMO else Path(source).expanduser().absolute()
    if not folder.is_dir():
        raise ModelError(f"model {source}: no such folder, and not a hub id of the form owner/name")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {source}: no config.json in {folder}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"; {', '.join(pickles)} would have to be unpickled, which is refused: convert it to safetensors" if pickles else ""
        raise ModelError(f"model {source}: no *.safetensors in {folder}{found}")
    return folder


@functools.cache
def _hub_commit(source: str, revision: str) -> str:
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub")
    known = cache / f"models--{source.replace('/', '--')}" / "refs" / revision
    if known.is_file():
        return known.read_text().strip()
    if os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes", "on"):
        from huggingface_hub import HfApi

        try:
            commit = HfApi().model_info(source, revision=revision, timeout=5).sha
            if commit:
                return commit
        except Exception:                       # offline, gated or misspelt: said by model_folder, when it matters
            pass
    return f"{UNRESOLVED}{source}@{revision}"


# --- texts ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubText:
    """A parsed "hub:" source."""

    repo: str
    config: str | None
    revision: str | None
    file: str | None


def read_corpus(source: str, split: str) -> list[str]:
    """The documents (rows) of a text in their order. Raises DataError naming the file, line or field that is missing."""
    if source == DEMO:
        from harness.demo import corpus

        return corpus.documents(split)
    if source == RANDOM_ASCII:
        return random_ascii(split)
    if not source.startswith("hub:"):
        return [text for path in corpus_files(source, split) for text in _read_texts(path)]
    hub = _hub_text(source)
    return list(_read_texts(_hub_file(hub))) if hub.file else _hub_rows(hub, split)


def random_ascii(split: str) -> list[str]:
    """256 documents of 4,096 punctuation characters each, uniform and independent: text without sense (arXiv 2405.20835)."""
    characters = random.Random(f"{RANDOM_ASCII} {split}")
    return ["".join(characters.choices(string.punctuation, k=4096)) for _ in range(256)]


def corpus_digest(source: str, split: str) -> str:
    """Identity of what `read_corpus` would return, without reading the hub: a pinned revision, or the SHA-256 of the files."""
    if source == DEMO:
        from harness.demo import corpus

        return corpus.corpus_digest(split)
    if source == RANDOM_ASCII:
        return digest([source, split])
    if source.startswith("hub:"):
        _hub_text(source)
        return digest([source, split])
    return digest([file_digest(path) for path in corpus_files(source, split)])


def corpus_files(source: str, split: str) -> list[Path]:
    """The files of a local text: the file itself, or <folder>/<split>.<suffix>, or <folder>/<split>-*.parquet in order."""
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(TEXT_SUFFIXES):
            raise DataError(f"text {path}: unknown kind of file; one of {', '.join(TEXT_SUFFIXES)} is expected")
        return [path]
    if not path.is_dir():
        raise DataError(f'text "{source}": no such file or folder, nor "{DEMO}" or "hub:<owner>/<name>"')
    for suffix in TEXT_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return [path / f"{split}{suffix}"]
    shards = sorted(path.glob(f"{split}-*.parquet"))
    if not shards:
        splits = {entry.name.split(".")[0] for entry in path.iterdir() if entry.name.endswith(TEXT_SUFFIXES)}
        raise DataError(unknown_name("split", split, splits, f"text {path}"))
    return shards


def task_digest(task: str, folder: Path) -> str:
    """Identity of a benchmark's local data: the JSON-lines files of <folder>/tasks/<task>/."""
    path = folder / "tasks" / task
    files = sorted(path.glob("*.jsonl")) + sorted(path.glob("*.jsonl.gz"))
    if not files:
        known = [entry.name for entry in (folder / "tasks").glob("*") if entry.is_dir()]
        raise DataError(unknown_name("task data", task, known, str(folder / "tasks")))
    return digest([[file.name, file_digest(file)] for file in files])


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Identity of the files of one folder that match a pattern, by name and content."""
    return digest([[path.name, file_digest(path)] for path in sorted(folder.glob(pattern)) if path.is_file()])


def _hub_text(source: str) -> HubText:
    match = HUB_TEXT.fullmatch(source)
    if match is None:
        raise DataError(f'text "{source}": expected hub:<owner>/<name>[/<config>][@<revision>][:<file>]')
    revision = match["revision"]                # "refs-convert-parquet": the slashes of that branch would end a config's name
    return HubText(match["repo"], match["config"], revision and revision.replace("refs-convert-", "refs/convert/"), match["file"])


def _hub_file(hub: HubText) -> Path:
    from huggingface_hub import hf_hub_download

    assert hub.file is not None
    try:
        return Path(hf_hub_download(hub.repo, hub.file, repo_type="dataset", revision=hub.revision))
    except Exception as error:
        raise _hub_error(f"{hub.repo}:{hub.file}", error) from error


def _hub_rows(hub: HubText, split: str) -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(hub.repo, hub.config, split=split, revision=hub.revision)
    except Exception as error:
        raise _hub_error(f"{hub.repo}, config {hub.config}, split {split}", error) from error
    return [str(text) for text in rows[_text_field(rows.column_names, hub.repo)]]


def _hub_error(what: str, error: Exception) -> DataError:
    return DataError(
        f"text {what}: the hub did not give it: {_first_line(error)}. "
        "Without network set data.root to a folder with text/<name>/<split>.jsonl.gz, or source to a file."
    )


def _read_texts(path: Path) -> Iterator[str]:
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_texts(path)
        elif ".txt" in path.suffixes:
            with _open(path) as file:
                yield file.read()               # verbatim: a plain text is one document
        else:
            with _open(path) as file:
                yield from _json_texts(path, file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"text {path}: cannot be read: {error}") from error


def _json_texts(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"text {path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"text {path}, line {number}: an object is expected, not {type(row).__name__}")
        yield str(row[_text_field(row, f"{path}, line {number}")])


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"text {path}: not a Parquet file: {_first_line(error)}") from error
    yield from (str(text) for text in table[_text_field(table.column_names, str(path))].to_pylist())


def _text_field(fields: Iterable[str], where: str) -> str:
    present = set(fields)
    for name in TEXT_FIELDS:
        if name in present:
            return name
    raise DataError(f"text {where}: none of the fields {', '.join(TEXT_FIELDS)}; there are {', '.join(sorted(present)) or 'none'}")


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


# --- digests of files ----------------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; remembered by path, size and modification time, since a model's weights take minutes to read."""
    try:
        status = path.stat()
        name, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        known = _file_digests().get(name)
        if known is not None and known[:2] == stamp:
            return str(known[2])
        with path.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HarnessError(f"{path}: cannot be read: {error}") from error
    if status.st_size > 1 << 20:                # below a megabyte, hashing again is cheaper than remembering
        _file_digests()[name] = [*stamp, value]
        _remember()
    return value


def cache_folder() -> Path:
    """HARNESS_CACHE, or ~/.cache/quantization-harness."""
    return Path(os.environ.get("HARNESS_CACHE") or "~/.cache/quantization-harness").expanduser()


@functools.cache
def _file_digests() -> dict[str, list[Any]]:
    try:
        known = json.loads((cache_folder() / "digests.json").read_text())
    except (OSError, ValueError):
        return {}                               # a lost cache costs time alone
    return known if isinstance(known, dict) else {}


def _remember() -> None:
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache_folder(), suffix=".json", delete=False) as file:
            json.dump(_file_digests(), file)
        os.replace(file.name, cache_folder() / "digests.json")
    except OSError:
        pass                                    # a read-only home: the digest is computed again next time


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
