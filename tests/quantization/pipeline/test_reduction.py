"""A reduced model is an ordinary smaller model: its folder loads, and computes what the original computes without what is gone."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small
import torch
from reductions import logits, reduce, reduced_cell, reducing
from torch import Tensor

from harness.core.cell import Cell, cell_key, quantize_key, reduction_key
from harness.core.errors import MethodError
from harness.core.events import Failed, Progress, Quantized
from harness.data.demo.tiny import TINY, build
from harness.execution import worker
from harness.execution.tasks import QuantizeTask
from harness.quantization.export import export
from harness.quantization.models import shapes
from harness.quantization.pipeline.blocks import Blocks
from harness.storage import gc
from harness.storage.store import Store


def skipping(folder: Path, windows: Tensor, kept: list[int]) -> Tensor:
    """Logits of the model in which only these blocks run."""
    blocks = Blocks(folder, "float32", "cpu")
    hidden = blocks.start(windows)
    for index in kept:
        module = blocks.build(index, blocks.tensors(index))
        hidden = [blocks.run(module, index, number, h) for number, h in enumerate(hidden)]
    with blocks.head(windows, hidden) as head:
        return torch.cat([head.logits(number, h) for number, h in enumerate(hidden)])


@pytest.mark.parametrize("family", TINY)
def test_a_model_without_a_block_computes_what_skipping_it_computes(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, target, windows = tiny_model(family), tmp_path / "reduced", small.windows(2, 24)
    record = reduce(folder, target, reducing("shortgpt", drop=(1,)), None)
    assert record["choice"]["kept"] == [0, 2]
    with torch.no_grad():
        wanted = skipping(folder, windows, [0, 2])
    torch.testing.assert_close(logits(target, windows), wanted, rtol=1e-5, atol=1e-5)
    before, after = shapes(folder).parameters, shapes(target).parameters
    assert record["parameters"] == {"before": before, "after": after} and after < before


def test_what_the_last_run_left_behind_is_overwritten(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, target = tiny_model(), tmp_path / "reduced"
    target.mkdir()
    (target / "shard-7.safetensors").write_bytes(b"half")
    reduce(folder, target, reducing("shortgpt", blocks=1), small.windows())
    assert {path.name for path in target.iterdir()} >= {"config.json", "model.safetensors"}
    assert not (target / "shard-7.safetensors").exists()


def test_a_model_with_nan_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MethodError, match="block 1 hold NaN"):
        reduce(folder, tmp_path / "a", reducing("shortgpt", blocks=1), small.windows())
    with pytest.raises(MethodError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
        reduce(folder, tmp_path / "b", reducing("shortgpt", drop=(0,)), None)


@pytest.fixture(scope="module")
def in_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Cell], Path]:
    """A store in which one task made three cells of one reduction, and one of none."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder)
    windows = dataclasses.replace(small.CALIBRATION, samples=4, length=24)
    methods = [
        reducing("shortgpt", blocks=1),
        reducing("shortgpt", "rtn", blocks=1),
        reducing("shortgpt", "gptq", blocks=1),
        small.RTN,
    ]
    cells = [reduced_cell(folder, method, calibration=windows) for method in methods]
    store = Store(tmp_path_factory.mktemp("runs"))
    task = QuantizeTask(tuple(cells), str(store.place), "cpu", 1)
    with pytest.MonkeyPatch.context() as patch:  # the demo's whole text takes seconds to tokenize
        drawn = small.windows(4, 24)
        patch.setattr("harness.quantization.calibration.draw_windows", lambda *arguments: drawn)
        events = list(worker.quantize(task, store, "cpu"))
    assert not [event for event in events if isinstance(event, Failed)], events
    done = [key for event in events if isinstance(event, Quantized) for key in event.cell_keys]
    assert sorted(done) == sorted(map(cell_key, cells))
    made = [event for event in events if isinstance(event, Progress) and event.stage == "reduction"]
    assert len(made) == 3  # the survey of three blocks, once for three cells
    return store, cells, folder


def test_cells_of_one_reduction_share_it(in_store: tuple[Store, list[Cell], Path]) -> None:
    store, cells, folder = in_store
    assert len({reduction_key(cell) for cell in cells[:3]}) == 1
    plain, rounded, gptq = (store.manifest(quantize_key(cell)) for cell in cells[:3])
    assert plain is not None and rounded is not None and gptq is not None
    before = shapes(folder).parameters
    assert plain["original_parameters"] == before > plain["parameters"]
    assert plain["bits_per_original_weight"] == 32 * plain["parameters"] / before
    for manifest in (rounded, gptq):
        share = manifest["parameters"] / before
        total = manifest["bits_per_weight_total"]
        assert manifest["bits_per_original_weight"] == pytest.approx(total * share)
        assert manifest["blocks"] == 2 and manifest["methods"]["reduction"] == "shortgpt"
    metrics = store.record(cells[3]).metrics()  # of a model that was not reduced both are one
    total = metrics["checkpoint/bits_per_weight_total"]
    assert metrics["checkpoint/bits_per_original_weight"] == total


def test_a_pass_on_a_reduced_model_is_one_on_its_folder(
    in_store: tuple[Store, list[Cell], Path], tmp_path: Path
) -> None:
    """Alone, on the folder as on any model, RTN gives the same blocks."""
    store, cells, _ = in_store
    source = store.reduced_folder(reduction_key(cells[1]))
    alone = small.cell(source, small.RTN)
    small.quantize([alone], source, tmp_path / "alone", small.windows(4, 24))
    for name in ("block-00000.safetensors", "block-00001.safetensors"):
        ours = (store.checkpoint_folder(quantize_key(cells[1])) / name).read_bytes()
        assert ours == (tmp_path / "alone" / quantize_key(alone) / name).read_bytes()


def test_an_unrounded_reduced_model_is_exported_as_it_is(
    in_store: tuple[Store, list[Cell], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    store, cells, _ = in_store
    key = store.open_cell(cells[0])
    made = export(store, key, "transformers", tmp_path / "out")
    windows = small.windows(2, 24)
    theirs = AutoModelForCausalLM.from_pretrained(made.folder, dtype="auto")
    with torch.no_grad():
        found = theirs(windows, use_cache=False).logits
    source = store.reduced_folder(reduction_key(cells[0]))
    torch.testing.assert_close(found, logits(source, windows), rtol=1e-5, atol=1e-5)


def test_a_reduced_model_that_no_cell_uses_is_a_leftover(
    in_store: tuple[Store, list[Cell], Path], tmp_path: Path
) -> None:
    made, cells, _ = in_store
    shutil.copytree(made.root, tmp_path / "runs")
    store = Store(tmp_path / "runs")
    reduced = store.reduced_folder(reduction_key(cells[0]))
    assert reduced not in {each.path for each in gc.find(store, young_seconds=-1)}
    for cell in cells[:3]:
        store.files.remove(store.cell_folder(cell_key(cell)))
    assert reduced in {each.path for each in gc.find(store, young_seconds=-1)}


def test_keys_name_the_reduction_and_nothing_else_new(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model()
    one, other = (
        reduced_cell(folder, reducing("shortgpt", "rtn", blocks=number)) for number in (1, 2)
    )
    plain = small.cell(folder, small.RTN)
    assert len({quantize_key(cell) for cell in (one, other, plain)}) == 3
    again = dataclasses.replace(one, inputs="full_precision")  # RTN reads no inputs
    assert quantize_key(again) == quantize_key(one)
    longer = dataclasses.replace(one, calibration=dataclasses.replace(small.CALIBRATION, samples=9))
    assert reduction_key(longer) != reduction_key(one)
