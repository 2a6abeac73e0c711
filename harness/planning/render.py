"""A plan, and its refusals, as text."""

from __future__ import annotations

import collections

from harness.core.cell import cell_key
from harness.core.errors import PlanError
from harness.core.sweep import Runtime
from harness.core.units import counted, duration, size
from harness.planning.plan import Allocation, Plan
from harness.planning.resources import quota_bytes


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
    for number, each in enumerate(plan.passes, start=1):
        cost = f"{duration(each.seconds)} · {size(each.peak_memory_bytes)} of memory · {size(each.disk_bytes)} of disk"
        made = f"{counted(len(each.checkpoints), 'checkpoint')}: {each.sharing}"
        lines.append(f"pass {number:<3}{each.cells[0].model.name}   {made}   {cost}")
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
            f"        {counted(shared, 'cell')} use the checkpoint of another cell (they differ only in activation or KV bits)"
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
    if plan.missing and plan.seconds is not None:
        lines.append(
            f"        about {duration(plan.seconds)[2:]} on these workers, start-up excluded"
        )
    return "\n".join(lines)


def render_refusals(plan: Plan) -> str:
    """Every refusal at once, then the ways out."""
    lines = []
    if plan.refused:
        lines += [
            f"{len(plan.refused)} of {counted(len(plan.sweep.cells), 'cell')} cannot run. Nothing was started.",
            "",
        ]
        width = max(len(refusal.cell.title) for refusal in plan.refused)
        for refusal in plan.refused:
            for index, reason in enumerate(refusal.reasons):
                lines.append(f"  {refusal.cell.title if index == 0 else '':<{width}}  {reason}")
        where = plan.sweep.path or "the overrides"
        lines += ["", f"Change these in {where}, or add the cells to its `skip:` list."]
    if plan.problems:
        lines += ["" if plan.refused else "The sweep cannot run. Nothing was started."]
        lines += [f"  {problem}" for problem in plan.problems]
    return "\n".join(lines)


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
