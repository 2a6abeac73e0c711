"""OmniQuant: clipping strengths of every grid, and scales between operations, are trained block by block.

OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models (arXiv 2308.13137).
Objective (eq. 1): min over the learned parameters of ||F(W, X) - F(Qw(W), Qa(X'))||², F a decoder block, X its inputs in the
full-precision model, X' its inputs behind the quantized blocks. Gradients pass rounding straight through.

Learnable weight clipping (eq. 2): per group, hi = sigmoid(γ) max w and lo = sigmoid(β) min w on an asymmetric grid whose range need
not hold zero; γ = β = 4 at first, so that even untrained ranges are shrunk to sigmoid(4) = 0.982.
Learnable equivalent transformation (eq. 3, 4), off unless transform=true: norm → q, k, v, norm → gate, up and v → o are scaled
by s, queries by 1 / s and keys by s; at first s = max|x|^exponent / max|W|^(1 - exponent), 1 between queries and keys. shift moves
their outputs as well, where there are biases: y = (W s) ((x - d) / s) + W d + b.
The activations of the scheme, if it has any, are rounded while the block is trained: W4A4 and W6A6 are the same method.

Where we differ from the authors' code: float32 instead of float16 autocast; scales are rounded to their storage type while they
are trained; activations are rounded where the scheme says, at the inputs of linears, while the authors' W4A4 also rounds queries,
keys and values inside attention. Scales of queries and keys are tied over the two halves of a head, because rotary positions mix
them: untied, as published, the transformation changes the function. Their transformation does not run with grouped-query
attention; grouped_heads=true is our extension, scales tied over the query heads that share a key-value head. The largest
activations that start the scales are those of the cell's input stream; theirs are of the full-precision model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.blockwise import activation_reasons, activation_rounding
from harness.quantization.methods.checks import check_uniform, require_finite
from harness.quantization.methods.folding import makes_values, repeat_scales
from harness.quantization.methods.protocols import BlockView
from harness.quantization.numerics.grids import CONVENTIONS, Grid
from harness.quantization.numerics.training import clipped_grid, nearest_through, train
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

INITIAL_STRENGTH = 4.0
SMALLEST_SCALE = 1e-2
FLOOR = 1e-5  # lower bound of the maxima that start the scales


class Rounding:
    """Rounding to grids, and between scales, that are trained to keep each block's output."""

    version = 1
    needs = ("reference",)
    stochastic = False
    activation_aware = True
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        epochs          passes over the calibration sequences per block; 0: untrained
        clip            learn clipping strengths
        clip_rate       learning rate of the clipping strengths
        transform       learn scales between operations (the authors': OPT, and weights with activations)
        scale_rate      learning rate of scales and shifts
        exponent        of the activations' share in the initial scales; 0 to 1
        shift           learn shifts at the same places; needs biases
        grouped_heads   scale inside grouped-query attention with tied scales, our extension
        augmented_loss  add the distance to the full-precision block on the quantized inputs
        grid            omniquant (as published), gptq, awq or compressed
        """

        epochs: int = 20
        clip: bool = True
        clip_rate: float = 0.01
        transform: bool = False
        scale_rate: float = 0.005
        exponent: float = 0.5
        shift: bool = False
        grouped_heads: bool = False
        augmented_loss: bool = False
        grid: str = "omniquant"

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')
            if self.epochs < 0:
                raise ValueError(f"epochs is {self.epochs}; it must be 0 or more")
            if not 0 <= self.exponent <= 1:
                raise ValueError(f"exponent is {self.exponent}; it must be from 0 to 1")
            if not (self.clip_rate > 0 and self.scale_rate > 0):
                raise ValueError(
                    f"clip_rate is {self.clip_rate} and scale_rate {self.scale_rate}; both must be above 0"
                )
            if self.shift and not self.transform:
                raise ValueError("shift is part of the transformation; set transform=true")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Integer grids whose groups divide every layer; what the transformation asks of the family."""
        reasons = check_uniform(scheme, shapes, convention=self.settings.grid)
        reasons += activation_reasons(scheme)
        if not self.settings.transform:
            return reasons
        if not shapes.pairs or shapes.query_key is None:
            reasons.append(
                f'family "{shapes.family}" states no scales between norms, queries and keys; use transform=false'
            )
        if shapes.kv_heads != shapes.heads and not self.settings.grouped_heads:
            heads = f"{shapes.heads} query heads share {shapes.kv_heads} key-value heads"
            reasons.append(
                f"{heads}, which the authors' transformation does not allow; use transform=false, or grouped_heads=true"
            )
        if self.settings.shift:
            used = [pair for pair in shapes.pairs if pair.kind == "norm" or makes_values(pair)]
            moved = {name for pair in used for name in (pair.producer, *pair.consumers)}
            bare = [
                linear.name for linear in shapes.linears if linear.name in moved and not linear.bias
            ]
            if bare:
                reasons.append(
                    f"shift needs biases, and {', '.join(bare)} have none; use shift=false"
                )
        return reasons

    def round_block(
        self, block: BlockView, scheme: Scheme, rng: Generator
    ) -> dict[str, QuantizedWeight]:
        """Quantize the block's linears; norms and biases are rewritten in place where scales were learned.

        Peak memory: the block in float32 four times (weights, scaled, rounded, gradients), and one sequence's activations.
        """
        settings = self.settings
        linears = _Linears(block, scheme, settings)
        scales = _Scales(block, settings) if settings.transform else None
        receive = activation_rounding(block, scheme)

        def tensors() -> dict[str, Tensor]:
            """The block's parameters as they stand: scaled, weights rounded."""
            if scales is not None:
                scales.keep_from_zero()
            scaled = linears.originals if scales is None else scales.apply(linears.originals)
            return {
                name: linears.nearest(name, value) if name in linears.grouped else value
                for name, value in scaled.items()
            }

        inputs, references = block.inputs(), block.references()
        again: list[Tensor] = []
        if settings.augmented_loss and settings.epochs:
            with torch.no_grad():
                again = [block.run(hidden).to(hidden.device) for hidden in inputs]

        def loss_of(sample: int) -> Tensor:
            output = block.run(inputs[sample], linears.cast(tensors()), receive).float()
            loss = (output - references[sample].to(output.device).float()).square().mean()
            if again:
                loss = loss + (output - again[sample].to(output.device).float()).square().mean()
            return loss

        groups = (
            [{"params": linears.strengths(), "lr": settings.clip_rate}] if settings.clip else []
        )
        if scales is not None:
            groups.append({"params": scales.parameters(), "lr": settings.scale_rate})
        losses = train(loss_of, len(inputs), groups, settings.epochs, f"block {block.index}")
        if losses:
            block.notes["omniquant"] = {"loss": losses}
        with torch.no_grad():
            if scales is not None:
                scales.keep_from_zero()
            scaled = linears.originals if scales is None else scales.apply(linears.originals)
            if scales is not None:
                for name, value in scaled.items():
                    parameter = linears.parameters[name]
                    parameter.copy_(value.to(parameter.dtype))
            return {
                name.removesuffix(".weight"): linears.quantize(name, scaled[name])
                for name in linears.grouped
            }


class _Linears:
    """The matrices, biases and norms of a block by parameter name, and the clipping strengths of the matrices' groups."""

    def __init__(self, block: BlockView, scheme: Scheme, settings: Rounding.Settings) -> None:
        self.settings = settings
        self.parameters: dict[str, Tensor] = {}
        self.grouped: dict[str, WeightScheme] = {}  # matrices, by "self_attn.q_proj.weight"
        self.upper: dict[str, nn.Parameter] = {}
        self.lower: dict[str, nn.Parameter] = {}
        for shape in block.shapes.linears:
            name, weight = f"{shape.name}.weight", block.linear(shape.name).weight
            require_finite(weight, shape.name)
            self.parameters[name], self.grouped[name] = (
                weight.detach(),
                scheme.weight_for(block.index, shape.name),
            )
            if settings.clip:
                size = self._size(name)
                start = torch.full(
                    (weight.shape[0], weight.shape[1] // size, 1),
                    INITIAL_STRENGTH,
                    device=weight.device,
                )
                self.upper[name], self.lower[name] = (
                    nn.Parameter(start),
                    nn.Parameter(start.clone()),
                )
        if settings.transform:
            self.parameters |= _biases_and_norms(block)
        self.originals = {name: value.float().clone() for name, value in self.parameters.items()}

    def strengths(self) -> list[nn.Parameter]:
        return [*self.upper.values(), *self.lower.values()]

    def nearest(self, name: str, weight: Tensor) -> Tensor:
        """The matrix on the grids as they stand, [out, in], differentiable."""
        groups = weight.reshape(weight.shape[0], -1, self._size(name))
        return nearest_through(groups, self._grid(name, groups)).reshape(weight.shape)

    def quantize(self, name: str, weight: Tensor) -> UniformWeight:
        """The codes of the weights that `nearest` returns."""
        scheme = self.grouped[name]
        groups = weight.reshape(weight.shape[0], -1, self._size(name))
        grid = self._grid(name, groups)
        codes = grid.quantize(groups)
        return UniformWeight.from_grid(
            codes, grid, symmetric=scheme.symmetric, scale_dtype=scheme.scale_dtype
        )

    def cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the model's dtype, as the block runs."""
        return {name: value.to(self.parameters[name].dtype) for name, value in tensors.items()}

    def _size(self, name: str) -> int:
        size = self.grouped[name].group_size
        return self.parameters[name].shape[1] if size == -1 else size

    def _grid(self, name: str, groups: Tensor) -> Grid:
        scheme, whole = self.grouped[name], groups.new_full((1,), math.inf)  # sigmoid(inf) is 1
        upper, lower = self.upper.get(name, whole), self.lower.get(name, whole)
        return clipped_grid(
            groups,
            upper,
            lower,
            int(scheme.bits),
            scheme.symmetric,
            self.settings.grid,
            scheme.scale_dtype,
        )


class _Scales:
    """The learned equivalent transformation of a block: one scale per channel of each place where one can be folded."""

    def __init__(self, block: BlockView, settings: Rounding.Settings) -> None:
        shapes = block.shapes
        assert shapes.query_key is not None, "refused by check"
        self.shapes, self.query_key = shapes, shapes.query_key
        self.pairs = [pair for pair in shapes.pairs if pair.kind == "norm" or makes_values(pair)]
        ranges = _input_ranges(block)
        groups = {linear.name: linear.group for linear in shapes.linears}
        self.scales: list[nn.Parameter] = []
        self.shifts: list[nn.Parameter | None] = []
        for pair in self.pairs:
            # as in the authors' code, one of the readers stands for all: queries, and of gate and up the latter
            reader = next(
                (name for name in pair.consumers if "up" in name.rpartition(".")[2]),
                pair.consumers[0],
            )
            largest, centre = ranges[groups[reader]]
            columns = block.linear(reader).weight.detach().float().abs().amax(0)
            if pair.repeats > 1:  # [kv heads, repeats, head_dim] -> one per kv channel
                largest, columns = (
                    v.reshape(-1, pair.repeats, shapes.head_dim).amax(1).reshape(-1)
                    for v in (largest, columns)
                )
                centre = centre.reshape(-1, pair.repeats, shapes.head_dim).mean(1).reshape(-1)
            a = settings.exponent
            start = (largest.clamp(min=FLOOR).pow(a) / columns.clamp(min=FLOOR).pow(1 - a)).clamp(
                min=FLOOR
            )
            self.scales.append(nn.Parameter(start))
            self.shifts.append(nn.Parameter(centre) if settings.shift else None)
        device = block.linear(self.query_key[0]).weight.device
        self.rotary = nn.Parameter(torch.ones(shapes.kv_heads, shapes.head_dim // 2, device=device))

    def parameters(self) -> list[nn.Parameter]:
        return [*self.scales, *(shift for shift in self.shifts if shift is not None), self.rotary]

    @torch.no_grad()
    def keep_from_zero(self) -> None:
        """Push scales out of ±0.01, in place: their inverses would explode."""
        for scale in (*self.scales, self.rotary):
            edge = torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE)
            scale.copy_(torch.where(scale.abs() < SMALLEST_SCALE, edge, scale))

    def apply(self, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's parameters with every scale divided out where it is made and multiplied in where it is read."""
        tensors = dict(originals)
        for pair, parameter, shift in zip(self.pairs, self.scales, self.shifts, strict=True):
            if shift is not None:  # values too: attention's weights sum to 1
                tensors[f"{pair.producer}.bias"] = tensors[f"{pair.producer}.bias"] - shift
                for name in pair.consumers:
                    moved = tensors[f"{name}.weight"] @ repeat_scales(shift, pair, self.shapes)
                    tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + moved
            _scale_rows(tensors, pair.producer, 1 / parameter, pair.offset)
            columns = repeat_scales(parameter, pair, self.shapes)
            for name in pair.consumers:
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * columns
        # rotary positions mix channel i with i + head_dim / 2
        keys = torch.cat((self.rotary, self.rotary), dim=-1)
        queries = keys.repeat_interleave(self.shapes.heads // self.shapes.kv_heads, dim=0)
        _scale_rows(tensors, self.query_key[0], 1 / queries.reshape(-1))
        _scale_rows(tensors, self.query_key[1], keys.reshape(-1))
        return tensors


def _scale_rows(tensors: dict[str, Tensor], name: str, factor: Tensor, offset: float = 0.0) -> None:
    """Multiply what module `name` puts out by factor [out]; of a norm the weight is what it puts out."""
    weight = tensors[f"{name}.weight"]
    rows = factor if weight.ndim == 1 else factor[:, None]
    tensors[f"{name}.weight"] = (weight + offset) * rows - offset if offset else weight * rows
    if f"{name}.bias" in tensors:
        tensors[f"{name}.bias"] = tensors[f"{name}.bias"] * factor


@torch.no_grad()
def _input_ranges(block: BlockView) -> dict[str, tuple[Tensor, Tensor]]:
    """By group of linears: max|x| over all tokens, and the moving average over sequences of (max + min) / 2; both [in]."""
    groups = {linear.name: linear.group for linear in block.shapes.linears}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def receive(name: str, inputs: Tensor) -> Tensor:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        lo, hi = x.amin(0), x.amax(0)
        largest, centre = torch.maximum(hi.abs(), lo.abs()), (hi + lo) / 2
        if name in first:
            if groups[name] in found:
                before = found[groups[name]]
                largest, centre = (
                    torch.maximum(before[0], largest),
                    0.99 * before[1] + 0.01 * centre,
                )
            found[groups[name]] = largest, centre
        return inputs

    # linears of a group read the same, and a fused parameter asks by its first linear
    first = set({group: name for name, group in reversed(groups.items())}.values())
    for hidden in block.inputs():
        block.run(hidden, None, receive)
    return found


def _biases_and_norms(block: BlockView) -> dict[str, Tensor]:
    """Parameters besides the matrices that a transformation changes, by name."""
    own = dict(block.module.named_parameters())
    found: dict[str, Tensor] = {}
    for pair in block.shapes.pairs:
        if pair.kind == "norm":
            found |= {
                name: own[name].detach()
                for name in (f"{pair.producer}.weight", f"{pair.producer}.bias")
                if name in own
            }
    for linear in block.shapes.linears:
        if block.linear(linear.name).bias is None:
            continue
        if f"{linear.name}.bias" not in own:
            fused = f"the bias of {linear.name} is part of a fused one"
            raise MethodError(f"{fused}, which a transformation cannot change; use transform=false")
        found[f"{linear.name}.bias"] = own[f"{linear.name}.bias"].detach()
    return found
