"""A smaller ordinary model, made once by the reduction of a method: a folder that everything else takes for a model.

The unrounded model runs block by block over the calibration windows if the reduction needs to see it, or is there as a whole if it
is trained; the reduction decides what is kept; config, weights and tokenizer of the smaller model are written, reduction.json last:
a folder with it is complete.

    reduction.json   name, version and settings of the reduction, its choice, parameters before and after, seconds

Peak memory: two blocks and the activations of all sequences, then one block and one shard of the files. Where the reduction trains:
the model in float32 and what training keeps of it; then the trained model on the CPU too. A killed training starts again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness.core import plugins
from harness.core.cell import Cell, baseline_of, to_json
from harness.core.errors import DataError, MethodError
from harness.core.events import Progress
from harness.quantization.calibration import windows_digest
from harness.quantization.export import COPIED, SHARD_BYTES, write_json, write_shards
from harness.quantization.inference.load import load
from harness.quantization.methods.protocols import Evidence, ExpertOutputs
from harness.quantization.models import config_by_block, read_config, shapes
from harness.quantization.models.protocols import tied
from harness.quantization.numerics.randomness import generator
from harness.quantization.pipeline.observers import OF_INPUTS, InputEvidence
from harness.quantization.pipeline.report import RECORD
from harness.quantization.pipeline.walk import Walk

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def run_reduction(
    cell: Cell,
    folder: Path,
    windows: Tensor | None,
    target: Path,
    device: str = "cpu",
    cell_keys: Sequence[str] = (),
) -> Iterator[Progress]:
    """Make the smaller model of a cell's reduction in the folder `target`; what a killed run left there is overwritten.

    folder   of the model
    windows  [samples, length] tokens; None where the reduction does not run the model
    Yields Progress while it runs. Raises MethodError where a statistic or a weight that is kept is not finite, ModelError for a
    model that cannot be read, DataError where calibration data are missing.
    """
    part, began = cell.method.reduction, time.monotonic()
    assert part is not None, f"{cell.title} has no reduction"
    reduction = plugins.build("reduction", part.name, to_json(part)["settings"])
    full = dataclasses.replace(
        baseline_of(cell), model=dataclasses.replace(cell.model, dtype="float32")
    )
    model = ReadModel(
        folder,
        cell.model.dtype,
        device,
        part.needs,
        windows,
        lambda: load(full, folder, None, device)[0],
    )
    reasons = reduction.check(model.shapes, model.config)
    if reasons:
        raise MethodError(f"{cell.title}: reduction {part.name}: {'; '.join(reasons)}")
    choosing = reduction.choose(model, generator(cell.seed, -1, "reduction"))
    while True:
        try:
            step, steps = next(choosing)
        except StopIteration as end:
            choice: dict[str, Any] = json.loads(json.dumps(end.value))
            break
        yield Progress(time.time(), tuple(cell_keys), "reduction", step, steps)
    target.mkdir(parents=True, exist_ok=True)
    for left in target.iterdir():
        left.unlink()
    tensors = _as_stored(reduction.tensors(choice, model), model.stored_dtype)
    total, _ = write_shards(target, _finite(cell, tensors), SHARD_BYTES)
    config = {**reduction.config(model.config, choice), "dtype": cell.model.dtype}
    config.pop("torch_dtype", None)
    write_json(target / "config.json", config)
    for pattern in COPIED:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    record: dict[str, Any] = {
        "reduction": {key: to_json(part)[key] for key in ("name", "version", "settings")},
        "choice": choice,
        "parameters": {"before": model.shapes.parameters, "after": shapes(target).parameters},
        "bytes": total,
        "files": {path.name: _identity(path) for path in sorted(target.glob("*.safetensors"))},
        "seconds": time.monotonic() - began,
    }
    if part.needs and windows is not None:
        samples, length = windows.shape
        digest = windows_digest(windows)
        record["calibration"] = {"windows_sha256": digest, "samples": samples, "length": length}
    write_json(target / RECORD, record)


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _finite(cell: Cell, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MethodError(f"{cell.title}: {name} holds NaN or infinity in the reduced model")
        yield name, tensor


def _as_stored(
    tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in the one floating type of the model's files, so that a smaller model takes less room than the larger one."""
    for name, tensor in tensors:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Surveyed:
    """One block of the survey (`methods.protocols.SurveyedBlock`)."""

    index: int
    matrices: Mapping[str, Tensor]
    evidence: Mapping[str, Evidence]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    experts: ExpertOutputs | None


class ReadModel(Walk):
    """The unrounded model of a folder: run block by block (`Survey`), and read tensor by tensor (`ModelReader`)."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str,
        needs: Sequence[str],
        windows: Tensor | None,
        whole: Callable[[], nn.Module] | None = None,
    ) -> None:
        """whole: loads the model in float32, for a reduction that trains it."""
        super().__init__(folder, dtype, device)
        self._whole = whole
        self.shapes, self.config = self.blocks.shapes, config_by_block(read_config(folder))
        self._needs, self._windows = frozenset(needs), windows

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The one floating type of the model's files; None where there are several, or others than torch's usual ones."""
        found = {each.dtype for each in self.blocks.weights.reader.files.tensors.values()}
        return STORED.get(found.pop()) if len(found) == 1 else None

    def surveyed(self) -> Iterator[Surveyed]:
        """Run the blocks in order."""
        if self._windows is None:
            raise DataError("the reduction chooses by calibration data, and there are none")
        needs = self._needs & set(OF_INPUTS)
        hidden = [state.to(self.storage) for state in self.blocks.start(self._windows)]
        for index in range(len(self.blocks)):
            tensors = self.blocks.tensors(index)
            module, sums = self.blocks.build(index, tensors), _ExpertSums()
            with ExitStack() as watching:
                if "expert_output" in self._needs:
                    watching.enter_context(self.blocks.family.watch_experts(module, sums.add))
                seen, outputs = self._observe(
                    index, module, hidden, {"*": needs} if needs else {}, True
                )
            if not all(bool(torch.isfinite(state).all()) for state in outputs):
                raise MethodError(
                    f"the outputs of block {index} hold NaN or infinity on the calibration text; load the model in a wider "
                    "dtype (model.dtype=float32)"
                )
            locations = self.blocks.locations(index)
            states = "block_states" in self._needs
            yield Surveyed(
                index,
                {
                    location.name: location.view(tensors[location.parameter]).float()
                    for location in locations
                },
                {
                    location.name: InputEvidence(seen[location.group], needs, "full_precision")
                    for location in locations
                    if location.group in seen
                },
                hidden if states else (),
                outputs if states else (),
                sums.finish(self.shapes.experts),
            )
            hidden = outputs

    def trainable(self) -> FunctionalModel:
        """The whole model in float32, and the windows."""
        if self._windows is None or self._whole is None:
            raise DataError("the reduction trains on calibration data, and there are none")
        return FunctionalModel(self._whole(), self._windows.to(self.blocks.device))

    def block(self, index: int) -> dict[str, Tensor]:
        """Every parameter and stored buffer of a block, by its name within it, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.blocks.tensors(index).items()}

    def ends(self) -> dict[str, Tensor]:
        """Every tensor outside the blocks, by its name in the model; a head that is the embedding is left out."""
        own = self.blocks.weights.untied(self.blocks.dtype)
        same = [name for name in tied(self.blocks.model) if name not in own]
        return {name: t for name, t in self.blocks.ends().items() if name not in same}

    def name(self, index: int, tensor: str) -> str:
        """The name in the model of a tensor of block `index`."""
        return self.blocks.family.block_prefix(index) + tensor

    def expert_tensors(self, index: int) -> tuple[str, ...]:
        """Names within a block of the tensors with one entry per expert in their first dimension."""
        names = self.blocks.family.blocks(self.blocks.model)[index].state_dict()
        return tuple(
            name for name in names if name.rpartition(".")[0] in self.blocks.family.by_expert
        )


class FunctionalModel:
    """A transformers model as a function of its tensors (`methods.protocols.TrainableModel`)."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        self.windows = windows
        self._model = model
        self.tensors = {
            name: parameter.requires_grad_() for name, parameter in model.named_parameters()
        }

    def logits(self, tokens: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(
            self._model, dict(tensors), (), {"input_ids": tokens, "use_cache": False}
        ).logits
        return found.float()


@dataclass
class _ExpertSums:
    """What `DecoderFamily.watch_experts` reports, summed in float64."""

    sums: dict[int, list[float]] = field(default_factory=dict)

    def add(self, expert: int, gates: Tensor, outputs: Tensor) -> None:
        norms, weights = outputs.float().norm(dim=-1).double(), gates.double()
        own = self.sums.setdefault(expert, [0.0, 0.0, 0.0, 0.0, 0.0])
        added = (
            float(gates.numel()),
            float(weights.sum()),
            float(norms.sum()),
            float((weights * norms).sum()),
        )
        for place, value in enumerate(added):
            own[place] += value
        own[4] = max(own[4], float(outputs.abs().max()))
        if not math.isfinite(own[2]):
            raise MethodError(
                f"the outputs of expert {expert} hold NaN or infinity; load the model with model.dtype=float32"
            )

    def finish(self, experts: int) -> ExpertOutputs | None:
        """None where no token was seen: the block has no experts."""
        if not self.sums:
            return None
        table = torch.zeros(5, experts, dtype=torch.float64)
        for expert, values in self.sums.items():
            table[:, expert] = torch.tensor(values, dtype=torch.float64)
        return ExpertOutputs(*table)
