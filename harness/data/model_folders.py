"""Model folders: where a model lies, its configuration, the digest of its weights."""

from __future__ import annotations

import json
from pathlib import Path

from harness.core.cell import Model, digest
from harness.core.errors import ModelError
from harness.core.text import first_line
from harness.data.digests import cache_folder, file_digest
from harness.data.hub import COMMIT, UNRESOLVED, hub_commit, is_hub_id, unresolved_reason
from harness.data.texts import DEMO, TINY

# The files that change a model's numbers; a README or a second copy of the weights in another format does not.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "*.py",
)
# Downloaded with them, because its end tokens end generated texts. The identity of a hub id is its commit.
FETCHED_FILES = (*MODEL_FILES, "generation_config.json")


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
        folder = Path(
            snapshot_download(model.source, revision=revision, allow_patterns=[*FETCHED_FILES])
        )
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        raise ModelError(
            f'model "{model.name}": cannot download {model.source}@{revision}: {first_line(error)}. '
            "A gated model needs its licence accepted and HF_TOKEN set; without network name a local folder as `model=`."
        ) from error
    return _checked_folder(str(folder))


def config_folder(model: Model) -> Path:
    """A folder with the model's config.json, which is all that a plan reads; for a hub id only that file is downloaded."""
    if not is_hub_id(model.source) or model.digest.startswith(UNRESOLVED):
        return model_folder(model)
    from huggingface_hub import hf_hub_download

    revision = model.digest if COMMIT.fullmatch(model.digest) else model.revision
    try:
        return Path(hf_hub_download(model.source, "config.json", revision=revision)).parent
    except Exception as error:  # as in model_folder
        raise ModelError(
            f'model "{model.name}": cannot read config.json of {model.source}@{revision}: {first_line(error)}. '
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
    names = sorted(
        {path.name for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    )
    return digest([[name, file_digest(folder / name)] for name in names])


def lacks_chat_template(folder: Path) -> bool:
    """Whether a model folder has a tokenizer and no chat template with it."""
    config = folder / "tokenizer_config.json"
    if any(folder.glob("chat_template.*")) or not config.is_file():
        return False
    return "chat_template" not in json.loads(config.read_text(encoding="utf-8"))


def generation_digest(source: str) -> str:
    """SHA-256 of a folder's generation_config.json; "" without one, and for a hub id, whose commit determines it."""
    path = Path() if is_hub_id(source) else _checked_folder(source) / "generation_config.json"
    return file_digest(path) if path.is_file() else ""


def _checked_folder(source: str) -> Path:
    if source.startswith(f"{DEMO}:"):
        from harness.data.demo.variants import variant_folder

        return variant_folder(source.removeprefix(f"{DEMO}:"), cache_folder())
    if source.startswith(f"{TINY}:"):
        from harness.data.demo.tiny import tiny_folder

        return tiny_folder(source.removeprefix(f"{TINY}:"), cache_folder())
    folder = (
        Path(__file__).parent / "demo" / "model"
        if source == DEMO
        else Path(source).expanduser().absolute()
    )
    if not folder.is_dir():
        raise ModelError(f"model {source}: no such folder, and not a hub id of the form owner/name")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {source}: no config.json in {folder}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
        )
        found = (
            f"; {', '.join(pickles)} would have to be unpickled, which is refused: convert it to safetensors"
            if pickles
            else ""
        )
        raise ModelError(f"model {source}: no *.safetensors in {folder}{found}")
    return folder
