"""A model folder's tokenizer, as far as its files show: whether there is one, and whether it can be read. Loads without torch."""

from __future__ import annotations

import json
from pathlib import Path

from harness.data.json_lines import POINTER

# Any one of them holds a vocabulary.
VOCABULARIES = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt")
WITHOUT_VOCABULARY = (
    "ByT5Tokenizer",
    "CanineTokenizer",
    "PerceiverTokenizer",
)  # read bytes or code points


def tokenizer_fault(folder: Path) -> str | None:
    """Why a local model folder's tokenizer cannot be loaded, with what to do; None where nothing speaks against it."""
    found = [path for name in VOCABULARIES for path in sorted(folder.glob(name)) if path.is_file()]
    for path in found:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return f"{path} is a pointer file of Git LFS, no tokenizer; fetch it: git lfs pull"
    if not found and not _needs_none(folder / "tokenizer_config.json"):
        return (
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt); copy them "
            "from the model that it was made from"
        )
    whole = folder / "tokenizer.json"
    if whole.is_file():
        try:
            content = json.loads(whole.read_bytes())
        except (ValueError, RecursionError) as error:
            return f"{whole} is not JSON ({error}); fetch or copy it again"
        if not isinstance(content, dict):
            return f"{whole} is not a tokenizer: a JSON object is expected; fetch or copy it again"
    return None


def _needs_none(config: Path) -> bool:
    """Whether a tokenizer_config.json names a tokenizer that has no vocabulary, or brings code of its own."""
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and (
        content.get("tokenizer_class") in WITHOUT_VOCABULARY or bool(content.get("auto_map"))
    )
