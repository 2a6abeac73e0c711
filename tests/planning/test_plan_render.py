"""A plan as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from executions import plan_of

from harness.core.sweep import Sweep
from harness.planning.plan import Plan, Refusal
from harness.planning.render import render, render_refusals

Make = Callable[..., Sweep]


def test_the_text_names_counts_places_and_skips(demo_sweep: Make) -> None:
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4,w3", "evaluations=demo_perplexity"))
    text = render(plan)
    assert text.startswith("plan    3 cells · 0 done · 3 to do")
    assert "3 checkpoints" in text and "3 evaluations of 3 cells" in text and "runs" in text


def refused(sweep: Sweep, *reasons: tuple[str, ...]) -> str:
    """The refusals of a sweep whose n-th cell has the n-th reasons."""
    pairs = zip(sweep.cells, reasons, strict=True)
    found = tuple(Refusal(cell, each) for cell, each in pairs if each)
    return render_refusals(Plan(sweep, (), (), found, (), (), (), 1))


def test_reasons_are_grouped_by_the_cells_that_they_concern(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn,gptq", "scheme=w4,w3")
    text = refused(sweep, *[("evaluation e: too long", "evaluation f: no data")] * 5)
    assert text.count("too long") == 1 and "  all 5 cells:\n    evaluation e" in text
    quantized = [(), *[(f"rounding {cell.method.name}: odd",) for cell in sweep.cells[1:]]]
    text = refused(sweep, *quantized)
    assert "  all 4 quantized cells:\n    rounding rtn, gptq: odd\n" in text
    some = [("bits",) if cell.scheme.name == "w3" else () for cell in sweep.cells]
    assert "  all 2 cells of scheme w3:\n    bits" in refused(sweep, *some)
    text = refused(sweep, (), ("a",), ("b",), (), ())
    assert "demo · rtn · w4:\n    a" in text and "demo · rtn · w3:\n    b" in text
    assert "method=rtn,gptq scheme=w4,w3" in text.splitlines()[-1]


def test_where_only_the_network_is_missing_the_way_is_data_pull(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4")
    reason = (
        "evaluation e: the data set a/b is not in the local cache, and the hub cannot be reached"
    )
    text = refused(sweep, (reason,), (reason,))
    assert "Only data of the hub are missing" in text and "Change" not in text
    assert "  harness data pull model=demo" in text and "--output bundle\n" in text
    assert text.splitlines()[-1].endswith("data.root=bundle")
    assert "Data of the hub" in refused(sweep, (reason,), ("odd",))


def test_many_passes_are_summed_up(demo_sweep: Make) -> None:
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_perplexity"))
    many = dataclasses.replace(plan, passes=plan.passes * 20)
    lines = render(many).splitlines()
    (line,) = [line for line in lines if line.startswith("passes")]
    assert line.startswith(f"passes  demo   {len(many.passes)} with ") and len(lines) < 8
