"""A plan, and its refusals, as text."""

from __future__ import annotations

import collections
import re
import shlex
from collections.abc import Sequence

from harness.core.cell import Cell, cell_key
from harness.core.errors import PlanError
from harness.core.sweep import Runtime, command_line
from harness.core.text import short_list
from harness.core.units import counted, duration, size
from harness.data import hub
from harness.planning.plan import Allocation, Pass, Plan, Refusal
from harness.planning.resources import quota_bytes

PART = re.compile(
    r"(reduction|transform|rounding|tuning) (\S+): (.*)"
)  # a reason of one part of a method
SHOWN_CELLS = 8  # titles in a line of refusals
SHOWN_PASSES = 12  # of a plan; more are summed up by model


def require(plan: Plan) -> None:
    """Raise PlanError with every refusal at once, unless all cells can run."""
    if plan.refused or plan.problems:
        raise PlanError(render_refusals(plan))


def render(plan: Plan) -> str:
    """The plan as text: one line of counts, one line per pass and per model to evaluate, then costs and places."""
    sweep, runtime = plan.sweep, plan.sweep.runtime
    todo = f"{len(plan.missing)} to do" if plan.missing else "nothing to do"
    head = [f"{counted(len(sweep.cells), 'cell')}", f"{len(plan.done)} done", todo]
    if plan.refused:
        head.append(f"{len(plan.refused)} refused")
    if sweep.skips:
        head.append(f"{sum(len(skip.titles) for skip in sweep.skips)} skipped")
    lines = [f"plan    {' · '.join(head)}"]
    lines += _pass_lines(plan.passes)
    for scoring in plan.scorings:
        cost = f"{duration(scoring.seconds)} · {size(scoring.peak_memory_bytes)} of memory"
        cells = counted(len(scoring.cells), "cell")
        gpus = f" on {scoring.devices} GPUs each" if scoring.devices > 1 else ""
        lines.append(
            f"score   {scoring.cells[0].model.name}   {counted(scoring.count, 'evaluation')} of {cells}{gpus}   {cost}"
        )
    lines += [_allocation(each) for each in plan.allocations]
    keys = set(map(cell_key, sweep.cells)) if sweep.first else set()
    shared = sum(len(each.cells) - len(each.checkpoints) for each in plan.passes)
    if shared:
        lines.append(
            f"        {counted(shared, 'cell')} use the checkpoint of another cell "
            "(they differ only in activation or KV bits, or in the width that they read)"
        )
    tiers = collections.Counter(sweep.priority_tier(cell_key(cell)) for cell in plan.missing)
    for priority_tier, entry in enumerate(sweep.first):
        fits = (
            f"{counted(tiers[priority_tier], 'cell')} to do"
            if entry.keys & keys
            else "matches no cell of this run"
        )
        lines.append(f"first   {priority_tier + 1}. {entry.text}: {fits}")
    lines += [f"note    {note}" for note in plan.notes]
    lines += [f"skip    {len(skip.titles)} × {skip.reason}" for skip in sweep.skips]
    where = f"{counted(plan.workers, 'worker')} on this machine"
    if runtime.cluster.address:
        where = f"{runtime.cluster.address}, {plan.workers} worker slots assumed; passes are cut for the slots that it has"
    lines.append(f"        {where} · results in {runtime.runs} · tracking {_tracking(runtime)}")
    if plan.passes and (quota := quota_bytes(runtime)) is not None:
        left = max(0, quota - plan.used_bytes)
        lines.append(
            f"        about {size(plan.disk_bytes)} to write · {size(left)} left of the quota of {size(quota)}"
        )
    if (plan.passes or plan.scorings) and plan.seconds is not None:
        lines.append(
            f"        about {duration(plan.seconds)[2:]} on these workers, start-up excluded"
        )
    return "\n".join(lines)


def _pass_lines(passes: Sequence[Pass]) -> list[str]:
    """One line per pass; where there are many, one per model."""
    if len(passes) <= SHOWN_PASSES:
        return [
            f"pass {number:<3}{each.cells[0].model.name}   "
            f"{counted(len(each.checkpoints), 'checkpoint')}: {each.sharing}   "
            f"{_cost(each.seconds, each.peak_memory_bytes)} · {size(each.disk_bytes)} of disk"
            for number, each in enumerate(passes, start=1)
        ]
    by_model: dict[str, list[Pass]] = {}
    for each in passes:
        by_model.setdefault(each.cells[0].model.name, []).append(each)
    lines = []
    for model, several in by_model.items():
        checkpoints = sum(len(each.checkpoints) for each in several)
        known = [each.seconds for each in several]
        seconds = None if None in known else sum(filter(None, known))
        memory = max(each.peak_memory_bytes for each in several)
        disk = size(sum(each.disk_bytes for each in several))
        lines.append(
            f"passes  {model}   {len(several)} with {counted(checkpoints, 'checkpoint')}   "
            f"{_cost(seconds, memory)} · {disk} of disk"
        )
    return lines


def _cost(seconds: float | None, memory: int) -> str:
    return f"{duration(seconds)} · {size(memory)} of memory"


def render_refusals(plan: Plan) -> str:
    """Every refusal at once, each reason with the cells that it concerns, then the ways out."""
    lines = []
    sweep = plan.sweep
    if plan.refused:
        count = f"{len(plan.refused)} of {counted(len(sweep.cells), 'cell')}"
        lines += [f"{count} cannot run. Nothing was started.", ""]
        for cells, reasons in _grouped(plan.refused):
            lines.append(f"  {_cells_in_words(cells, sweep.cells)}:")
            lines += [f"    {reason}" for reason in reasons]
        lines += ["", *_ways_out(plan)]
    if plan.problems:
        lines += ["" if plan.refused else "The sweep cannot run. Nothing was started."]
        lines += [f"  {problem}" for problem in plan.problems]
    return "\n".join(lines)


def _grouped(refused: Sequence[Refusal]) -> list[tuple[list[Cell], list[str]]]:
    """Reasons with the cells that they concern; reasons of the same cells together, and parts with one reason as one."""
    cells: dict[tuple[str, str], dict[int, Cell]] = {}  # (kind of part, reason) -> cells
    parts: dict[tuple[str, str], dict[str, None]] = {}
    for refusal in refused:
        for reason in refusal.reasons:
            found = PART.fullmatch(reason)
            kind, name, text = found.groups() if found else ("", "", reason)
            cells.setdefault((kind, text), {})[id(refusal.cell)] = refusal.cell
            parts.setdefault((kind, text), {})[name] = None
    groups: dict[tuple[int, ...], list[str]] = {}
    for (kind, text), concerned in cells.items():
        names = ", ".join(parts[kind, text])
        groups.setdefault(tuple(concerned), []).append(f"{kind} {names}: {text}" if kind else text)
    known = {id(refusal.cell): refusal.cell for refusal in refused}
    return [([known[each] for each in ids], reasons) for ids, reasons in groups.items()]


def _cells_in_words(cells: Sequence[Cell], all_cells: Sequence[Cell]) -> str:
    """Which cells these are: all, all of one model, method, scheme or calibration, or by their titles."""
    if len(cells) == 1:
        return cells[0].title
    if len(cells) == len(all_cells):
        return f"all {len(cells)} cells"
    quantized = [cell for cell in all_cells if not cell.method.is_baseline]
    if {id(cell) for cell in cells} == {id(cell) for cell in quantized}:
        return f"all {len(cells)} quantized cells"
    for axis in ("model", "scheme", "method", "calibration"):
        values = list(dict.fromkeys(getattr(getattr(cell, axis), "name", "") for cell in cells))
        concerned = [c for c in all_cells if getattr(getattr(c, axis), "name", "") in values]
        if len(concerned) == len(cells) and all(values) and len(values) <= 4:
            return f"all {len(cells)} cells of {axis} {', '.join(values)}"
    return f"{len(cells)} cells ({short_list([cell.title for cell in cells], SHOWN_CELLS)})"


def _ways_out(plan: Plan) -> list[str]:
    """What to do about refused cells, with commands to copy."""
    sweep = plan.sweep
    offline = [all(map(hub.needs_network, refusal.reasons)) for refusal in plan.refused]
    lines = []
    if any(offline):
        pull = command_line(sweep, "data pull").replace("'data pull'", "data pull")
        lines += [
            f"{'Only data' if all(offline) else 'Data'} of the hub are missing. On a machine with network access:",
            f"  {pull} --output bundle",
            "then, with the folder copied here:",
            f"  {command_line(sweep)} data.root=bundle",
        ]
    if not all(offline):
        typed = " ".join(shlex.quote(word) for word in sweep.overrides)
        change = [f"the overrides ({typed})"] if typed else []
        change += [str(sweep.path)] if sweep.path is not None else []
        leave = ", or add the cells to the file's `skip:` list" if sweep.path is not None else ""
        lines.append(f"Change {' or '.join(change)}{leave}.")
    return lines


def _allocation(each: Allocation) -> str:
    """What a bit budget will do."""
    budget, count = each.budget, len(each.budget.candidates)
    words = [
        f"{counted(count, 'candidate')} ({count - each.unmade} done, {each.unmade} to make)",
        counted(each.groups, "group"),
    ]
    if budget.trials:
        windows = counted(budget.windows, "window")
        words.append(f"measures ≤ {counted(budget.trials, 'assembly')} of {windows} for each size")
    elif budget.measures:
        words.append("measures its proposals, not the result")
    else:
        words.append("measures nothing")
    cells = f"{len(each.open)} of {counted(len(budget.sizes), 'cell')} known after the measurement"
    words.append(cells if each.open else f"{counted(len(budget.sizes), 'cell')} known")
    return f"budget  {budget.name}   {' · '.join(words)}"


def _tracking(runtime: Runtime) -> str:
    tracking = runtime.tracking
    return tracking.uri or {"sqlite": "mlflow.db", "none": "off"}.get(tracking.kind, tracking.kind)
