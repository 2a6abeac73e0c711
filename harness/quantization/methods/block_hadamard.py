"""Block Hadamard: every linear's input channels are mixed in blocks of 16 to 128, so that the values that share a scale look alike.

Bridging the Gap Between Promise and Performance for Microscaling FP4 Quantization (arXiv 2509.23202), the rotation of MR-GPTQ.

For every linear y = W x, with H_k Sylvester's Hadamard matrix over sqrt(k), which is symmetric and its own inverse, on consecutive
runs of k = `size` input channels:

    x <- blockdiag(H_k) x        W <- W blockdiag(H_k)

Nothing is folded into a producer, since a norm's gain stands between: the product with x runs online, before the activation is
rounded. q, k and v (gate and up) keep one input and so one Hessian. Three numbers of 32 bits per linear are stored and counted.

Where we differ from the authors' code (no licence is stated; it was neither read nor run): block scales follow OCP MX and NVFP4 as
everywhere here, so MXFP4's may saturate; theirs are 4/3 of a power of two and never do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator

from harness.core.cell import Scheme
from harness.core.shapes import Shapes
from harness.quantization.methods.protocols import BlockView
from harness.quantization.numerics import hadamard

SIZES = (16, 32, 64, 128)


class Transform:
    """Hadamard rotation of every linear's input in small blocks, at run time."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    scheme_independent = True

    @dataclass(frozen=True)
    class Settings:
        """size: k, input channels that are mixed; 128 for accuracy, the block of the format (32 or 16) for fused kernels."""

        size: int = 128

        def __post_init__(self) -> None:
            if self.size not in SIZES:
                known = ", ".join(map(str, SIZES))
                raise ValueError(
                    f"size is {self.size}; known: {known} (leave the transform out to switch it off)"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Inputs that blocks of `size` divide, and linears with inputs of their own."""
        size, reasons = self.settings.size, []
        undivided = dict.fromkeys(
            f"{linear.name} ({linear.in_features})"
            for linear in shapes.linears
            if linear.in_features % size
        )
        if undivided:
            fitting = [
                k for k in SIZES if all(linear.in_features % k == 0 for linear in shapes.linears)
            ]
            remedy = (
                f"use transform.size={fitting[-1]}"
                if fitting
                else f"no size of {', '.join(map(str, SIZES))} divides all inputs of this model"
            )
            reasons.append(
                f"Hadamard blocks of {size} do not divide in_features of {', '.join(undivided)}; {remedy}"
            )
        fused = dict.fromkeys(linear.name for linear in shapes.linears if linear.fused)
        if fused:
            reasons.append(
                f"inputs of fused linears cannot be rotated at run time: {', '.join(fused)}"
            )
        return reasons

    @torch.no_grad()
    def rewrite_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, Any]:
        """Rotate every matrix of the block in place, in float32, and its input at run time; notes: the size."""
        size = self.settings.size
        for linear in block.shapes.linears:
            weight = block.linear(linear.name).weight
            columns = weight.float().unflatten(1, (-1, size))
            weight.copy_(hadamard.transform(columns).flatten(1))
            rows = torch.tensor([[weight.shape[1] // size, size, 1]])
            block.set_input(linear.name, "input_hadamard", rows)
        return {"size": size}
