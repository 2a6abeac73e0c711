"""Bit budgets in the plan: what is left to do for each, and every reason why one cannot be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.core import plugins
from harness.core.budget import MEASURED, Budget
from harness.core.cell import Cell, holds_all_widths, quantize_key, to_json
from harness.core.errors import HarnessError
from harness.core.sweep import Sweep
from harness.planning.allocation import (
    Matrix,
    costs_of,
    groups_of,
    interval,
    matrices_in,
    matrices_of,
    misfit,
)
from harness.planning.checks import Checker
from harness.planning.estimates import matrix_bits
from harness.planning.plan import Allocation
from harness.storage.budgets import outcome
from harness.storage.store import Store

if TYPE_CHECKING:
    from harness.core.shapes import Shapes

MANY_GROUPS = 2000  # from which on a proposal by divergence takes hours
UNSURE = 0.25  # share by which bits that no checkpoint tells yet may be off


def allocations_of(
    sweep: Sweep, store: Store, checker: Checker
) -> tuple[tuple[Allocation, ...], list[str], list[str]]:
    """The sweep's budgets, the reasons for which some cannot be kept, and advice on others."""
    made: list[Allocation] = []
    faults: list[str] = []
    advice: list[str] = []
    for budget in sweep.budgets:
        shapes = checker.shapes(budget.candidates[0].model)
        if shapes is None:  # a refusal of its cells
            continue
        groups = groups_of(
            matrices_of(shapes.linears, shapes.blocks), shapes.linears, budget.together
        )
        manifests = [store.manifest(quantize_key(cell)) for cell in budget.candidates]
        reasons = [*refusals(budget, shapes), *_size_reasons(budget, shapes, groups, manifests)]
        faults += [f"budget {budget.name}: {reason}" for reason in reasons]
        if len(groups) > MANY_GROUPS and "kl" in budget.propose:
            advice.append(
                f"budget {budget.name}: {len(groups)} groups are measured one by one for the proposal kl; together=serving or "
                "propose: [output_error] takes less time"
            )
        left = tuple(s for s in budget.sizes if outcome(store, sweep.name, budget, s) is None)
        unmade = sum(manifest is None for manifest in manifests)
        made.append(Allocation(budget, len(groups), left, unmade))
    return tuple(made), faults, advice


def refusals(budget: Budget, shapes: Shapes) -> list[str]:
    """Why the candidates of a budget cannot be mixed, or its tables not be made, whatever its sizes."""
    from harness.quantization.pipeline.assembly import is_exact, is_scheme_independent

    cells, first = budget.candidates, budget.candidates[0]
    unrounded = [cell.title for cell in cells if cell.method.rounding is None]
    if unrounded:
        return [f"{', '.join(unrounded)} round no weights, so there is nothing to mix"]
    reduced = dict.fromkeys(cell.method.name for cell in cells if cell.method.reduction is not None)
    if reduced:
        return [
            f"{', '.join(reduced)} makes a smaller model first; mix cells of that model instead"
        ]
    deltas = dict.fromkeys(cell.method.name for cell in cells if cell.method.needs_base)
    if deltas:
        return [
            f"{', '.join(deltas)} stores differences from a base model, which a budget does not measure"
        ]
    nested = dict.fromkeys(cell.method.name for cell in cells if holds_all_widths(cell.method))
    if nested:
        return [
            f"{', '.join(nested)} stores all widths in one checkpoint, so that a narrower matrix saves nothing; use a method "
            "that stores each width alone"
        ]
    try:
        exact = all(map(is_exact, cells))
        whole = [cell for cell in cells if _by_block(cell)]
    except HarnessError:  # a refusal of the cells
        return []
    reasons = []
    names = dict.fromkeys(cell.method.name for cell in cells)
    if len({cell.method.rounding for cell in cells}) > 1 and not exact:
        reasons.append(
            f"candidates differ in their rounding ({', '.join(names)}); that takes inputs: full_precision, and roundings that work "
            "linear by linear, not sequential"
        )
    transform = first.method.transform
    if transform is not None:
        if not is_scheme_independent(first) and hasattr(
            plugins.load("transform", transform.name), "rewrite_ends"
        ):
            reasons.append(
                f"transform {transform.name} rewrites embeddings and head differently for each scheme, so that blocks of one "
                "candidate do not fit those of another"
            )
        elif not exact and budget.together != "block":
            reasons.append(
                f"transform {transform.name} changes a block differently for each candidate, so that its matrices belong "
                "together; use together: block"
            )
        if "fisher" in budget.propose:
            reasons.append(
                f"propose fisher: squared gradients belong to the original weights, which transform {transform.name} changes"
            )
    if whole and budget.together != "block":
        listed = ", ".join(dict.fromkeys(cell.method.name for cell in whole))
        reasons.append(
            f"{listed} rounds the matrices of a block for each other; use together: block"
        )
    without = dict.fromkeys(c.method.name for c in cells if "hessian" not in c.method.needs)
    if "output_error" in budget.propose and without:
        reasons.append(
            f"propose output_error: {', '.join(without)} reads no Hessian, so its checkpoint has no output errors; leave it out"
        )
    if not budget.propose:
        reasons.append("propose: at least one of output_error, fisher and kl is expected")
    if budget.measures:
        why = (
            "trials"
            if budget.trials
            else f"propose {', '.join(set(budget.propose) & set(MEASURED))}"
        )
        if budget.calibration is None:
            reasons.append(
                f"assemblies are measured on calibration windows ({why}), and there are none; add calibration to `of`"
            )
        elif budget.calibration.samples < budget.windows:
            reasons.append(
                f"windows {budget.windows}: calibration {budget.calibration.name} has {budget.calibration.samples}; set windows to "
                "that or less"
            )
    if not first.evaluations and budget.floor:
        reasons.append(
            "the comparison with the uniform cell needs an evaluation; add one to `evaluations`, or set floor: false"
        )
    return reasons


def _by_block(cell: Cell) -> bool:
    part = cell.method.rounding
    assert part is not None
    rounding = plugins.build("rounding", part.name, to_json(part)["settings"])
    return hasattr(rounding, "round_block")


def _size_reasons(
    budget: Budget,
    shapes: Shapes,
    groups: Sequence[Sequence[Matrix]],
    manifests: Sequence[dict[str, Any] | None],
) -> list[str]:
    """Sizes that no assembly has; estimated from shapes, with some doubt, while checkpoints are missing."""
    linears = {linear.name: linear for linear in shapes.linears}
    costs, weights = [], 0
    for members in groups:
        costs.append([0] * len(budget.candidates))
        for block, name in members:
            linear = linears[name]
            weights += linear.out_features * linear.in_features
            for candidate, cell in enumerate(budget.candidates):
                scheme = cell.scheme.weight_for(block, name)
                costs[-1][candidate] += int(matrix_bits(linear, scheme))
    known = [manifest for manifest in manifests if manifest is not None]
    if len(known) == len(manifests):
        held = groups_of(matrices_in(known[0]), shapes.linears, budget.together)
        costs, numbers = costs_of(held, known)
        return [
            f"{size.label} is {reason}"
            for size in budget.sizes
            if (reason := misfit(size.limit(sum(numbers)), costs, sum(numbers)))
        ]
    low, high = interval(costs)
    return [
        f"{size.label} is {misfit(size.limit(weights), costs, weights)} (estimated)"
        for size in budget.sizes
        if not low / (1 + UNSURE) <= size.limit(weights) <= high * (1 + UNSURE)
    ]
