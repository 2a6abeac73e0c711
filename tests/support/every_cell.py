"""Methods × schemes × families: which cells the plan accepts, and whether these run.

    python tests/support/every_cell.py [--families llama,mixtral] [--methods gptq,awq]     # all of them; about an hour on one core

Models are the tiny ones of `harness.data.demo.tiny`, of two blocks. Each cell runs as in a sweep: `execution.worker.quantize` into
a store, with tunings; then the model is loaded as an evaluation loads it, with rounded activations and cache, and run on a few
tokens.
`test_every_cell.py` asks the whole product what it accepts and runs a part; this command runs everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from evidence import planted_change
from safetensors.torch import load_file, save_file

from harness.config import grid, locations
from harness.core.cell import Cell, Part, cell_key, freeze, quantize_key, reduction_key, to_json
from harness.core.events import Failed
from harness.data.demo.tiny import TINY, build
from harness.execution.tasks import QuantizeTask
from harness.execution.worker import quantize
from harness.planning.checks import Checker
from harness.quantization.formats.weight_files import ModelWeights
from harness.quantization.inference.load import load
from harness.quantization.models import family_of, read_config
from harness.storage.store import Store

# Settings with which a method does on a tiny model what it does on a large one: published defaults would train for hours, or make
# codebooks that are larger than the matrices.
SMALL: dict[str, Any] = {
    "epochs": 1,
    "iterations": 4,
    "steps": 1,
    "batch": 2,
    "micro_batch": 2,
    "sequences": 1,
    "rank": 4,
    "prompt_length": 16,
    "answer_length": 8,
    "vector_length": 4,
    "index_bits": 4,
    "length": 12,
    "groups": [[8, 1], [2, 0]],
    "size": 16,
}
# four groups in a row of 64, which SliM-LLM asks for; symmetric rows for HIGGS
NARROW = ("w2g16", "w3g16", "w4sym")
# of methods that prune, which accept no other schemes
SPARSE = ("w16s50", "w16s2of4", "w4s50", "w4g32s2of4", "w3g16syms4of8", "w8s30a8kv4", "nvfp4s50")
RUNTIME = ("model=demo", "method=rtn", "scheme=w4", "evaluations=[]", "device=cpu", "tracking=none")
WINDOWS = ("calibration=demo", "calibration.samples=2", "calibration.length=24")
CELLS_PER_PASS = 16


def names(group: str, *left_out: str) -> list[str]:
    return [entry.name for entry in locations.list_names(group) if entry.name not in left_out]


def reduces(method: str) -> bool:
    """Whether a method of conf/ has a reduction."""
    content = yaml.safe_load(locations.config_files("method")[method].read_text(encoding="utf-8"))
    return bool(content.get("reduction"))


def product(
    folder: Path, methods: Sequence[str] | None = None, schemes: Sequence[str] | None = None
) -> list[Cell]:
    """Every method with every scheme, or these, on the model in a folder, with settings for small models; without the baseline.

    The model names a base, which is made beside it: the model less a planted difference.
    """
    wanted = names("methods", "none") if methods is None else methods
    schemes = [*names("schemes", "full"), *NARROW, *SPARSE] if schemes is None else schemes
    overrides = [
        f"model={folder}",
        f"model.base={base_for(folder)}",
        f"method={','.join(wanted)}",
        f"scheme={','.join(schemes)}",
        *WINDOWS,
        "tracking=none",
    ]
    cells = grid.load_sweep(None, [*overrides, "evaluations=[]"]).cells
    return [_small(cell) for cell in cells if not cell.method.is_baseline]


def base_for(folder: Path) -> Path:
    """The base of the model in a folder, made once: its block matrices less a planted difference, everything else the same."""
    base = folder.with_name(f"{folder.name}-base")
    if base.is_dir():
        return base
    shutil.copytree(folder, base)
    data = read_config(folder)
    family = family_of(data)
    config = family.config(data)
    weights = load_file(base / "model.safetensors")
    model = ModelWeights(folder, family.skeleton(config, torch.float32))
    for index in range(len(family.blocks(family.skeleton(config, torch.float32)))):
        prefix = family.block_prefix(index)
        for number, location in enumerate(family.locations(config, index)):
            names = model.stored.parts[prefix + location.parameter].all()
            if len(names) == 1 and weights[names[0]].ndim == 2:
                rows = location.view(weights[names[0]])
                rows -= 0.3 * planted_change(*rows.shape, seed=100 * index + number)
            else:  # experts that the file stores one by one, or together
                for name in names:
                    weights[name] *= 0.98
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def _small(cell: Cell) -> Cell:
    def part(part: Part | None) -> Part | None:
        if part is None:
            return None
        settings = to_json(part)["settings"]  # 0 stands for what the method works out by itself
        own = {key: SMALL.get(key, value) if value else value for key, value in settings.items()}
        return dataclasses.replace(part, settings=freeze(own))

    method = cell.method
    kinds = ("reduction", "transform", "rounding", "tuning")
    parts = {kind: part(getattr(method, kind)) for kind in kinds}
    return dataclasses.replace(cell, method=dataclasses.replace(method, **parts))


def checker() -> Checker:
    return Checker(grid.load_sweep(None, RUNTIME).runtime)


def failures(cells: Sequence[Cell], folder: Path, runs: Path) -> Iterator[str]:
    """Quantize, load and run the cells, all of the model in `folder`; yields what went wrong, one line each."""
    store = Store(runs)
    by_key: dict[str, Cell] = {}
    for cell in cells:
        by_key.setdefault(quantize_key(cell), cell)
    titles = {cell_key(cell): cell.title for cell in by_key.values()}
    for some in _passes(by_key.values()):
        for event in quantize(QuantizeTask(some, str(runs), "cpu", 1), store, "cpu"):
            if isinstance(event, Failed):
                yield f"{', '.join(titles[key] for key in event.cell_keys)}: {event.stage}: {event.reason}"
    tokens = (torch.arange(20) * 7 % 250)[None]
    for cell in {
        (quantize_key(cell), cell.scheme.activation, cell.scheme.kv): cell for cell in cells
    }.values():
        key = quantize_key(cell)
        if store.manifest(key) is None:
            continue  # said above
        try:
            source = folder
            if cell.method.reduction is not None:
                source = store.reduced_folder(reduction_key(cell))
            checkpoint = store.checkpoint_folder(key) if cell.method.quantizes else None
            model, _ = load(cell, source, checkpoint, "cpu")
            with torch.no_grad():
                logits = model(input_ids=tokens).logits
        except Exception as error:
            yield f"{cell.title}: does not run: {type(error).__name__}: {error}"
            continue
        if not bool(torch.isfinite(logits).all()):
            yield f"{cell.title}: runs to NaN or infinity"


def _passes(cells: Iterable[Cell]) -> Iterator[tuple[Cell, ...]]:
    """Cells that can share a pass, as the plan would have it: with calibration, and without."""
    groups: dict[bool, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.method.needs_calibration, []).append(cell)
    for group in groups.values():
        for start in range(0, len(group), CELLS_PER_PASS):
            yield tuple(group[start : start + CELLS_PER_PASS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(TINY))
    parser.add_argument("--methods", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = arguments.methods and arguments.methods.split(",")
    asked, ran, failed = 0, 0, 0
    for family in arguments.families.split(","):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            build(family, folder, num_hidden_layers=2)
            cells, ask = product(folder, methods), checker()
            accepted = [cell for cell in cells if not ask.reasons(cell)]
            problems = 0
            for problem in failures(accepted, folder, Path(scratch) / "runs"):
                print(f"FAIL  {family}  {problem}", flush=True)
                problems += 1
        checkpoints = len({quantize_key(cell) for cell in accepted})
        asked, ran, failed = asked + len(cells), ran + len(accepted), failed + problems
        made = f"{len(accepted)} run from {checkpoints} checkpoints · {problems} failed · {time.monotonic() - began:.0f} s"
        print(
            f"{family:12} {len(cells)} cells · {len(cells) - len(accepted)} refused by the plan · {made}",
            flush=True,
        )
    print(f"{asked} cells · {asked - ran} refused by the plan · {ran} run · {failed} failed")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
