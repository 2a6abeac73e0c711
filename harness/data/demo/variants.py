"""Relatives of the demo model, derived from what is shipped the first time one is asked for: no download, seconds.

With larger planted outliers; full-precision logits are those of the shipped model to the bit, and what rounding sees differs:

    weight_outliers       16 neighbouring channels of block 0's norms ×1/256, the weights they meet ×256: with 8-bit weights and
                          activations one scale per output channel breaks down, groups of 16 do not (LLaMA3-70B, arXiv 2408.15301)
    activation_outliers   one channel of every norm ×256, its weights ÷256: 8-bit activations break down, smoothing repairs it
                          (SmoothQuant, arXiv 2211.10438)

Fine-tunes of the demo model, whose weights are shipped beside this file (`fine_tune`); each has learned one skill of `skills`:

    moved, subtract, reverse
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.core.errors import ModelError, unknown_name
from harness.data.demo.skills import SKILLS

SHIPPED = Path(__file__).parent / "model"


@dataclass(frozen=True)
class Plant:
    """Arguments of `plant.plant`."""

    kind: str
    scale: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]


VARIANTS = {
    "weight_outliers": (Plant("weight", 256, tuple(range(16, 32)), (0,)),),
    "activation_outliers": (Plant("activation", 256, (21,), (0, 1, 2, 3)),),
}


def variant_folder(name: str, cache: Path) -> Path:
    """The folder of a variant below cache, built there unless a finished one of the same shipped model and plants exists.

    Raises ModelError on an unknown name.
    """
    if name not in (*VARIANTS, *SKILLS):
        known = (*VARIANTS, *SKILLS)
        raise ModelError(
            unknown_name("variant of the demo model", name, known, where=f"demo:{name}")
        )
    folder = cache / f"demo-{name}-{_identity(name)[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        _build(name, aside)
        aside.chmod(0o755)
        try:
            os.rename(aside, folder)
        except OSError:  # another process finished the same bytes first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _identity(name: str) -> str:
    """SHA-256 over the plants, or the weights of the fine-tune, and the shipped model's files."""
    plants = [asdict(plant) for plant in VARIANTS.get(name, ())]
    state = hashlib.sha256(json.dumps(plants).encode())
    if name in SKILLS:
        state.update(_tuned(name).read_bytes())
    for path in _shipped_files():
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def _shipped_files() -> Iterator[Path]:
    yield from sorted(
        path
        for path in SHIPPED.iterdir()
        if path.suffix in (".json", ".safetensors") and path.name != "recipe.json"
    )


def _tuned(skill: str) -> Path:
    return Path(__file__).parent / f"tuned_{skill}.safetensors"


def _build(name: str, folder: Path) -> None:
    if name in SKILLS:
        for path in _shipped_files():
            shutil.copyfile(
                _tuned(name) if path.suffix == ".safetensors" else path, folder / path.name
            )
        return
    # Imported here, because texts and model folders must load without torch.
    from transformers import AutoModelForCausalLM

    from harness.data.demo.plant import plant

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, local_files_only=True)
    for each in VARIANTS[name]:
        plant(model, each.kind, each.scale, each.channels, each.blocks)
    for path in _shipped_files():
        shutil.copyfile(path, folder / path.name)
    model.save_pretrained(folder)  # over the copied config and weights
