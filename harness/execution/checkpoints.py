"""What tasks that make checkpoints share: the description that a checkpoint holds of itself, and the model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.core.cell import Cell, parts_identity, quantize_key, stored_scheme


def fingerprint(cell: Cell) -> dict[str, Any]:
    """The description that a checkpoint folder holds of itself. Equal for all cells that share the checkpoint."""
    own = cell.scheme.weight
    return {
        "quantize_key": quantize_key(cell),
        "model": cell.model.digest,
        "dtype": cell.model.dtype,
        "parts": parts_identity(cell.method),
        # folders that exist hold this field at its default too
        "weight": None
        if not cell.method.quantizes
        else {**stored_scheme(cell)[0], "zero_point": own.zero_point},
    }


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, without network access."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )
