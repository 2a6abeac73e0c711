"""Names of cells: the labels of tables and figures, and the variant that distinguishes cells of a sweep. Loads without torch.

A label names a cell's seed, inputs and calibration only where they differ between cells of the same model and method, so that names
stay short. Cells that differ only in their seeds are *replicates*: repeated measurements of one point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from harness.core.cell import Cell, cell_key, to_json
from harness.core.sparsity import sparsity_text

BITS_OF_DTYPE = {"float32": 32, "float16": 16, "bfloat16": 16}
# axes of a sweep besides model, method and scheme
VARIED = ("calibration", "inputs", "seed")
HIDDEN = ("scheme.name", "calibration.digest", "calibration.source", "model.base_digest")


def with_variants(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The cells of a sweep, each with the text that distinguishes it from the others (`Cell.variant`, part of its title)."""
    known = tuple(cells)
    found = variants(known)
    return tuple(dataclasses.replace(cell, variant=found.get(cell_key(cell), "")) for cell in known)


def variants(cells: Sequence[Cell], by_scheme: bool = True) -> dict[str, str]:
    """cell_key -> "calibration c4 · seed 1": the values that differ among cells of its model and method.

    If cells with the same scheme have the same values of these, every field that differs among them is named. Cells that need no
    such text are left out. by_scheme: the text stands beside the scheme's name; otherwise beside the bits and the group size.
    """
    found: dict[str, str] = {}
    facts = {cell_key(cell): _shown(cell) for cell in cells}
    for group in _grouped(cells, lambda cell: (cell.model.name, cell.method.name)):
        varying = _varying([facts[key] for key in group], only=VARIED)
        for same in _grouped(
            [group[key] for key in group], lambda cell: _scheme_text(cell, by_scheme)
        ):
            shown = {key: tuple(str(facts[key].get(name)) for name in varying) for key in same}
            names = (
                varying
                if len(set(shown.values())) == len(shown)
                else _varying([facts[key] for key in same]) or varying
            )
            words = {
                key: [f"{_short(name)} {facts[key][name]}" for name in names if name in facts[key]]
                for key in same
            }
            found |= {key: " · ".join(each) for key, each in words.items() if each}
    return found


def replicates(cells: Iterable[Cell], across_models: bool = False) -> list[tuple[Cell, ...]]:
    """Groups of cells that differ only in seeds (their own, and the seed of their calibration windows), in order.

    across_models: cells of a group may differ in their model too.
    """
    groups: dict[Any, dict[str, Cell]] = {}
    for cell in cells:
        calibration = (
            None if cell.calibration is None else dataclasses.replace(cell.calibration, seed=0)
        )
        model = None if across_models else cell.model
        point = (model, cell.method, cell.scheme, calibration, cell.inputs)
        groups.setdefault(point, {}).setdefault(cell_key(cell), cell)
    return [tuple(group.values()) for group in groups.values()]


def with_settings(name: str, settings: Iterable[tuple[str, Any]]) -> str:
    """A name with the settings that a sweep varies, in brackets: "gptq[damping_fraction=0.1]"; the name itself without any.

    settings: (dotted name, value) pairs; the last word of a dotted name is shown.
    """
    varied = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in settings)
    return f"{name}[{varied}]" if varied else name


def without_settings(name: str) -> str:
    """The inverse of `with_settings`: the name of the configuration, without the settings that a sweep varies."""
    return name.partition("[")[0]


def baseline_title(dtype: str, bits: str) -> str:
    """What papers call the unquantized model: "FP16", "BF16" or "FP32"; "Full precision" for weights of another width.

    dtype  of the model's computation; bits  of its weights as stored, as tables print them
    """
    if bits == "16":
        return "BF16" if dtype == "bfloat16" else "FP16"
    return "FP32" if bits == "32" else "Full precision"


def method_title(name: str, titles: Mapping[str, str]) -> str:
    """What papers call a method of ours: "SliM-LLM" for slim_llm, "AWQ [rounding: …]" keeps the settings that a sweep varies.

    titles: names of methods and what they are called; a name that has no title stays as it is.
    """
    plain = without_settings(name)
    return titles.get(plain, plain) + name.removeprefix(plain)


def bits_text(cell: Cell) -> str:
    """ "4", "1.1", "W4A8", "W4A8KV4", "4 nf4", "4 2:4", "16 50 %"; for a baseline the width of its dtype."""
    scheme = cell.scheme
    bits = f"{BITS_OF_DTYPE.get(cell.model.dtype, 16) if not cell.method.quantizes else scheme.weight.bits:g}"
    family = (
        ""
        if not cell.method.quantizes or scheme.weight.format == "int"
        else f" {scheme.weight.format}"
    )
    activation = f"A{scheme.activation.bits}" if scheme.activation else ""
    kv = scheme.kv.text if scheme.kv else ""
    if scheme.weight.sparsity and cell.method.quantizes:  # "16 2:4": dense says nothing then
        family = f"{family.removesuffix(' dense')} {sparsity_text(scheme.weight.sparsity)}"
    return f"W{bits}{activation}{kv}{family}" if activation or kv else f"{bits}{family}"


def group_text(cell: Cell) -> str:
    """Input channels per scale; "row" for one scale per output channel."""
    if not cell.method.quantizes:
        return ""
    return "row" if cell.scheme.weight.group_size == -1 else str(cell.scheme.weight.group_size)


def flatten(cell: Cell) -> dict[str, Any]:
    """The cell as flat names: {"model.name": …, "rounding.name": …, "rounding.damping_fraction": …, "scheme.weight.bits": …}."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                walk(f"{prefix}.{name}" if prefix else name, item)
        elif value is not None and value != []:
            flat[prefix] = value

    content = to_json(cell)
    method = content.pop("method")
    content.pop("evaluations")
    content.pop("variant")
    walk("", {**content, "method": {"name": method["name"]}})
    for slot in ("reduction", "transform", "rounding", "tuning"):
        if method.get(slot) is not None:
            part = {
                "name": method[slot]["name"],
                "version": method[slot]["version"],
                **method[slot]["settings"],
            }
            walk(slot, part)
    return flat


def _grouped(cells: Sequence[Cell], of: Callable[[Cell], tuple[str, ...]]) -> list[dict[str, Cell]]:
    groups: dict[Any, dict[str, Cell]] = {}
    for cell in cells:
        groups.setdefault(of(cell), {})[cell_key(cell)] = cell
    return list(groups.values())


def _scheme_text(cell: Cell, by_name: bool) -> tuple[str, ...]:
    return (cell.scheme.name,) if by_name else (bits_text(cell), group_text(cell))


def _shown(cell: Cell) -> dict[str, Any]:
    """The fields that may distinguish a cell.

    The seed of the calibration windows is among them only if it is not the cell's own seed; the cell's seed and inputs only if the
    cell depends on them.
    """
    flat = {name: value for name, value in flatten(cell).items() if name not in HIDDEN}
    if cell.calibration is not None and cell.calibration.seed == cell.seed:
        flat.pop("calibration.seed")
    method = cell.method
    parts = (*method.parts, *((method.reduction,) if method.reduction is not None else ()))
    if cell.calibration is None and not any(part.stochastic for part in parts):
        flat.pop("seed")
    if cell.calibration is None or not cell.method.uses_calibration:
        flat.pop("inputs")
    return flat


def _varying(facts: Sequence[Mapping[str, Any]], only: Sequence[str] = ()) -> list[str]:
    """Names whose values differ. A part's name replaces its fields where it distinguishes as much as they do."""
    names = sorted(
        {name for each in facts for name in each if not only or name.partition(".")[0] in only}
    )
    differing = [name for name in names if len({str(each.get(name)) for each in facts}) > 1]
    for part in ("calibration", "rounding", "transform", "tuning", "reduction"):
        fields = [
            name
            for name in differing
            if name.startswith(f"{part}.") and name not in (f"{part}.name", f"{part}.seed")
        ]
        together = {
            tuple(str(each.get(name)) for name in (f"{part}.name", *fields)) for each in facts
        }
        if f"{part}.name" in differing and len(together) == len(
            {str(each.get(f"{part}.name")) for each in facts}
        ):
            differing = [name for name in differing if name not in fields]
    return differing


def _short(name: str) -> str:
    return name.removeprefix("scheme.").removeprefix("weight.").removesuffix(".name")
