"""AWQ: input channels that carry large activations are scaled up before rounding, and weights are clipped group by group.

AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (arXiv 2306.00978).

Transform. Objective: min over s of ||Q(W diag(s)) diag(s)⁻¹ X - W X||² (eq. 4) with s = mean|x|^r (eq. 5), r = 0, 1/20, … 19/20,
normalised by sqrt(max s · min s); the first least error wins. All searches of a block see its unchanged weights; then diag(s)
goes into the linears and its inverse into the norm or linear before them, which leaves the block's function as it was.
Rounding. Every group is clamped to ±c max|w|, c = 1, 0.95, … 0.55, with the least error of its part of the dot product over
512 tokens, and then rounded to nearest. Queries and keys are not clipped: their product amplifies what clipping removes.

Where we differ from the authors' code: where one linear is its own region the loss is tr(D H Dᵀ) / out from the Hessian instead
of twenty forward passes, and the clipping loss is dᵀ H_g d from the second moment of each group (both the same sums in another
order); statistics come from whatever inputs the cell states (theirs: inputs=full_precision); fewer than 512 tokens are all used,
where theirs fail; a linear's bias is divided only where its rows are. With one scale per output channel their clipping search
fails, so here it is left out then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import ScalePair, Shapes
from harness.quantization.methods.checks import check_grid, require_finite, require_search
from harness.quantization.methods.folding import fold_scales, makes_values, repeat_scales
from harness.quantization.methods.protocols import BlockView, Evidence
from harness.quantization.numerics.grids import CONVENTIONS, Fitting
from harness.quantization.numerics.pruned_search import first_least
from harness.quantization.numerics.weights import QuantizedWeight, on_grid

QUERY_AND_KEY = ("q_", "k_", "query", "key", "Wqkv")


def _nearest(weight: Tensor, scheme: WeightScheme, convention: str) -> Tensor:
    """weight [out, in] on the grid of its groups, in numbers."""
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    grouped = weight.reshape(weight.shape[0], -1, size)
    grid = Fitting.of(weight, scheme, convention).fit(grouped)
    return grid.nearest(grouped).reshape(weight.shape)


class Transform:
    """Activation-aware scales, folded into the operation before."""

    version = 1
    needs = ("abs_mean", "hessian")
    stochastic = False
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """
        exponents             number of exponents tried: 0, 1/n, … (n-1)/n
        grid                  of the rounding inside the search: gptq, awq, omniquant or compressed
        scale_grouped_values  also scale value → output where several query heads share one value head, by the mean over
                              the heads that share it; the authors leave such a pair out
        """

        exponents: int = 20
        grid: str = "awq"
        scale_grouped_values: bool = False

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')
            if self.exponents < 1:
                raise ValueError(f"exponents is {self.exponents}; it must be at least 1")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Formats whose groups divide every layer, in a family that states where scales can be folded."""
        reasons = check_grid(scheme, shapes, convention=self.settings.grid)
        if not shapes.pairs:
            reasons.append(f'family "{shapes.family}" states no place where a scale can be folded')
        return reasons

    @torch.no_grad()
    def rewrite_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, Any]:
        """Scale the block in place; notes: by pair, the exponent, its loss and the loss without scaling; the pairs left out."""
        chosen: list[tuple[ScalePair, Tensor]] = []
        notes: dict[str, Any] = {}
        left_out: list[str] = []
        for pair in block.shapes.pairs:
            title = f"{pair.producer} → {', '.join(pair.consumers)}"
            if (
                makes_values(pair)
                and not self.settings.scale_grouped_values
                and not _same_shape(block, pair)
            ):
                left_out.append(title)
                continue
            scales, notes[title] = self._search(block, pair, scheme)
            chosen.append((pair, scales))
        for pair, scales in chosen:
            fold_scales(block, pair, scales)
        return {"scales": notes, "left_out": left_out}

    def _search(
        self, block: BlockView, pair: ScalePair, scheme: Scheme
    ) -> tuple[Tensor, dict[str, float]]:
        """The scales of the producer's channels [in / repeats] with the least loss, and what the record should hold."""
        weights = {name: block.linear(name).weight.float() for name in pair.consumers}
        schemes = {name: scheme.weight_for(block.index, name) for name in pair.consumers}
        activity = block.evidence[pair.consumers[0]]["abs_mean"].float()
        if pair.repeats > 1:  # [kv heads, repeats, head_dim] -> one per kv channel
            activity = activity.reshape(-1, pair.repeats, block.shapes.head_dim).mean(1).reshape(-1)

        def scales_of(step: int) -> Tensor:
            scales = activity.pow(step / self.settings.exponents).clamp(min=1e-4)
            return scales / (scales.max() * scales.min()).sqrt()

        def rounded(step: int) -> dict[str, Tensor]:
            columns = repeat_scales(scales_of(step), pair, block.shapes)
            return {
                name: _nearest(weight * columns, schemes[name], self.settings.grid) / columns
                for name, weight in weights.items()
            }

        def of_linears(step: int, start: int) -> Iterator[float]:
            if start == 0:
                yield _hessian_loss(block, weights, rounded(step))

        steps, terms, divisor, tried = self.settings.exponents, of_linears, 1, 1
        if pair.region:
            outputs = _OutputLoss(block, pair)
            divisor, tried = outputs.count, max(1, len(outputs.originals) // 8)

            def terms(step: int, start: int) -> Iterator[float]:
                return outputs.terms(rounded(step), start)

        found = first_least(steps, terms, divisor, tried=tried, complete=(0,))
        best = None if found.index is None else scales_of(found.index)
        # NaN to the power 0 is 1: broken activations would pass as no scaling at all.
        if (
            found.index is None
            or best is None
            or not bool(torch.isfinite(best).all() & torch.isfinite(activity).all())
        ):
            raise MethodError(
                f"block {block.index}: no scale for {pair.producer} → {', '.join(pair.consumers)} has a finite loss; "
                "the activations or weights hold NaN or infinity; load the model in a wider dtype (model.dtype=float32)"
            )
        return best, {
            "exponent": found.index / steps,
            "loss": found.values[found.index],
            "loss_without": found.values[0],
        }


class _OutputLoss:
    """Squared change of a region's output when its linears are rounded.

    originals  the region's full-precision outputs, one per sequence: the same for all cells of a stream, so computed once for them
    count      of numbers in all of them
    """

    def __init__(self, block: BlockView, pair: ScalePair) -> None:
        self.block, self.region = block, pair.region
        self.dtypes = {name: block.linear(name).weight.dtype for name in pair.consumers}
        self.originals: list[Tensor] = block.evidence[pair.consumers[0]].once(
            ("outputs of the original region", pair.region), self._run_original
        )
        self.count = sum(original.numel() for original in self.originals)

    def _run_original(self) -> list[Tensor]:
        return [
            self.block.run_region(self.region, index).to(hidden.device)
            for index, hidden in enumerate(self.block.inputs())
        ]

    def terms(self, rounded: Mapping[str, Tensor], start: int) -> Iterator[float]:
        """The sum of squares over each sequence, from sequence `start` on."""
        named = {f"{name}.weight": weight.to(self.dtypes[name]) for name, weight in rounded.items()}
        for index in range(start, len(self.originals)):
            output = self.block.run_region(self.region, index, named)
            change = (output - self.originals[index].to(output.device)).float()
            yield float(change.square().sum(dtype=torch.float64))


def _hessian_loss(
    block: BlockView, weights: Mapping[str, Tensor], rounded: Mapping[str, Tensor]
) -> float:
    """Mean over tokens and outputs of ((W' - W) x)², from the second moment of x."""
    total, outputs = 0.0, 0
    for name, weight in weights.items():
        change = rounded[name] - weight
        total += float(
            ((change @ block.evidence[name]["hessian"]) * change).sum(dtype=torch.float64)
        )
        outputs += weight.shape[0]
    return total / outputs


def _same_shape(block: BlockView, pair: ScalePair) -> bool:
    return all(
        block.linear(name).weight.shape == block.linear(pair.producer).weight.shape
        for name in pair.consumers
    )


class Rounding:
    """Clipping search, then round to nearest."""

    version = 1
    needs = ("inputs",)
    stochastic = False
    activation_aware = False
    sequential = False
    settings_added_later: ClassVar[dict[str, str]] = {"scale_search": "none"}

    @dataclass(frozen=True)
    class Settings:
        """
        clip         search a clipping range per group; has no effect with one scale per output channel
        clip_tokens  tokens of the search, taken at equal distances
        clip_steps   ranges tried: 1, 1 - 1/20, … in steps of 1/20 of max|w|; 1 to 20
        grid         gptq, awq, omniquant or compressed
        scale_search  choose among scales beside each group's own: none, range, neighbours, neighbours_mae or both, as in RTN
        """

        clip: bool = True
        clip_tokens: int = 512
        clip_steps: int = 10
        grid: str = "awq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')
            require_search(self.scale_search)
            if self.clip_tokens < 1:
                raise ValueError(f"clip_tokens is {self.clip_tokens}; it must be at least 1")
            if not 1 <= self.clip_steps <= 20:
                raise ValueError(f"clip_steps is {self.clip_steps}; it must be from 1 to 20")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every format with a grid, integers of 2 to 8 bits among them, whose groups divide every layer."""
        return check_grid(
            scheme, shapes, convention=self.settings.grid, search=self.settings.scale_search
        )

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: five copies of weight, and the inputs of the search in float32."""
        assert evidence is not None, "awq needs the layer's inputs"
        require_finite(weight)
        settings = self.settings
        size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        grouped = weight.reshape(weight.shape[0], -1, size)  # [out, groups, g]
        fitting = Fitting.of(weight, scheme, settings.grid, settings.scale_search)
        is_query_or_key = any(part in name.rpartition(".")[2] for part in QUERY_AND_KEY)
        if settings.clip and scheme.group_size != -1 and not is_query_or_key:
            moments = evidence.once(
                ("group moments", size, settings.clip_tokens),
                lambda: group_moments(evidence["inputs"], size, settings.clip_tokens),
            )
            if not bool(torch.isfinite(moments).all()):
                raise MethodError(
                    f"{name}: the calibration inputs hold NaN or infinity; load the model in a wider dtype (model.dtype=float32) "
                    "or use other calibration text"
                )
            bound = self._clip(grouped, moments, fitting)
            grouped = grouped.clamp(-bound, bound)
        grid = fitting.fit(grouped)
        return on_grid(grid.quantize(grouped), grid, scheme)

    def _clip(self, grouped: Tensor, moments: Tensor, fitting: Fitting) -> Tensor:
        """The largest magnitude to keep in each group [out, groups, 1]: least dᵀ M d, the first of equals."""
        largest = grouped.abs().amax(-1, keepdim=True)
        best, lowest = largest.clone(), torch.full_like(largest, torch.inf)
        for step in range(self.settings.clip_steps):
            bound = largest * (1 - step / 20)
            clipped = grouped.clamp(-bound, bound)
            # [groups, out, g]
            change = (fitting.fit(clipped).nearest(clipped) - grouped).transpose(0, 1)
            error = (torch.bmm(change, moments) * change).sum(-1, keepdim=True).transpose(0, 1)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            best = torch.where(better, bound, best)
        return best


def group_moments(inputs: Tensor, group_size: int, tokens: int) -> Tensor:
    """Mean of x xᵀ within every group, [groups, g, g] float32, over about `tokens` of the inputs [..., in] at equal distances."""
    x = inputs.reshape(-1, inputs.shape[-1])
    x = x[:: max(1, x.shape[0] // tokens)].float()
    x = x.reshape(x.shape[0], -1, group_size).transpose(0, 1)  # [groups, tokens, g]
    return torch.bmm(x.transpose(1, 2), x) / x.shape[1]
