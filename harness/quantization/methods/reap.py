"""REAP: of every mixture, the experts whose gated outputs are smallest on average are removed, with their rows of the router.

REAP the Experts: Why Pruning Prevails for One-Shot MoE compression (arXiv 2510.13999). Saliency of expert j of a block:

    S_j = mean over the tokens routed to it of g_j(x) · ||f_j(x)||₂        f_j(x) its output before the gate

g_j(x) is the gate as the model applies it: normalized over the token's chosen experts where the model does that. The lowest
floor(experts · share) of each block go; the kept ones stay in order, and top-k stays k: tokens of a removed expert go to the next.
An expert that no token chose has saliency 0. criterion: frequency (tokens), ean_sum (Σ ||f||), ean_mean (mean ||f||) and
weighted_ean_sum (Σ g ||f||) are the other scores of the paper's comparison.

keep_super: experts whose largest |output| exceeds the 99.5th percentile over all experts and a tenth of the maximum, in the first
three quarters of the blocks, are never removed; the authors' code (CerebrasResearch/reap) takes the signed maximum.
"""

from __future__ import annotations

from collections.abc import Generator as Generating
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from harness.core.shapes import Shapes
from harness.quantization.methods.protocols import ExpertOutputs, ModelReader, Survey
from harness.quantization.methods.reducing import text_of

CRITERIA = ("reap", "frequency", "ean_sum", "ean_mean", "weighted_ean_sum")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of the number of experts
SUPER_QUANTILE, SUPER_SHARE, SUPER_BLOCKS = 0.995, 0.1, 0.75


class Reduction:
    """Removes experts."""

    version = 1
    needs = ("expert_output",)
    stochastic = False

    @dataclass(frozen=True)
    class Settings:
        """
        share       of the experts of every block, rounded down; 0: as `experts` says
        experts     how many experts of every block are removed; 0: as `share` says
        criterion   reap, frequency, ean_sum, ean_mean or weighted_ean_sum
        keep_super  never remove experts with extreme outputs
        """

        share: float = 0.5
        experts: int = 0
        criterion: Literal["reap", "frequency", "ean_sum", "ean_mean", "weighted_ean_sum"] = "reap"
        keep_super: bool = False

        def __post_init__(self) -> None:
            if self.criterion not in CRITERIA:
                raise ValueError(f'no criterion "{self.criterion}"; known: {", ".join(CRITERIA)}')
            if not 0 <= self.share < 1 or self.experts < 0:
                raise ValueError(
                    f"share is {self.share} and experts {self.experts}; share lies between 0 and 1, experts is a number from 1"
                )
            if bool(self.share) == bool(self.experts):
                raise ValueError("state one of share and experts; set the other to 0")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
        """Mixtures whose experts are all chosen from one group, with at least as many left as a token chooses."""
        if not any(linear.expert for linear in shapes.linears):
            return ["this model has no experts, or its family does not say where they are"]
        text, reasons = text_of(config), []
        total, remove = shapes.experts, self._count(shapes.experts)
        chosen = text.get("num_experts_per_tok") or 1
        if remove < 1:
            reasons.append(f"of {total} experts none would be removed; raise reduction.share")
        elif total - remove < chosen:
            reasons.append(
                f"of {total} experts {max(0, total - remove)} would be left, and a token chooses {chosen}"
            )
        groups = text.get("n_group") or 1
        if groups > 1 and (total - remove) % groups:
            reasons.append(f"{total - remove} experts cannot be {groups} groups of equal size")
        return reasons

    def config(
        self, config: Mapping[str, Any], choice: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The config with fewer experts."""
        new, text = dict(config), dict(text_of(config))
        for name in COUNTS:
            if text.get(name):
                text[name] -= self._count(text[name])
        return new | text if text_of(config) is config else {**new, "text_config": text}

    def choose(
        self, model: Survey, rng: Generator
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """By block with experts: those that are "kept", the "saliency" of all, and how many were "without_tokens"."""
        seen: dict[int, ExpertOutputs] = {}
        for block in model.surveyed():
            if block.experts is not None:
                seen[block.index] = block.experts
            yield block.index + 1, model.shapes.blocks
        scores = {
            index: saliency(experts, self.settings.criterion) for index, experts in seen.items()
        }
        extreme = self._extreme(seen, model.shapes.blocks)
        kept = {}
        for index, score in scores.items():
            ranked = score.masked_fill(extreme[index], float("inf")).argsort(stable=True)
            kept[str(index)] = sorted(ranked[self._count(score.numel()) :].tolist())
        return {
            "kept": kept,
            "saliency": {str(index): score.tolist() for index, score in scores.items()},
            "without_tokens": {
                str(index): int((experts.tokens == 0).sum()) for index, experts in seen.items()
            },
        }

    def tensors(
        self, choice: Mapping[str, Any], model: ModelReader
    ) -> Iterator[tuple[str, Tensor]]:
        """Everything as it is, but for the kept experts and their rows of the router."""
        yield from model.ends().items()
        for index in range(model.shapes.blocks):
            kept = choice["kept"].get(str(index))
            by_expert = model.expert_tensors(index) if kept is not None else ()
            for name, tensor in model.block(index).items():
                yield model.name(index, name), tensor[kept] if name in by_expert else tensor

    def _count(self, experts: int) -> int:
        """How many of so many experts are removed."""
        return self.settings.experts or int(experts * self.settings.share)

    def _extreme(self, seen: Mapping[int, ExpertOutputs], blocks: int) -> dict[int, Tensor]:
        """By block a mask of the experts that must stay."""
        if not self.settings.keep_super or not seen:
            return {
                index: torch.zeros_like(e.tokens, dtype=torch.bool) for index, e in seen.items()
            }
        largest = torch.cat([experts.largest for experts in seen.values()])
        border = max(float(largest.quantile(SUPER_QUANTILE)), SUPER_SHARE * float(largest.max()))
        return {
            index: (experts.largest > border) & (index < SUPER_BLOCKS * blocks)
            for index, experts in seen.items()
        }


def saliency(experts: ExpertOutputs, criterion: str) -> Tensor:
    """The score of each expert by a criterion, [experts] float64; 0 where no token chose it."""
    tokens = experts.tokens.clamp(min=1)
    return {
        "reap": experts.gated_norm / tokens,
        "frequency": experts.tokens,
        "ean_sum": experts.norm,
        "ean_mean": experts.norm / tokens,
        "weighted_ean_sum": experts.gated_norm,
    }[criterion]
