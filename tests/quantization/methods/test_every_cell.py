"""No cell fails at run time for a reason that the plan could have known: methods × schemes × families.

The whole product is asked what it accepts, from config.json alone. Of what is accepted, a covering part is run: on Llama every
method and every scheme. `python tests/support/every_cell.py` runs all of it, on every family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import every_cell
import pytest

from harness.core import plugins
from harness.core.cell import Cell, Part, Scheme, to_json
from harness.core.shapes import Shapes
from harness.data.demo.tiny import TINY
from harness.quantization.methods.checks import check_sparsity
from harness.quantization.models import config_by_block, family_of, read_config
from harness.quantization.models import shapes as shapes_of

# every method must have a scheme that it accepts on these, except the pairs in REFUSED
OF_THE_STUDIES = ("llama", "mistral", "qwen2", "qwen3")
REFUSED = {
    ("qwen3", "omniquant_wa"),  # norms between queries and keys let no learned scale through
    *((family, method) for family in OF_THE_STUDIES for method in ("reap", "reap_rtn")),  # dense
    *((family, "l0_target_shape") for family in OF_THE_STUDIES),  # its shape must be stated
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of each family, built when it is first asked for."""
    from harness.data.demo.tiny import build

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            build(family, path, num_hidden_layers=2)
            made[family] = path
        return made[family]

    return folder


@pytest.fixture(scope="module")
def on_llama(folders: Callable[[str], Path]) -> list[Cell]:
    return every_cell.product(folders("llama"))


def reduced(cell: Cell, folder: Path, shapes: Shapes) -> Shapes | None:
    """Shapes of the model that a cell quantizes; None where its reduction refuses the model."""
    part = cell.method.reduction
    if part is None:
        return shapes
    reduction = plugins.build("reduction", part.name, to_json(part)["settings"])
    config = config_by_block(read_config(folder))
    if reduction.check(shapes, config):
        return None
    smaller = reduction.config(config)
    return family_of(smaller).shapes(smaller)


def accepts(cell: Cell, shapes: Shapes, built: dict[tuple[str, Part], object]) -> bool:
    """What the parts of a cell's method answer for a model of these shapes; their answers must be reasons, and said once."""
    accepted = True
    for kind in ("transform", "rounding", "tuning"):
        part = getattr(cell.method, kind)
        if part is None:
            continue
        if (kind, part) not in built:
            built[kind, part] = plugins.build(kind, part.name, to_json(part)["settings"])
        reasons = built[kind, part].check(cell.scheme, shapes)  # type: ignore[attr-defined]
        if kind == "rounding":
            prunes = bool(plugins.facts(kind, part.name).get("prunes", False))
            reasons = [*reasons, *check_sparsity(part.name, prunes, cell.scheme, shapes)]
        assert all(isinstance(reason, str) and reason for reason in reasons) and len(
            set(reasons)
        ) == len(reasons), cell.title
        accepted = accepted and not reasons
    return accepted


def test_every_method_answers_for_every_scheme_on_every_family(
    folders: Callable[[str], Path], on_llama: list[Cell]
) -> None:
    built: dict[tuple[str, Part], object] = {}
    questions: dict[tuple[object, ...], Cell] = {}
    for cell in on_llama:
        scheme: Scheme = dataclasses.replace(cell.scheme, name="")
        questions.setdefault((cell.method, scheme), cell)
    methods = set(every_cell.names("methods", "none"))
    for family in TINY:
        folder = folders(family)
        shapes = shapes_of(folder)
        first = {cell.method.reduction: cell for cell in questions.values()}
        smaller = {part: reduced(cell, folder, shapes) for part, cell in first.items()}
        served = {
            cell.method.name.partition("[")[0]
            for cell in questions.values()
            if (own := smaller[cell.method.reduction]) is not None and accepts(cell, own, built)
        }
        if family in OF_THE_STUDIES:
            assert {(family, method) for method in methods - served} <= REFUSED
        assert {"rtn", "gptq"} <= served, family


def test_methods_of_differences_are_refused_without_a_base(on_llama: list[Cell]) -> None:
    ask = every_cell.checker()
    asked: dict[str, list[str]] = {}
    for cell in on_llama:
        if cell.method.needs_base and not ask.reasons(cell):
            bare = dataclasses.replace(cell.model, base="", base_digest="")
            asked.setdefault(cell.method.name, ask.reasons(dataclasses.replace(cell, model=bare)))
    assert len(asked) >= 6
    assert all("set model.base=" in " ".join(reasons) for reasons in asked.values())


def covering(cells: list[Cell], methods: list[str] | None) -> list[Cell]:
    """One accepted cell for each of these methods; for all methods (None), every scheme that any of them accepts too."""
    ask = every_cell.checker()
    chosen: list[Cell] = []
    schemes: set[str] = set()
    wanted = (
        {cell.method.name.partition("[")[0] for cell in cells} if methods is None else set(methods)
    )
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        name = cell.method.name.partition("[")[0]
        if name in wanted and (methods is None or name not in by_method) and not ask.reasons(cell):
            by_method.setdefault(name, []).append(cell)
    # those that accept least choose first
    for name in sorted(by_method, key=lambda name: len(by_method[name])):
        new = [cell for cell in by_method[name] if cell.scheme.name not in schemes]
        chosen.append((new or by_method[name])[0])
        schemes.add(chosen[-1].scheme.name)
    for cell in (cell for cells in by_method.values() for cell in cells):
        if methods is None and cell.scheme.name not in schemes:
            chosen.append(cell)
            schemes.add(cell.scheme.name)
    return chosen


def test_every_method_and_every_scheme_run_on_llama(
    folders: Callable[[str], Path], on_llama: list[Cell], tmp_path: Path
) -> None:
    chosen = covering(on_llama, None)
    refused = [method for family, method in REFUSED if family == "llama"]
    assert {cell.method.name.partition("[")[0] for cell in chosen} == set(
        every_cell.names("methods", "none", *refused)
    )
    assert list(every_cell.failures(chosen, folders("llama"), tmp_path / "runs")) == []
