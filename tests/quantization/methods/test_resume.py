"""A killed cell goes on where it was, whatever its method: it redoes one block at most, and its checkpoint is the same to the byte.

New methods are found by themselves. All of them are walked in company, killed after the first of three blocks with the second half
written, and walked again. A tuning starts again from its base, which is not made twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import every_cell
import pytest
import torch

from harness.core.cell import Calibration, Cell, freeze, quantize_key, to_json, untuned
from harness.core.errors import StoreError
from harness.core.events import Event, Failed, Progress
from harness.data.demo.tiny import build
from harness.execution.tasks import QuantizeTask
from harness.execution.worker import fingerprint, quantize
from harness.quantization.formats.native import DENSE, CheckpointWriter
from harness.quantization.numerics.weights import QuantizedWeight
from harness.quantization.pipeline.passes import run_pass
from harness.storage.store import Store

# a reduction's pass is one on the smaller model (`test_reduction.py`)
REDUCING = [name for name in every_cell.names("methods") if every_cell.reduces(name)]
METHODS = every_cell.names("methods", "none", *REDUCING)
# tried before all others
USUAL = ("w4g32", "w2g32", "w4", "w2", "w3g16", "w2g16", "w4sym", "nf4g32", "w1.1g32", "w4g32s50")


class Recorder(CheckpointWriter):
    """A writer that remembers which blocks it was given."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        super().__init__(folder, fingerprint)
        self.written: list[int] = []

    def write_block(
        self,
        index: int,
        weights: Mapping[str, QuantizedWeight],
        dense: Mapping[str, torch.Tensor],
        report: Mapping[str, Any],
    ) -> None:
        self.written.append(index)
        super().write_block(index, weights, dense, report)


@dataclass(frozen=True)
class Walked:
    """Checkpoints of one cell per method: made at once, and made by a pass that was killed and one that went on."""

    cells: dict[str, Cell]  # by method, as a pass makes them: without tunings
    undisturbed: Path
    killed: Path
    after_kill: dict[str, int]  # by quantize_key: modification time of block 0
    redone: dict[str, list[int]]  # by quantize_key: blocks that the second pass wrote
    failures: list[str]


def accepted(folder: Path) -> dict[str, Cell]:
    """The first cell of every method that the plan accepts."""
    ask = every_cell.checker()
    found: dict[str, Cell] = {}

    def look(cells: list[Cell]) -> None:
        for cell in cells:
            name = cell.method.name.partition("[")[0]
            if name not in found and not ask.reasons(cell):
                found[name] = cell

    look(every_cell.product(folder, METHODS, USUAL))
    missing = [name for name in METHODS if name not in found]
    if missing:
        look(every_cell.product(folder, missing))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("llama", path)
    return path


@pytest.fixture(scope="module")
def cells(folder: Path) -> dict[str, Cell]:
    return accepted(folder)


@pytest.fixture(scope="module")
def walked(
    folder: Path, cells: dict[str, Cell], tmp_path_factory: pytest.TempPathFactory
) -> Walked:
    own = {name: untuned(cell) for name, cell in cells.items()}
    by_key = {quantize_key(cell): cell for cell in own.values()}
    windows = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    undisturbed, killed = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("killed")
    problems: list[str] = []

    def walk(store: Path, writers: Mapping[str, CheckpointWriter]) -> Iterator[Event]:
        for event in run_pass(list(by_key.values()), folder, windows, writers):
            if isinstance(event, Failed):
                problems.append(f"{store.name}: {event.reason}")
            yield event

    def writers(store: Path) -> dict[str, Recorder]:
        return {key: Recorder(store / key, fingerprint(cell)) for key, cell in by_key.items()}

    list(walk(undisturbed, writers(undisturbed)))
    for event in (first := walk(killed, writers(killed))):
        if isinstance(event, Progress) and event.stage == "block":
            first.close()
            break
    times: dict[str, int] = {}
    for key in by_key:
        assert sorted(path.name for path in (killed / key).glob("block-*.json")) == [
            "block-00000.json"
        ]
        times[key] = (killed / key / "block-00000.json").stat().st_mtime_ns
        (killed / key / "block-00001.safetensors").write_bytes(b"half of a bl")
    again = writers(killed)
    list(walk(killed, again))
    return Walked(
        own,
        undisturbed,
        killed,
        times,
        {key: writer.written for key, writer in again.items()},
        problems,
    )


def content(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint by name: its bytes, and the manifest without timings."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    found["manifest.json"] = {
        key: value for key, value in json.loads(found["manifest.json"]).items() if key != "seconds"
    }
    return found


def tensor_bytes(folder: Path, *, quantized: bool = True) -> int:
    """Bytes of the matrices in the block files of a checkpoint, by their headers; not quantized: of all tensors."""
    total = 0
    for path in sorted(folder.glob("block-*.safetensors")):
        data = path.read_bytes()
        header = int.from_bytes(data[:8], "little")
        sizes = {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in json.loads(data[8 : 8 + header]).items()
            if name != "__metadata__"
        }
        assert sum(sizes.values()) == len(data) - 8 - header
        total += sum(
            size for name, size in sizes.items() if not (quantized and name.startswith(DENSE))
        )
    return total


def sizes_are_those_on_disk(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    elements = sum(entry["shape"][0] * entry["shape"][1] for entry in manifest["linears"])
    assert manifest["bits_per_weight"] * elements / 8 == pytest.approx(
        tensor_bytes(folder), rel=1e-9
    )
    assert manifest["stored_bytes"] >= tensor_bytes(folder)


def test_every_method_was_walked(walked: Walked) -> None:
    assert set(walked.cells) == set(METHODS) and not walked.failures


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_pass_goes_on(walked: Walked, name: str) -> None:
    key = quantize_key(walked.cells[name])
    assert walked.redone[key] == [1, 2], (
        "the finished block is kept, and the half-written one done again"
    )
    assert (walked.killed / key / "block-00000.json").stat().st_mtime_ns == walked.after_kill[key]
    assert content(walked.killed / key) == content(walked.undisturbed / key)


@pytest.mark.parametrize("name", METHODS)
def test_stated_sizes_are_those_on_disk(walked: Walked, name: str) -> None:
    sizes_are_those_on_disk(walked.undisturbed / quantize_key(walked.cells[name]))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_of_something_else_is_refused(walked: Walked, name: str) -> None:
    """Of other weights, scheme or settings; of other calibration windows; of another seed, where a method is stochastic."""
    cell = walked.cells[name]
    rounding = cell.method.rounding
    assert rounding is not None
    others = [
        dataclasses.replace(cell, model=dataclasses.replace(cell.model, digest="of other weights")),
        dataclasses.replace(cell, scheme=dataclasses.replace(cell.scheme, weight=_other(cell))),
        dataclasses.replace(cell, method=_with_settings(cell, {"a setting": 1})),
    ]
    if cell.method.needs_calibration:
        assert isinstance(cell.calibration, Calibration)
        others.append(
            dataclasses.replace(
                cell,
                calibration=dataclasses.replace(cell.calibration, seed=cell.calibration.seed + 1),
            )
        )
    if any(part.stochastic for part in cell.method.parts):
        others.append(dataclasses.replace(cell, seed=cell.seed + 1))
    before = content(walked.killed / quantize_key(cell))
    for other in others:
        with pytest.raises(StoreError, match="holds another checkpoint"):
            CheckpointWriter(walked.killed / quantize_key(cell), fingerprint(other))
    assert content(walked.killed / quantize_key(cell)) == before


def _other(cell: Cell) -> Any:
    """Other bits, and another type of scales for checkpoints that hold all widths."""
    own = cell.scheme.weight
    other = "float32" if own.scale_dtype != "float32" else "bfloat16"
    return dataclasses.replace(own, bits=own.bits + 1, scale_dtype=other)


def _with_settings(cell: Cell, more: Mapping[str, Any]) -> Any:
    rounding = cell.method.rounding
    assert rounding is not None
    settings = freeze({**to_json(rounding)["settings"], **more})
    return dataclasses.replace(
        cell.method, rounding=dataclasses.replace(rounding, settings=settings)
    )


def test_a_killed_tuning_starts_again_from_its_base(cells: dict[str, Cell], tmp_path: Path) -> None:
    tuned = tuple(cell for cell in cells.values() if cell.method.tuning is not None)
    assert tuned

    def run(name: str, stop: Collection[str] = ()) -> Store:
        store = Store(tmp_path / name)
        for event in (
            events := quantize(QuantizeTask(tuned, str(tmp_path / name), "cpu", 1), store, "cpu")
        ):
            assert not isinstance(event, Failed), event.reason
            if isinstance(event, Progress) and event.stage in stop:
                events.close()  # type: ignore[attr-defined]
                break
        return store

    undisturbed, killed = run("undisturbed"), run("killed", stop=("tuning",))
    bases = [
        killed.checkpoint_folder(quantize_key(untuned(cell))) / "manifest.json" for cell in tuned
    ]
    times = [path.stat().st_mtime_ns for path in bases]
    run("killed")
    assert [path.stat().st_mtime_ns for path in bases] == times, "what was made is not made again"
    for cell in tuned:
        key = quantize_key(cell)
        assert content(killed.checkpoint_folder(key)) == content(
            undisturbed.checkpoint_folder(key)
        ), cell.title
