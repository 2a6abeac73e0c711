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
import gzip
import hashlib
import io
import json
import os
import random
import re
import string
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.cell import Model, digest
from harness.errors import DataError, HarnessError, ModelError, unknown_name

DEMO, TINY = "demo", "tiny"
RANDOM_ASCII = "random_ascii"                   # a text that is computed, not read
RANDOM_TOKENS = "random_tokens"                 # no text at all: windows are drawn from a tokenizer's vocabulary
TEXT_FIELDS = ("text", "page", "sentence")      # of a row, in order of preference
ASKED_AND_ANSWERED = (("instruction", "output"), ("inputs", "targets"), ("prompt", "completion"), ("prompt", "response"))
QUESTIONS = (("question", "choices", "answerKey"), ("goal", "sol1", "sol2", "label"))         # of benchmarks: ARC's, PIQA's
RESPONSE = "### Response:"                      # in an instruction's text, what stands before the answer (Alpaca)
TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".txt.gz", ".parquet")
# What changes a model's numbers; a README or a second copy of the weights in another format does not.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "chat_template.*", "*.py",
)
# Downloaded with them: its end tokens end generated texts, from the hub as from a folder. A hub id's identity is its commit.
FETCHED_FILES = (*MODEL_FILES, "generation_config.json")
UNRESOLVED = "unresolved:"                      # digest of a hub id whose commit could not be asked for
TRUE = ("1", "true", "yes", "on")               # of a switch in the environment
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
        why = unresolved_reason(model.source, "model", model.revision)
        raise ModelError(
            f'model "{model.name}": the commit of {model.source}@{model.revision or "main"} is not known ({why}), so its results '
            "would have no identity. Connect to the hub, set `revision:` to a commit, or name a local folder as `model=`."
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

    A hub id without a known commit gets a digest that starts with "unresolved:", which can be planned with but which
    `model_folder` refuses.
    """
    if is_hub_id(source):
        return hub_commit(source, "model", revision) or f"{UNRESOLVED}{source}@{revision or 'main'}"
    folder = _checked_folder(source)
    names = sorted({path.name for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    return digest([[name, file_digest(folder / name)] for name in names])


def lacks_chat_template(folder: Path) -> bool:
    """Whether a model folder has a tokenizer and no chat template with it."""
    config = folder / "tokenizer_config.json"
    if any(folder.glob("chat_template.*")) or not config.is_file():
        return False
    return "chat_template" not in json.loads(config.read_text(encoding="utf-8"))


def generation_digest(source: str) -> str:
    """SHA-256 of a folder's generation_config.json; "" without one, and for a hub id, whose commit says it."""
    path = Path() if is_hub_id(source) else _checked_folder(source) / "generation_config.json"
    return file_digest(path) if path.is_file() else ""


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


# --- commits of the hub --------------------------------------------------------------------------------------------------------


def hub_commit(repository: str, kind: str, revision: str | None = None) -> str | None:
    """The commit that a branch or tag ("main" where None) of a model or data set of the hub stands for; None where it is unknown.

    kind: "model" or "dataset". What a branch stood for when this machine first asked stays: it is kept in commits.json beside the
    digests, so that keys do not move under a sweep when its authors commit. Before the network is asked, the hub's local cache is.
    """
    revision = revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    name = f"{kind} {repository}@{revision}"
    known = _known_commits().get(name) or _cached_reference(repository, kind, revision)
    if known is None:
        known = _asked_commit(repository, kind, revision)
        if known is not None:
            _keep_json(cache_folder() / "commits.json", {**_known_commits(), name: known})
    return known or (_only_snapshot(repository, kind) if revision == "main" else None)


def unresolved_reason(repository: str, kind: str, revision: str | None = None) -> str:
    """Why `hub_commit` knows none."""
    if _is_offline():
        return "the hub is switched off (HF_HUB_OFFLINE), and nothing in its local cache says it"
    return _refusals.get((repository, kind, revision or "main")) or _silent.get(_endpoint()) or "the hub could not be asked"


_refusals: dict[tuple[str, str, str], str] = {}     # what the hub answered in place of a commit
_silent: dict[str, str] = {}                        # hubs that did not answer: asked once per process, not once per data set


def _asked_commit(repository: str, kind: str, revision: str) -> str | None:
    if _is_offline() or _endpoint() in _silent:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi(endpoint=_endpoint()).repo_info(repository, repo_type=kind, revision=revision, timeout=5).sha
    except HfHubHTTPError as error:                 # absent, gated, or an access token that is not accepted
        status = getattr(error.response, "status_code", None)
        hint = ": misspelt, or gated: accept its licence and set HF_TOKEN" if status in (401, 403, 404) else ""
        _refusals[repository, kind, revision] = f"the hub answered {status}{hint}"
    except Exception as error:                      # httpx's errors, of a hub that cannot be reached
        _silent[_endpoint()] = f"the hub cannot be reached: {_first_line(error)}"
    return None


def _cached_reference(repository: str, kind: str, revision: str) -> str | None:
    reference = _hub_cache() / f"{kind}s--{repository.replace('/', '--')}" / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def _only_snapshot(repository: str, kind: str) -> str | None:
    """The one commit of a repository that the hub's cache holds; clients that download by commit leave no reference."""
    commits = {path.name for path in (_hub_cache() / f"{kind}s--{repository.replace('/', '--')}" / "snapshots").glob("*")}
    if kind == "dataset" and not commits:       # `datasets` keeps what it read: <config>/<version>/<commit>
        commits = {path.name for path in (_datasets_cache() / repository.replace("/", "___")).glob("*/*/*")}
    found = sorted(commit for commit in commits if COMMIT.fullmatch(commit))
    return found[0] if len(found) == 1 else None


def _known_commits() -> dict[str, str]:
    try:
        known = json.loads((cache_folder() / "commits.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub")


def _datasets_cache() -> Path:
    return Path(os.environ.get("HF_DATASETS_CACHE") or _hub_home() / "datasets")


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE


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
        """The same at no stated revision."""
        return dataclasses.replace(self, revision=None)

    @property
    def source(self) -> str:
        """The source that says this."""
        revision = self.revision and self.revision.replace("refs/convert/", "refs-convert-")
        parts = (self.config and f"/{self.config}", revision and f"@{revision}", self.file and f":{self.file}")
        return f"hub:{self.repo}{''.join(part for part in parts if part)}"


def read_corpus(source: str, split: str) -> list[str]:
    """The documents (rows) of a text in their order. Raises DataError naming the file, line or field that is missing."""
    if source == DEMO:
        from harness.demo import corpus

        return corpus.documents(split)
    if source == RANDOM_ASCII:
        return random_ascii(split)
    if source == RANDOM_TOKENS:
        raise DataError(f"{RANDOM_TOKENS} are windows for calibration and no text")
    if not source.startswith("hub:"):
        return [text for path in corpus_files(source, split) for text in _read_texts(path)]
    hub = hub_text(source)
    if hub.file:
        return list(_read_texts(_hub_file(hub)))
    rows = hub_rows(hub.repo, hub.config, split, hub.revision)
    fields = _text_fields(rows.column_names, hub.repo)
    return [_text(row) for row in rows.select_columns(list(fields))] if len(fields) > 1 else [str(t) for t in rows[fields[0]]]


def missing_text(source: str, split: str) -> list[str]:
    """Why a text cannot be read here, or would have no identity; empty when all is well."""
    try:
        corpus_digest(source, split)
        reason = missing_data_set(hub_text(source).repo, hub_text(source).revision) if source.startswith("hub:") else None
    except HarnessError as error:
        return [str(error)]
    return [f"{reason}; set data.root to a folder with text/<name>/{split}.jsonl.gz"] if reason else []


def missing_data_set(repository: str, revision: str | None) -> str | None:
    """Why a data set of the hub cannot be read here: not in the local cache and the hub not reachable, or its commit is not known.

    None when it can. revision: as `pin` left it.
    """
    prepared = _datasets_cache() / repository.replace("/", "___")
    if not (_hub_cache() / f"datasets--{repository.replace('/', '--')}").is_dir() and not prepared.is_dir():
        if _is_offline() or os.environ.get("HF_DATASETS_OFFLINE", "").lower() in TRUE:
            return f"the data set {repository} is not in the local cache, and the hub is switched off (HF_HUB_OFFLINE)"
        if not _reachable(_endpoint()):
            return f"the data set {repository} is not in the local cache, and the hub cannot be reached"
    if revision is None or not COMMIT.fullmatch(revision):
        why = unresolved_reason(repository, "dataset", revision)
        return f"the commit of the data set {repository} is not known ({why}), so results would have no identity"
    return None


@functools.cache
def _reachable(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3)
    except urllib.error.HTTPError:
        return True                             # it answered
    except (OSError, ValueError):
        return False
    return True


def random_ascii(split: str) -> list[str]:
    """256 documents of 4,096 punctuation characters each, uniform and independent: text without sense (arXiv 2405.20835)."""
    characters = random.Random(f"{RANDOM_ASCII} {split}")
    return ["".join(characters.choices(string.punctuation, k=4096)) for _ in range(256)]


def corpus_digest(source: str, split: str) -> str:
    """Identity of what `read_corpus` would return, without reading it: a data set of the hub by its commit, files by SHA-256."""
    if source == DEMO:
        from harness.demo import corpus

        return corpus.corpus_digest(split)
    if source in (RANDOM_ASCII, RANDOM_TOKENS):
        return digest([source, split])
    if source.startswith("hub:"):
        hub = hub_text(source)
        return digest(["hub", hub.repo, hub.config, hub.file, hub.revision, split])
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
    """The parts of a "hub:" source. Raises DataError for what is none."""
    match = HUB_TEXT.fullmatch(source)
    if match is None:
        raise DataError(f'text "{source}": expected hub:<owner>/<name>[/<config>][@<revision>][:<file>]')
    revision = match["revision"]                # "refs-convert-parquet": the slashes of that branch would end a config's name
    return HubText(match["repo"], match["config"], revision and revision.replace("refs-convert-", "refs/convert/"), match["file"])


def hub_rows(repository: str, config: str | None, split: str, revision: str | None) -> Any:
    """A split of a data set of the hub, as `datasets` gives it. Raises DataError where the hub does not give it."""
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split, revision=revision)
    except Exception as error:
        raise _hub_error(f"data set {repository}, config {config}, split {split}", error) from error


def _hub_file(hub: HubText) -> Path:
    from huggingface_hub import hf_hub_download

    assert hub.file is not None
    try:
        return Path(hf_hub_download(hub.repo, hub.file, repo_type="dataset", revision=hub.revision))
    except Exception as error:
        raise _hub_error(f"text {hub.repo}:{hub.file}", error) from error


def _hub_error(what: str, error: Exception) -> DataError:
    return DataError(
        f"{what}: the hub did not give it: {_first_line(error)}. Without network set data.root to a folder with its texts and "
        "tasks, or to a bundle of `harness data pull`."
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
        yield _text({name: row[name] for name in _text_fields(row, f"{path}, line {number}")})


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"text {path}: not a Parquet file: {_first_line(error)}") from error
    columns = table.select(list(_text_fields(table.column_names, str(path))))
    for batch in columns.to_batches():
        yield from map(_text, batch.to_pylist())


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


def _text(row: Mapping[str, Any]) -> str:
    """A row with one field is its text; an instruction with its answer is written as Alpaca's own texts are; a question of a
    benchmark is followed by its right answer."""
    if tuple(row) in QUESTIONS:
        return _answered(row)
    values = [str(value) for value in row.values()]
    if len(values) == 1:
        return values[0]
    asked, answered, *about = values
    context = f"\n\n### Input:\n{about[0]}" if about and about[0] else ""
    with_it = ", paired with an input that provides further context" if context else ""
    return (
        f"Below is an instruction that describes a task{with_it}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{asked}{context}\n\n{RESPONSE}\n{answered}"
    )


def _answered(row: Mapping[str, Any]) -> str:
    """Question and right answer on one line; the question alone where the answer is withheld."""
    if "goal" in row:
        label = int(row["label"])
        return f"{row['goal']} {row[f'sol{label + 1}']}" if label in (0, 1) else str(row["goal"])
    choices = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return f"{row['question']} {choices[row['answerKey']]}" if row["answerKey"] in choices else str(row["question"])


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
        _keep_json(cache_folder() / "digests.json", _file_digests())
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


def _keep_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written aside and renamed; nothing where the home cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError:
        pass                                    # it is found out again next time


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
