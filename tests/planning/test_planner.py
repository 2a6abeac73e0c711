"""Plans: every reason at once, nothing repeated, work that can be shared kept together, a thousand cells in seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.cell import Cell, cell_key, quantize_key, score_key
from harness.core.errors import ConfigError, PlanError
from harness.core.sweep import Cluster, Sweep
from harness.core.units import size
from harness.planning import resources
from harness.planning.estimates import checkpoint_bytes, pass_memory, quantize_flops
from harness.planning.plan import Plan
from harness.planning.planner import make
from harness.planning.render import render, require
from harness.planning.resources import count_workers
from harness.storage.files import LocalDisk, free_disk
from harness.storage.store import Store

Make = Callable[..., Sweep]


def plan_of(sweep: Sweep) -> Plan:
    return make(sweep, Store(sweep.runtime.runs))


def test_everything_is_to_do_in_an_empty_store(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn,gptq", "scheme=w4,w3", "evaluations=demo_perplexity")
    plan = plan_of(sweep)
    assert not plan.done and not plan.refused and not plan.problems
    assert plan.missing == sweep.cells
    assert plan.checkpoints == len(sweep.cells) == 5  # with the baseline
    assert plan.evaluations == 5
    made = [quantize_key(cell) for each in plan.passes for cell in each.cells]
    assert sorted(made) == sorted(map(quantize_key, sweep.cells))


def test_planning_starts_nothing(demo_sweep: Make, tmp_path: Path) -> None:
    plan_of(demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_perplexity"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_in_the_store_is_done(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", "evaluations=demo_perplexity")
    store = Store(sweep.runtime.runs)
    for cell in sweep.cells:
        store.open_cell(cell)
        folder = store.checkpoint_folder(quantize_key(cell))
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"seconds": 2.0}')
    scored = sweep.cells[-1]
    store.write_score(
        cell_key(scored),
        score_key(scored, scored.evaluations[0]),
        {"metrics": {"demo_perplexity/perplexity": 2.0}},
    )
    plan = make(sweep, store)
    assert plan.done == (scored,)
    assert not plan.passes  # checkpoints are there: an evaluation runs alone
    assert plan.evaluations == len(sweep.cells) - 1


def test_all_reasons_are_given_at_once(demo_sweep: Make) -> None:
    plan = plan_of(
        demo_sweep("method=rtn,gptq", "scheme=w4g96,w3g40,w4", "evaluations=demo_perplexity")
    )
    assert {refusal.cell.scheme.name for refusal in plan.refused} == {"w4g96", "w3g40"}
    assert len(plan.refused) == 4
    with pytest.raises(PlanError) as caught:
        require(plan)
    text = str(caught.value)
    for words in (
        "4 of 7 cells cannot run",
        "Nothing was started",
        "group size 96",
        "group size 40",
        "q_proj",
        "skip:",
    ):
        assert words in text
    assert caught.value.exit_code == 3


def test_a_wrong_group_is_said_once(demo_sweep: Make) -> None:
    (refusal,) = plan_of(demo_sweep("method=rtn", "scheme=w4g96")).refused
    assert sum("group size" in reason for reason in refusal.reasons) == 1


def test_blocks_that_cross_rows_need_not_divide_them(demo_sweep: Make) -> None:
    """down_proj of the demo has rows of 160 weights; NF4's blocks of 64 run over the flattened matrix, as in bitsandbytes."""
    plan = plan_of(
        demo_sweep("method=nf4,ir_qlora_untuned", "scheme=nf4g64", "evaluations=demo_perplexity")
    )
    assert not plan.refused and len(plan.missing) == 3
    assert plan_of(demo_sweep("method=rtn", "scheme=nf4g64", "evaluations=demo_perplexity")).refused


def test_an_unreadable_model_is_a_reason(demo_sweep: Make, tmp_path: Path) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["LlamaForCausalLN"]}')
    (broken / "x.safetensors").write_bytes(b"")
    cells = tuple(
        dataclasses.replace(c, model=dataclasses.replace(c.model, source=str(broken), digest="0"))
        for c in sweep.cells
    )
    plan = plan_of(dataclasses.replace(sweep, cells=cells))
    assert len(plan.refused) == len(cells)
    assert all("LlamaForCausal" in " ".join(refusal.reasons) for refusal in plan.refused)


def test_missing_calibration_data_is_a_reason(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4")
    cells = []
    for cell in sweep.cells:
        if cell.calibration is not None:
            cell = dataclasses.replace(
                cell, calibration=dataclasses.replace(cell.calibration, source="/nowhere/at/all")
            )
        cells.append(cell)
    (refusal,) = plan_of(dataclasses.replace(sweep, cells=tuple(cells))).refused
    assert "/nowhere/at/all" in refusal.reasons[0]


def test_a_model_too_large_for_this_machine_is_a_reason(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 1000)
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4"))
    assert all("to evaluate" in refusal.reasons[0] for refusal in plan.refused) and plan.refused


def test_a_model_too_large_for_one_gpu_takes_several(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_perplexity", "device=auto")
    need, cards = plan_of(sweep).scorings[0].peak_memory_bytes, [4]
    monkeypatch.setattr(resources, "count_gpus", lambda: cards[0])
    monkeypatch.setattr(
        resources,
        "free_memory",
        lambda runtime: (int(need * free / resources.MEMORY_SHARE) + 1, "the GPU"),
    )
    for free, devices in (
        (1.0, 1),
        (0.9, 2),
        (0.55, 3),
    ):  # a quarter of the blocks beside each share
        assert [each.devices for each in plan_of(sweep).scorings] == [devices], free
    cards[0] = 2
    (reason,) = {refusal.reasons[0] for refusal in plan_of(sweep).refused}
    assert "as float32 to evaluate: 3 GPUs; this machine has 2 GPUs" in reason
    measured = demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_efficiency", "device=auto")
    cards[0] = 4
    assert (
        all("measures one GPU" in refusal.reasons[0] for refusal in plan_of(measured).refused)
        and plan_of(measured).refused
    )
    elsewhere = Cluster(
        "ray",
        address="10.0.0.1:6379",
        gpu_memory=f"{need * 0.9 / resources.MEMORY_SHARE / 1e6:.3f}MB",
    )
    plan = plan_of(
        dataclasses.replace(sweep, runtime=dataclasses.replace(sweep.runtime, cluster=elsewhere))
    )
    assert [each.devices for each in plan.scorings] == [2]


def test_too_small_a_disk_is_a_problem_of_the_sweep(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalDisk, "free_bytes", lambda self, root: 10)
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4"))
    assert "larger disk" in plan.problems[0]
    with pytest.raises(PlanError, match="larger disk"):
        require(plan)


def test_cells_of_one_checkpoint_share_it(demo_sweep: Make) -> None:
    """Activation bits are executed, not stored: RTN at w8 and w8a8 has one checkpoint."""
    plan = plan_of(demo_sweep("method=rtn", "scheme=w8,w8a8", "evaluations=demo_perplexity"))
    assert plan.checkpoints == 2  # with the baseline
    assert sum(len(each.cells) for each in plan.passes) == 3
    assert "use the checkpoint of another" in render(plan)


def test_data_free_and_calibrated_cells_walk_apart(demo_sweep: Make) -> None:
    plan = plan_of(demo_sweep("method=rtn,gptq", "scheme=w4,w3"))
    needs = [{bool(cell.method.needs) for cell in each.cells} for each in plan.passes]
    assert sorted(needs, key=str) == [{False}, {True}]


def test_workers_get_a_pass_each(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w8,w4,w3,w2", "cluster=local", "cluster.workers=2")
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [
        4
    ]  # one walk per worker: the baseline has the other
    sweep = dataclasses.replace(
        sweep, runtime=dataclasses.replace(sweep.runtime, cluster=Cluster("local", workers=4))
    )
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [2, 2]


def test_cells_of_one_stream_stay_together(demo_sweep: Make) -> None:
    sweep = demo_sweep(
        "method=gptq",
        "scheme=w8,w4,w3,w2",
        "inputs=full_precision",
        "cluster=local",
        "cluster.workers=8",
    )
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [4]
    assert "shared by 4" in calibrated[0].sharing


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=rtn", "scheme=w4,w3"), "4 blocks read once, data-free"),
        (("method=gptq", "scheme=w4,w3"), "4 blocks read once, statistics of block 0 shared"),
        (
            ("method=gptq", "scheme=w4,w3", "inputs=full_precision"),
            "4 blocks read once, one input stream shared by 2",
        ),
        (("method=awq", "scheme=w4,w3"), "4 blocks read once, one input stream shared by 2"),
        (
            ("method=any_precision,squeezellm", "scheme=w4,w3", "calibration=demo"),
            "4 blocks read once, squared gradients shared by 4",
        ),
        (("method=gptq", "scheme=w4"), "4 blocks"),
    ],
)
def test_what_cells_share_is_said(demo_sweep: Make, overrides: tuple[str, ...], said: str) -> None:
    passes = [
        each
        for each in plan_of(demo_sweep(*overrides)).passes
        if not all(c.method.is_baseline for c in each.cells)
    ]
    assert [each.sharing for each in passes] == [said]


def test_gradients_are_of_the_weights_that_are_rounded(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=awq", "scheme=w4", "rounding=squeezellm")
    (refusal,) = plan_of(sweep).refused
    assert (
        "squared gradients belong to the original weights of the model, which transform awq changes"
        in " ".join(refusal.reasons)
    )


def test_little_memory_cuts_a_pass(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = demo_sweep(
        "method=gptq", "scheme=w8,w4,w3,w2", "calibration.samples=512", "calibration.length=256"
    )
    from harness.data import model_folders
    from harness.quantization import models

    shapes = models.shapes(model_folders.model_folder(sweep.cells[0].model))
    two = [cell for cell in sweep.cells if cell.method.needs][:2]
    monkeypatch.setattr(
        resources, "available_memory", lambda: int(sum(pass_memory(two, shapes)) / 0.9) + 1000
    )
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [2, 2]


def test_past_seconds_are_the_estimate(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_perplexity")
    store = Store(sweep.runtime.runs)
    for cell in sweep.cells:
        store.open_cell(cell)
        folder = store.checkpoint_folder(quantize_key(cell))
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"seconds": 100.0}')
        content = {"metrics": {"demo_perplexity/perplexity": 2.0}, "seconds": 50.0}
        store.write_score(cell_key(cell), score_key(cell, cell.evaluations[0]), content)
    more = demo_sweep("method=rtn", "scheme=w3", "evaluations=demo_perplexity")
    plan = make(more, store)
    assert plan.passes[0].seconds == pytest.approx(100)
    assert plan.scorings[0].seconds == pytest.approx(50)
    assert plan.seconds == pytest.approx(150)


def test_estimates_grow_with_the_work(demo_sweep: Make) -> None:
    from harness.data import model_folders
    from harness.quantization import models

    cells = {
        (c.method.name, c.scheme.name): c
        for c in demo_sweep("method=rtn,gptq", "scheme=w8,w4,w4g32").cells
    }
    shapes = models.shapes(model_folders.model_folder(next(iter(cells.values())).model))
    assert checkpoint_bytes(cells["rtn", "w8"], shapes) > checkpoint_bytes(
        cells["rtn", "w4g32"], shapes
    )
    assert checkpoint_bytes(cells["rtn", "w4g32"], shapes) > checkpoint_bytes(
        cells["rtn", "w4"], shapes
    )
    assert (
        quantize_flops(cells["gptq", "w4"], shapes) > quantize_flops(cells["rtn", "w4"], shapes) > 0
    )
    weights = shapes.blocks * sum(
        linear.out_features * linear.in_features for linear in shapes.linears
    )
    assert checkpoint_bytes(cells["rtn", "w8"], shapes) == pytest.approx(weights + 65536, rel=0.1)


def test_a_thousand_cells_in_seconds(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4,w3,w2,w4g32", "evaluations=demo_perplexity")
    grid = [cell for cell in sweep.cells if cell.method.needs]
    cells: list[Cell] = []
    for number in range(250):
        for cell in grid:
            assert cell.calibration is not None
            cells.append(
                dataclasses.replace(
                    cell, calibration=dataclasses.replace(cell.calibration, seed=number)
                )
            )
    began = time.process_time()  # of this process alone: others on the machine do not count
    plan = plan_of(dataclasses.replace(sweep, cells=tuple(cells)))
    assert len(plan.missing) == 1000 and len(plan.passes) == 250
    assert time.process_time() - began < 10


def test_the_text_names_counts_places_and_skips(demo_sweep: Make) -> None:
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4,w3", "evaluations=demo_perplexity"))
    text = render(plan)
    assert text.startswith("plan    3 cells · 0 done · 3 to do")
    assert "3 checkpoints" in text and "3 evaluations of 3 cells" in text and "runs" in text


def test_the_frame_has_a_row_per_cell(demo_sweep: Make) -> None:
    frame = plan_of(
        demo_sweep("method=rtn", "scheme=w4,w4g96", "evaluations=demo_perplexity")
    ).frame()
    assert dict(zip(frame["scheme"], frame["state"], strict=True)) == {
        "full": "quantize",
        "w4": "quantize",
        "w4g96": "refused",
    }
    assert "group size 96" in frame.set_index("scheme")["reasons"]["w4g96"]


def test_workers(demo_sweep: Make) -> None:
    runtime = demo_sweep("method=rtn", "scheme=w4").runtime
    assert count_workers(runtime) == 1
    assert count_workers(dataclasses.replace(runtime, cluster=Cluster("local", workers=3))) == 3
    assert count_workers(dataclasses.replace(runtime, cluster=Cluster("local"))) >= 1


def test_sizes_in_words(tmp_path: Path) -> None:
    assert [size(n) for n in (900, 2.5e6, 13.52e9, 3e12)] == ["1 kB", "2.5 MB", "13.5 GB", "3.0 TB"]
    assert free_disk(tmp_path / "not" / "there" / "yet") > 0


def test_a_misspelt_method_never_reaches_a_plan(demo_sweep: Make) -> None:
    with pytest.raises(ConfigError, match="gptq"):
        demo_sweep("method=gtpq", "scheme=w4")


def test_a_plan_says_what_a_family_leaves_alone(
    demo_sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    sweep = demo_sweep("model=tiny:mixtral", "method=rtn", "scheme=w4g32")
    text = render(make(sweep, Store(sweep.runtime.runs)))
    assert (
        "note    tiny_mixtral: scales on the inputs of experts are not folded into the norm" in text
    )
