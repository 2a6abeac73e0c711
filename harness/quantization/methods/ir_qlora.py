"""IR-QLoRA: blocks are shifted so that their codes say most, and adapters have parameter-free paths around their factors.

Accurate LoRA-Finetuning Quantization of LLMs via Information Retention (arXiv 2402.05445).
Rounding (information calibration quantization, §3.2): per block of NF4, with t0 the median and M = max|w - t0|, the shift
t = t0 + f M is searched over f = σ λ k / n, k = -n … n, σ = 1 / Φ⁻¹(0.9677083), for the largest entropy of the codes of w - t; the
first best stays. w' = NF4(w - t) + t', t' the shift in 8 bits: T · table[code], T the largest |t| of 256 blocks. On integer grids
(the authors' second quantizer) the range [min, max] of each group is multiplied by p = 1 ± 0.1 k / 50 for the largest entropy.
Tuning (information elastic connection, §3.3): h = x Aᵀ + β1 P x, y = x W'ᵀ + α/r · (h Bᵀ + β2 R h); P x are the means of r runs of
consecutive entries of x, R h each entry of h out/r times; β1, β2 are trained scalars, 0 at first. Both fold into the factors,
A + β1 P and B + β2 R, which is what is stored and run.

Defaults as in the authors' code (htqin/IR-QLoRA, which learns from texts as QLoRA's code does): λ 0.1, n 100, rank 64, α 16.
Their shipped evaluation quantizes anew, with n 125: other codes than were trained on. Here codes and shifts are stored.

Where we differ: factors and texts as in QLoRA here, described there; integer grids are rounded to nearest, theirs inside GPTQ;
matrices whose size is no multiple of 64 · 256 are taken too; where the rank divides a width not, means are taken over, and spread
from, their greatest common divisor of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Generating
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme, WeightScheme
from harness.core.number_formats import DOUBLE_QUANTIZED, FORMATS
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.adapters import (
    AdapterTuning,
    LowRankLinear,
    StoredSettings,
    Student,
)
from harness.quantization.numerics.block_maxima import (
    SECOND_BLOCK,
    SMALLEST,
    BlockMaxima,
    check_block,
    dynamic_table,
    nearest,
    unit_blocks,
)
from harness.quantization.numerics.grids import Grid, encode, from_range
from harness.quantization.numerics.training import Document
from harness.quantization.numerics.weights import NormalFloatWeight, QuantizedWeight, UniformWeight

SIGMA = 1 / 1.848130637  # NF4's outermost quantile, Φ⁻¹(0.9677083), is the largest magnitude
BLOCKS_AT_ONCE = 2**16
INTEGER_RANGE, INTEGER_STEPS = 0.1, 50


@dataclass(frozen=True)
class ShiftedWeight(QuantizedWeight):
    """A matrix of blocks plus one number per block.

    shift_codes  [blocks] uint8 into `dynamic_table`, times shift_scale [ceil(blocks / 256)] float32
    """

    kind = "shifted"
    base: NormalFloatWeight
    shift_codes: Tensor
    shift_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def contained(self) -> tuple[QuantizedWeight, ...]:
        return (self.base,)

    def dequantize(self) -> Tensor:
        values = self.base.dequantize()
        scale = self.shift_scale.repeat_interleave(SECOND_BLOCK)[: self.shift_codes.numel()]
        shift = dynamic_table().to(scale.device)[self.shift_codes.long()] * scale
        return values + shift.repeat_interleave(self.base.block)[: values.numel()].reshape(
            values.shape
        )

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        inner, meta = self.base.pack()
        tensors = {f"base_{name}": tensor for name, tensor in inner.items()}
        return {**tensors, "shift_codes": self.shift_codes, "shift_scale": self.shift_scale}, {
            "base": meta
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        inner = {
            name.removeprefix("base_"): tensor
            for name, tensor in tensors.items()
            if name.startswith("base_")
        }
        return cls(
            NormalFloatWeight.unpack(inner, meta["base"]),
            tensors["shift_codes"],
            tensors["shift_scale"],
        )


class Rounding:
    """Nearest codes of shifted blocks, or of scaled ranges, whose entropy is largest."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """shift_range: λ, how far shifts are searched, in units of σ M.   shift_steps: n, how many on either side. For NF4 only."""

        shift_range: float = 0.1
        shift_steps: int = 100

        def __post_init__(self) -> None:
            if not self.shift_range >= 0 or self.shift_steps < 0:
                raise ValueError(
                    f"shift_range {self.shift_range} and shift_steps {self.shift_steps} must not be negative"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """NF4 in blocks of 32 to 4096 weights in powers of two, or integers of 2 to 8 bits whose groups divide every layer."""
        if scheme.weight.format == "int":
            return check_uniform(scheme, shapes)

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format != "nf4" or weight.bits != 4:
                yield f'format "{weight.format}" of {weight.bits:g} bits is neither NF4 of 4 bits nor integers; use nf4 or int'
            yield from check_block("NF4", weight.group_size)

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: four copies of weight, and 2^16 blocks in the search."""
        require_finite(weight)
        if scheme.format == "int":
            size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
            groups = weight.reshape(weight.shape[0], -1, size)
            grid = widest_codes(groups, int(scheme.bits), scheme.symmetric, scheme.scale_dtype)
            return UniformWeight.from_grid(
                grid.quantize(groups),
                grid,
                symmetric=scheme.symmetric,
                scale_dtype=scheme.scale_dtype,
            )
        size, flat = scheme.group_size, weight.reshape(-1)
        whole = flat.numel() - flat.numel() % size
        parts = [*flat[:whole].reshape(-1, size).split(BLOCKS_AT_ONCE), flat[whole:].unsqueeze(0)]
        shift = torch.cat([self._shifts(part) for part in parts if part.numel()])
        scaled, values = unit_blocks(flat - shift.repeat_interleave(size)[: flat.numel()], size)
        codes = encode(scaled, FORMATS["nf4"].element).reshape(weight.shape)
        maxima = (
            BlockMaxima.double_quantized(values)
            if scheme.scale_dtype == DOUBLE_QUANTIZED
            else BlockMaxima(values)
        )
        base = NormalFloatWeight(codes, maxima, size)
        largest = torch.stack([group.abs().max() for group in shift.split(SECOND_BLOCK)])
        divisor = largest.clamp(min=SMALLEST).repeat_interleave(SECOND_BLOCK)[: shift.numel()]
        shift_codes = nearest(shift / divisor, dynamic_table().to(shift.device)).to(torch.uint8)
        return ShiftedWeight(base, shift_codes, largest)

    def _shifts(self, blocks: Tensor) -> Tensor:
        """t of each block [n, size], [n] float32."""
        middle = blocks.median(dim=1, keepdim=True).values
        reach = (blocks - middle).abs().amax(dim=1, keepdim=True)
        steps, widest = self.settings.shift_steps, self.settings.shift_range * SIGMA
        factors = torch.linspace(-widest, widest, 2 * steps + 1, dtype=torch.float64).tolist()
        shifts = (factor * reach + middle for factor in factors)
        element, size = FORMATS["nf4"].element, blocks.shape[1]

        def codes(shift: Tensor) -> Tensor:
            return encode(unit_blocks((blocks - shift).reshape(-1), size)[0], element).reshape(
                blocks.shape
            )

        return _most_entropy(shifts, codes, 16).squeeze(1)


def widest_codes(groups: Tensor, bits: int, symmetric: bool, scale_dtype: str) -> Grid:
    """The grid of each of groups [..., g] whose range, times 1, 1.002 … 1.1 or 0.998 … 0.9, gives the codes the largest entropy."""
    lo, hi = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    grow = torch.linspace(1, 1 + INTEGER_RANGE, INTEGER_STEPS + 1)[1:].tolist()
    shrink = torch.linspace(1, 1 - INTEGER_RANGE, INTEGER_STEPS + 1)[1:].tolist()
    flat = groups.reshape(-1, groups.shape[-1])

    def grid(factor: Tensor) -> Grid:
        return from_range(
            lo * factor.reshape(lo.shape),
            hi * factor.reshape(lo.shape),
            bits,
            symmetric,
            "gptq",
            scale_dtype,
        )

    factors = (
        torch.full((flat.shape[0], 1), factor, device=groups.device)
        for factor in [1.0, *grow, *shrink]
    )
    best = _most_entropy(
        factors, lambda factor: grid(factor).quantize(groups).reshape(flat.shape), 2**bits
    )
    return grid(best)


def _most_entropy(
    candidates: Iterator[Tensor], codes: Callable[[Tensor], Tensor], count: int
) -> Tensor:
    """The first candidate of each block whose codes [n, size] have the largest entropy; candidates and result [n, 1]."""
    best = next(candidates)
    highest = entropy(codes(best), count)
    for candidate in candidates:
        found = entropy(codes(candidate), count)
        better = found > highest
        best, highest = (
            torch.where(better.unsqueeze(1), candidate, best),
            torch.where(better, found, highest),
        )
    return best


def entropy(codes: Tensor, count: int) -> Tensor:
    """Entropy in bits of each row's codes [n, size] among `count` values, [n] float32."""
    size = codes.shape[1]
    share = torch.arange(size + 1, device=codes.device) / size
    terms = torch.where(
        share > 0, -share * torch.log2(share.clamp(min=torch.finfo(share.dtype).tiny)), 0
    )
    return torch.stack([terms[(codes == value).sum(1)] for value in range(count)]).sum(0)


class Tuning(AdapterTuning):
    """Fine-tuning of adapters with elastic connections."""

    version = 1
    needs = ("documents",)
    stochastic = True
    activation_aware = False
    keeps_zeros = True  # of a pruned matrix: adapters lie beside it
    settings: Settings

    @dataclass(frozen=True)
    class Settings(StoredSettings):
        """The settings of adapters that are not merged; the factors are stored with their paths folded in."""

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Any weights; `linears` must name linears of the model."""
        return self.unknown_linears([linear.name for linear in shapes.linears])

    def adapted(self, weight: QuantizedWeight, bias: Tensor | None) -> LowRankLinear:
        """Factors as wide as the matrix, and the paths around them."""
        return _ElasticLinear(weight, bias, self.settings)

    def tune(
        self,
        student: Student,
        teacher: Student | None,
        parameters: Sequence[nn.Parameter],
        windows: Sequence[Document],
        rng: Generator,
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """Train on the documents; notes: mean losses of equal stretches of the steps, the documents, the largest |β1| and |β2|."""
        notes = yield from super().tune(student, teacher, parameters, windows, rng)
        elastic = [linear for linear in self._linears if isinstance(linear, _ElasticLinear)]
        scalars = [(linear.before, linear.after) for linear in elastic]
        largest = [
            max((float(each.detach().abs()) for each in kind), default=0.0)
            for kind in zip(*scalars, strict=True)
        ]
        return {**notes, "largest_connections": largest}


class _ElasticLinear(LowRankLinear):
    """A frozen linear with factors and the paths around them; β1 is `before`, β2 `after`."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, settings: Tuning.Settings
    ) -> None:
        super().__init__(weight, bias, settings, weight.shape[1], settings.adapter_dtype)
        self.before, self.after = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def change(self, x: Tensor) -> Tensor:
        down, up, before, after = (
            part.to(x.dtype) for part in (self.down, self.up, self.before, self.after)
        )
        hidden = nn.functional.linear(self.drop(x), down) + before * resized(x, down.shape[0])
        return (
            nn.functional.linear(hidden, up) + after * resized(hidden, up.shape[0])
        ) * self.scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        """A + β1 P and B + β2 R."""
        rank, columns = self.down.shape
        means = resized(torch.eye(columns, device=self.down.device), rank).T
        copies = resized(torch.eye(rank, device=self.down.device), self.up.shape[0]).T
        return self.down + self.before * means, self.up + self.after * copies


def resized(x: Tensor, width: int) -> Tensor:
    """x [..., n] as [..., width] without parameters: means of gcd(n, width) runs of consecutive entries, each repeated."""
    runs = math.gcd(x.shape[-1], width)
    return x.unflatten(-1, (runs, -1)).mean(-1).repeat_interleave(width // runs, dim=-1)
