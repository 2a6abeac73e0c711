"""What tasks that make checkpoints share: the description that a checkpoint holds of itself, and the model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.core.cell import Cell, quantize_key, to_json


def fingerprint(cell: Cell) -> dict[str, Any]:
    """The description that a checkpoint folder holds of itself. Equal for all cells that share the checkpoint."""
    return {
        "quantize_key": quantize_key(cell),
        "model": cell.model.digest,
        "dtype": cell.model.dtype,
        "parts": [
            {name: to_json(part)[name] for name in ("name", "version", "settings")}
            for part in cell.method.parts
        ],
        "weight": None if cell.method.is_baseline else to_json(cell.scheme.weight),
    }


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, without network access."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )
