"""Training after rounding: a checkpoint becomes a model whose linears can be trained, and that model a checkpoint again.

The base is the checkpoint of the same method without its tuning. A tuning (`methods.protocols.Tuning`) says what a linear looks
like while it is trained, trains, and says what is stored; everything else of the base (norms, ends, sizes) is passed on.

Peak memory: the model in its dtype with the activations of one step, whatever the tuning trains, and the full-precision model
beside it where the tuning learns from it. A killed tuning starts again from its base.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from harness.core import plugins
from harness.core.cell import Cell, baseline_of, cell_key, to_json, untuned
from harness.core.errors import DataError, MethodError
from harness.core.events import Event, Progress, Quantized
from harness.quantization.calibration import documents_digest, windows_digest
from harness.quantization.formats.base_model import BaseModel, on_base
from harness.quantization.formats.native import BlockContent, Checkpoint, CheckpointWriter
from harness.quantization.formats.weight_files import DTYPES, ModelWeights
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.inference.load import load
from harness.quantization.models import family_of, read_config
from harness.quantization.models.protocols import DecoderFamily, WeightLocation
from harness.quantization.numerics import inputs
from harness.quantization.numerics.randomness import generator
from harness.quantization.numerics.training import Document

SEQUENCES_AT_ONCE = 16  # while the model writes text


class LanguageModel:
    """A transformers model as a tuning sees it (`methods.protocols.Network`)."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self._model, self._device = model, torch.device(device)

    def logits(self, tokens: Tensor) -> Tensor:
        found: Tensor = self._model(tokens.to(self._device), use_cache=False).logits
        return found.float()

    @torch.no_grad()
    def sample(self, first: Tensor, length: int, rng: Generator) -> Tensor:
        return torch.cat(
            [self._continue(part, length, rng) for part in first.split(SEQUENCES_AT_ONCE)]
        )

    def _continue(self, first: Tensor, length: int, rng: Generator) -> Tensor:
        written, cache = [first.cpu()], None
        while len(written) < length:
            result = self._model(
                written[-1][:, None].to(self._device), past_key_values=cache, use_cache=True
            )
            cache = result.past_key_values
            probabilities = torch.softmax(result.logits[:, -1].float(), -1).cpu()
            written.append(torch.multinomial(probabilities, 1, generator=rng)[:, 0])
        return torch.stack(written, dim=1)


class FrozenModel(LanguageModel):
    """The teacher: no gradient is kept."""

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens)


def run_tuning(
    cell: Cell,
    folder: Path,
    base: Path,
    windows: Tensor | Sequence[Document],
    writer: CheckpointWriter,
    device: str = "cpu",
    cell_keys: Sequence[str] = (),
) -> Iterator[Event]:
    """Train a cell's model and write its checkpoint.

    folder   of the model
    base     checkpoint of the cell without its tuning, complete
    windows  [samples, length] tokens; documents for a tuning that needs these
    Yields Progress while it trains, then Quantized. Raises MethodError for a matrix that cannot be trained or is not finite at
    last, StoreError for a damaged base, ModelError for a model that cannot be read.
    """
    part = cell.method.tuning
    assert part is not None, f"{cell.title} has no tuning"
    began, keys = time.monotonic(), tuple(cell_keys) or (cell_key(cell),)
    tuning = plugins.build("tuning", part.name, to_json(part)["settings"])
    if (windows.numel() if isinstance(windows, Tensor) else len(windows)) == 0:
        raise DataError(
            f"{cell.title}: there is no text to train on; set calibration.samples and calibration.length"
        )
    stored = Checkpoint.open(base)
    weights_only = dataclasses.replace(
        untuned(cell), scheme=dataclasses.replace(cell.scheme, activation=None, kv=None)
    )
    model, _ = load(weights_only, folder, base, device)
    fine_tuned_from = BaseModel.stated(cell, stored.manifest)
    linears = _make_trainable(cell, model, folder, stored, tuning, device, fine_tuned_from)
    teacher = None
    if "teacher" in part.needs:
        teacher = FrozenModel(load(baseline_of(cell), folder, None, device)[0], device)

    parameters = [parameter for linear in linears.values() for parameter in linear.parameters()]
    others = _others(model, parameters) if getattr(tuning, "trains_others", False) else {}
    parameters += others.values()
    student = LanguageModel(model, device)
    training = tuning.tune(
        student, teacher, parameters, windows, generator(cell.seed, -1, "tuning")
    )
    notes, shown = {}, 0.0
    while True:
        try:
            with torch.enable_grad():
                step, steps = next(training)
        except StopIteration as end:
            notes = end.value
            break
        if step == steps or time.monotonic() - shown > 1:
            shown = time.monotonic()
            yield Progress(time.time(), keys, "tuning", step, steps)
    _write(cell, folder, stored, linears, writer, fine_tuned_from, others)
    report = _report(cell, stored, windows, notes, parameters, time.monotonic() - began)
    manifest = writer.finish(_with_others(report, others) if others else report)
    yield Quantized(
        time.time(),
        keys,
        {key: manifest[key] for key in manifest if key not in ("files", "linears")},
    )


class _TransformedInput(nn.Module):
    """A trained linear behind what the base's transform does to its input (`numerics.inputs`)."""

    def __init__(self, linear: nn.Module, held: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self._names = linear, tuple(held)
        for name, tensor in held.items():
            self.register_buffer(
                name, tensor.to(dtype) if tensor.is_floating_point() else tensor, persistent=False
            )

    def forward(self, x: Tensor) -> Tensor:
        transformed: Tensor = self.linear(
            inputs.apply(x, {name: self.get_buffer(name) for name in self._names})
        )
        return transformed


def _make_trainable(
    cell: Cell,
    model: Any,
    folder: Path,
    stored: Checkpoint,
    tuning: Any,
    device: str,
    fine_tuned_from: BaseModel | None,
) -> dict[tuple[int, str], Any]:
    """Put the tuning's linears in the places of the quantized ones; the result by block and name."""
    data = read_config(folder)
    family = family_of(data)
    config = family.config(data)
    weights = ModelWeights(folder, family.skeleton(config, DTYPES[cell.model.dtype]))
    model.requires_grad_(False)
    linears: dict[tuple[int, str], Any] = {}
    for index, block in enumerate(family.blocks(model)):
        content: BlockContent = on_base(stored.block(index), fine_tuned_from, index)
        for location in family.locations(config, index):
            owner = location.parameter.rpartition(".")[0]
            module = block.get_submodule(owner)
            if not (location.is_whole and isinstance(module, QuantizedLinear)):
                raise MethodError(
                    f"{cell.title}: {location.name} of block {index} is part of a fused parameter, "
                    "and tuning replaces whole linears"
                )
            bias = None if module.bias is None else module.bias.detach()
            original = (
                None if content.dense else _original(family, weights, config, index, location)
            )
            try:
                bits = cell.scheme.weight_for(index, location.name).bits
                linear = tuning.linear(
                    location.name, content.weights[location.name].at(bits), bias, original
                )
            except MethodError as error:
                raise MethodError(
                    f"{cell.title}: block {index}, {location.name}: {error}"
                ) from error
            parent, _, leaf = owner.rpartition(".")
            held = {
                name: content.dense[f"{owner}.{name}"]
                for name in inputs.NAMES
                if f"{owner}.{name}" in content.dense
            }
            dtype = DTYPES[cell.model.dtype]
            placed = _TransformedInput(linear, held, dtype) if held else linear
            setattr(block.get_submodule(parent), leaf, placed.to(device))
            linears[index, location.name] = linear
    return linears


def _others(model: Any, linears: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Every parameter of the model outside the trained linears, now trained too, by its name."""
    known = {id(parameter) for parameter in linears}
    found = {name: each for name, each in model.named_parameters() if id(each) not in known}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _with_others(report: dict[str, Any], others: Mapping[str, Tensor]) -> dict[str, Any]:
    """The manifest's report of a checkpoint that stores every parameter outside its matrices, because all were trained."""
    stored = sum(each.numel() * each.element_size() for each in others.values())
    delta = {"delta": {**report["delta"], "ends_bytes": stored}} if "delta" in report else {}
    return {**report, "unquantized_bits": 8 * stored, **delta}


def _write(
    cell: Cell,
    folder: Path,
    stored: Checkpoint,
    linears: dict[tuple[int, str], Any],
    writer: CheckpointWriter,
    fine_tuned_from: BaseModel | None,
    others: Mapping[str, Tensor],
) -> None:
    """Every block with its trained matrices; what the base changed besides them as it is there, or as training left it.

    others: parameters outside the matrices that were trained, by their name in the model.
    """
    trained = {name: each.detach() for name, each in others.items()}
    broken = [name for name, each in trained.items() if not bool(torch.isfinite(each).all())]
    if broken:
        raise MethodError(
            f"{cell.title}: {', '.join(broken[:4])} hold NaN or infinity after training; lower the learning rate"
        )
    data = read_config(folder)
    family = family_of(data)
    config = family.config(data)
    model_weights = ModelWeights(folder, family.skeleton(config, DTYPES[cell.model.dtype]))
    for index in range(stored.manifest["blocks"]):
        base = on_base(stored.block(index), fine_tuned_from, index)
        weights = {
            name: linear.stored() for (block, name), linear in linears.items() if block == index
        }
        entries = {}
        locations = {location.name: location for location in family.locations(config, index)}
        for name, weight in weights.items():
            values = weight.dequantize().cpu()
            if not bool(torch.isfinite(values).all()):
                place = f"{cell.title}: {name} of block {index}"
                raise MethodError(
                    f"{place} holds NaN or infinity after training; lower the learning rate"
                )
            entries[name] = {"bits_per_weight": weight.bits_per_weight}
            if not base.dense:  # a rescaled block has no matrix of the model to compare with
                original = _original(family, model_weights, config, index, locations[name])
                entries[name] = {
                    "weight_error": _share(values - original, original),
                    **entries[name],
                }
            before = base.weights[name].dequantize()
            entries[name]["weight_change"] = _share(values - before, before)
        prefix = family.block_prefix(index)
        own = {n.removeprefix(prefix): each for n, each in trained.items() if n.startswith(prefix)}
        writer.write_block(
            index,
            weights,
            {**base.dense, **own},
            {"linears": entries, "notes": base.report.get("notes", {})},
        )
    inside = f"{family.blocks_name}."
    ends = stored.ends() | {n: each for n, each in trained.items() if not n.startswith(inside)}
    if ends:
        writer.write_ends(ends)


def _original(
    family: DecoderFamily, weights: ModelWeights, config: Any, index: int, location: WeightLocation
) -> Tensor:
    """The model's own matrix [out, in], float32 on the CPU."""
    return location.view(
        weights.read(family.block_prefix(index) + location.parameter, torch.float32, "cpu")
    )


def _share(difference: Tensor, whole: Tensor) -> float:
    """||difference||² / ||whole||²"""
    return float(
        difference.square().sum() / whole.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    )


def _report(
    cell: Cell,
    stored: Checkpoint,
    windows: Tensor | Sequence[Document],
    notes: Any,
    parameters: Sequence[nn.Parameter],
    seconds: float,
) -> dict[str, Any]:
    """The manifest without the blocks; sizes outside the matrices and coverage are those of the base."""
    base, part = stored.manifest, cell.method.tuning
    assert part is not None
    if isinstance(windows, Tensor):
        samples, length = windows.shape
        text = {"windows_sha256": windows_digest(windows), "samples": samples, "length": length}
    else:
        tokens = sum(document.tokens.numel() for document in windows)
        text = {
            "documents_sha256": documents_digest(windows),
            "documents": len(windows),
            "tokens": tokens,
        }
    trained = sum(parameter.numel() for parameter in parameters)
    return {
        **{key: base[key] for key in ("parameters", "unquantized_bits", "coverage")},
        # of a fine-tune, of a smaller model
        **{
            key: base[key]
            for key in ("base", "delta", "original_parameters", "reduced")
            if key in base
        },
        "seconds": base["seconds"] + seconds,
        "methods": {**base["methods"], "tuning": part.name},
        "calibration": text,
        "tuning": {
            "trained_parameters": trained,
            "base": base["fingerprint"].get("quantize_key", ""),
            **notes,
        },
    }


__all__ = ["FrozenModel", "LanguageModel", "run_tuning"]
