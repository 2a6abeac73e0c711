"""The report of a checkpoint: whether it covers every matrix, the errors of its layers, its sizes and its time."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from harness.core.cell import Method
from harness.core.errors import MethodError
from harness.quantization.calibration import windows_digest
from harness.quantization.formats.base_model import BaseModel
from harness.quantization.models.protocols import WeightLocation
from harness.quantization.numerics.deltas import DeltaWeight
from harness.quantization.numerics.weights import QuantizedWeight
from harness.quantization.pipeline.blocks import Blocks
from harness.quantization.pipeline.jobs import Job
from harness.quantization.pipeline.observers import OF_INPUTS, Statistics

RECORD = "reduction.json"  # in the folder of a reduced model


@dataclass
class SharedSeconds:
    """Wall time of the work that cells of a pass share: reading and running blocks, and squared gradients."""

    stream: float = 0.0
    gradients: float = 0.0

    @contextmanager
    def measure(self, work: Literal["stream", "gradients"]) -> Iterator[None]:
        """Add the time inside the context to one kind of work; work that raises is not counted."""
        began = time.monotonic()
        yield
        setattr(self, work, getattr(self, work) + time.monotonic() - began)

    def cost_of(self, job: Job) -> float:
        """The seconds that a cell would take in a pass of its own: its own work, and all of the shared work that it needs."""
        gradients = self.gradients if "squared_gradient" in job.needs else 0.0
        return job.seconds + gradients + (self.stream if job.reads_stream else 0.0)


def check_coverage(
    where: str,
    locations: Sequence[WeightLocation],
    before: Mapping[str, Tensor],
    weights: Mapping[str, QuantizedWeight],
    dense: Mapping[str, Tensor],
) -> None:
    """Raise MethodError unless a rounding returned every matrix of the block in its own shape and finite, and nothing else.

    where    names cell and block in the message
    before   the block's tensors that were rounded
    weights  what the rounding returned, by linear name
    dense    other tensors of the block that the method changed; they must be finite too
    """
    expected = {
        location.name: tuple(location.view(before[location.parameter]).shape)
        for location in locations
    }
    problems = [f"{name} was not quantized" for name in expected if name not in weights]
    problems += [f"{name} is no matrix of this block" for name in weights if name not in expected]
    for name, weight in weights.items():
        if name in expected and tuple(weight.shape) != expected[name]:
            problems.append(f"{name} came back as {list(weight.shape)}, not {list(expected[name])}")
        elif name in expected and not bool(torch.isfinite(weight.dequantize()).all()):
            problems.append(f"{name} came back with NaN or infinity")
    problems += [
        f"{name} holds NaN or infinity"
        for name, tensor in dense.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if problems:
        raise MethodError(f"{where}: " + "; ".join(problems))


def layer_errors(
    job: Job,
    index: int,
    locations: Sequence[WeightLocation],
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, QuantizedWeight],
    statistics: Statistics,
) -> dict[str, dict[str, Any]]:
    """Relative squared errors by linear: weight, ||W - W'||² / ||W||²; output, ||(W - W')X||² / ||WX||², where there is a Hessian;
    delta, ||W - W'||² / ||W - W_base||², where a difference is stored.

    A Hessian is used only if the rounding of the matrix needs one: the report is part of the checkpoint's bytes, and these do not
    depend on which other cells share the pass.
    """
    errors: dict[str, dict[str, Any]] = {}
    for location in locations:
        needs = job.needs_of(job.cell.method.rounding_for(index, location.name))
        weight = location.view(tensors[location.parameter]).float()
        quantized = weights[location.name]
        difference = quantized.dequantize().to(weight.device) - weight
        entry: dict[str, Any] = {
            "weight_error": relative_error(difference, weight),
            "bits_per_weight": quantized.bits_per_weight,
        }
        if quantized.widths:
            entry["at"] = {
                str(bits): _errors(quantized.at(bits), weight) for bits in quantized.widths
            }
        if isinstance(quantized, DeltaWeight) and quantized.base is not None:
            change = weight - quantized.base.to(weight.device)
            entry["delta_error"] = relative_error(difference, change)
        of_group = statistics.get(location.group)
        if location.expert is not None and set(needs) & set(OF_INPUTS):
            entry["calibration_tokens"] = of_group.tokens if of_group is not None else 0
        if "hessian" in needs and of_group is not None and of_group.finite and of_group.tokens:
            hessian = of_group.values["hessian"]
            entry["output_error"] = relative_error(difference, weight, hessian)
        errors[location.name] = entry
    return errors


def _errors(quantized: QuantizedWeight, weight: Tensor) -> dict[str, float]:
    """What the record says of a matrix that is read at one of several widths."""
    difference = quantized.dequantize().to(weight.device) - weight
    return {
        "weight_error": relative_error(difference, weight),
        "bits_per_weight": quantized.bits_per_weight,
    }


def added_bits(blocks: Blocks, index: int, dense: Mapping[str, Tensor]) -> int:
    """Size in bits of those tensors of block `index` that the model itself does not have."""
    known = blocks.family.blocks(blocks.model)[index].state_dict()
    return sum(
        8 * tensor.numel() * tensor.element_size()
        for name, tensor in dense.items()
        if name not in known
    )


def changed(
    tensors: Mapping[str, Tensor], original: Mapping[str, Tensor], matrices: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of a block, besides its matrices, that a method added or changed."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in matrices
        and (name not in original or not torch.equal(tensor, original[name]))
    }


def manifest_content(
    job: Job,
    blocks: Blocks,
    windows: Tensor | None,
    shared: SharedSeconds,
    base: BaseModel | None = None,
) -> dict[str, Any]:
    """The manifest of a finished checkpoint without its files: sizes, coverage, seconds, methods, calibration.

    Of differences from a base, a tensor outside the matrices that equals the base's takes no bits: the sizes are those of what one
    more model costs beside its base.
    """
    method = job.cell.method
    matrices: dict[str, int] = {}  # elements of each parameter that are quantizable
    linears = 0
    if method.quantizes:
        for index in range(len(blocks)):
            parameters = dict(blocks.family.blocks(blocks.model)[index].named_parameters())
            for location in blocks.locations(index):
                name = blocks.family.block_prefix(index) + location.parameter
                elements = location.view(parameters[location.parameter]).numel()
                matrices[name] = matrices.get(name, 0) + elements
                linears += 1
    own_base = base if method.needs_base else None
    widths = blocks.weights.stored_bits()
    total, bits, whole = 0, job.added_bits, 0
    for name, elements in blocks.parameters.items():
        total += elements
        width = widths.get(name, 8 * blocks.dtype.itemsize)
        whole += width * elements
        rest = elements - matrices.get(name, 0)
        if rest and not (own_base is not None and _equals_base(blocks, own_base, name)):
            bits += width * rest
    covered = sum(matrices.values())
    reduced = _reduction(blocks.folder) if method.reduction is not None else {}
    content: dict[str, Any] = {
        "parameters": total,
        **reduced,
        "unquantized_bits": bits,
        "coverage": {"linears": linears, "weights": covered, "share": covered / total},
        "seconds": shared.cost_of(job),
        "methods": methods_of(method),
    }
    if own_base is not None:
        base_widths = own_base.weights.stored_bits()
        stored = sum(
            base_widths.get(name, 8 * blocks.dtype.itemsize) * elements
            for name, elements in matrices.items()
        )
        content["base"] = own_base.description()
        content["delta"] = {
            "ends_bytes": bits // 8,
            "fine_tune_bytes": whole // 8,
            "base_bits_per_weight": stored / covered,
        }
    if method.needs_calibration and windows is not None:
        samples, length = windows.shape
        content["calibration"] = {
            "windows_sha256": windows_digest(windows),
            "samples": samples,
            "length": length,
        }
    return content


def methods_of(method: Method) -> dict[str, str]:
    """Names of the parts by slot; several roundings joined, the one of most matrices first."""
    found = {
        kind: part.name
        for kind in ("transform", "rounding", "tuning", "reduction")
        if (part := getattr(method, kind))
    }
    names = dict.fromkeys([found.get("rounding", ""), *(o.rounding.name for o in method.overrides)])
    return found | {"rounding": ", ".join(names)} if method.overrides else found


def _equals_base(blocks: Blocks, base: BaseModel, name: str) -> bool:
    """Whether a parameter of the model has the numbers that the base has under the same name."""
    theirs = base.tensor(name)
    own = blocks.weights.read(name, blocks.dtype, "cpu")
    return theirs is not None and theirs.shape == own.shape and torch.equal(own, theirs)


def _reduction(folder: Path) -> dict[str, Any]:
    """Of the manifest of a cell whose model was reduced: the parameters that the model had, and what was chosen."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    shown = {key: record[key] for key in ("reduction", "choice", "parameters")}
    return {"original_parameters": record["parameters"]["before"], "reduced": shown}


def relative_error(difference: Tensor, weight: Tensor, hessian: Tensor | None = None) -> float:
    """||D||² / ||W||², or tr(D H Dᵀ) / tr(W H Wᵀ); in float64 where a sum overflows float32. 0 where nothing comes out at all."""

    def size(matrix: Tensor, metric: Tensor | None) -> Tensor:
        return matrix.square().sum() if metric is None else ((matrix @ metric) * matrix).sum()

    error, reference = size(difference, hessian), size(weight, hessian)
    if not bool(torch.isfinite(error) & torch.isfinite(reference)):
        metric = hessian.double() if hessian is not None else None
        error, reference = size(difference.double(), metric), size(weight.double(), metric)
    value = float(error / reference) if float(reference) > 0 else 0.0
    return max(value, 0.0)  # round-off of an exact layer


def json_values(notes: Any) -> Any:
    """A method's notes as JSON values: tensors become lists or numbers."""
    if isinstance(notes, Tensor):
        return notes.tolist()
    if isinstance(notes, Mapping):
        return {str(key): json_values(value) for key, value in notes.items()}
    if isinstance(notes, list | tuple):
        return [json_values(item) for item in notes]
    return notes
