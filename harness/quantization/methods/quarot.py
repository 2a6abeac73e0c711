"""QuaRot: Hadamard rotations spread outliers over all channels, so that plain rounding of weights, activations and cache works.

QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456).

With norms folded into the linears behind them, RMSNorm(x Q) = RMSNorm(x) Q for every orthogonal Q, so the whole residual stream
can be rotated (§4, stage 1a): embeddings E Q; q, k, v, gate, up and head W Q; o and down Qᵀ W. Q = diag(±1) H, H a Hadamard matrix,
signs from rotation_seed. Inside a block (1b, 1c), with H of the size at hand:

    down    W H, and its input x ← H x at run time
    values  each head's rows H_head_dim V; output columns (H_heads ⊗ H_head_dim); at run time H_heads across heads before o

What runs at run time is stored as an input tensor of the linear (`numerics.inputs`) and executed in float32. Queries and keys
are rotated when keys are rounded: scheme kv.hadamard.

Where we differ from the authors' code: no mean is subtracted from embedding rows, which keeps an RMSNorm model's function
only approximately; a norm keeps its own epsilon; the head dimension is the config's; the full transform of o is the product
H_heads ⊗ H_head_dim for every number of heads; Hadamard matrices of other orders than powers of two are Paley's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_rotations
from harness.quantization.methods.folding import (
    makes_values,
    mlp_outputs,
    put_parameters,
    rotate_block,
    rotate_ends,
    writes_residual,
)
from harness.quantization.methods.protocols import BlockView
from harness.quantization.numerics import hadamard


class Transform:
    """Rotation of the residual stream, of values, and of down_proj's input."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    scheme_independent = True

    @dataclass(frozen=True)
    class Settings:
        """
        rotation_seed  of the residual rotation's signs; 0 and up
        online         also rotate the inputs of o and down at run time
        """

        rotation_seed: int = 0
        online: bool = True

        def __post_init__(self) -> None:
            if self.rotation_seed < 0:
                raise ValueError(f"rotation_seed is {self.rotation_seed}; it must be 0 or more")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Reasons to refuse: a residual stream that cannot be rotated, fused output linears, sizes without Hadamard matrices."""
        reasons = check_rotations(shapes)
        if not shapes.rotations or shapes.ends is None:
            return reasons
        sizes = {"the residual stream": shapes.hidden_size, "a head": shapes.head_dim}
        if self.settings.online:
            inner = {
                linear.name: linear.in_features
                for linear in shapes.linears
                if linear.name in mlp_outputs(shapes)
            }
            sizes |= {"the heads": shapes.heads, **inner}
            fused = [
                linear.name
                for linear in shapes.linears
                if linear.fused and linear.name in writes_residual(shapes)
            ]
            if fused:
                reasons.append(
                    f"inputs of fused linears cannot be rotated at run time: {', '.join(fused)}; use online=false"
                )
        return reasons + hadamard.unknown_sizes(sizes)

    @torch.no_grad()
    def rewrite_ends(
        self, ends: dict[str, Tensor], shapes: Shapes, scheme: Scheme, rng: Generator
    ) -> dict[str, Tensor]:
        """Embeddings, final norm and head of the rotated residual stream."""
        return rotate_ends(ends, shapes, self._rotation(shapes, torch.device("cpu")))

    @torch.no_grad()
    def rewrite_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, Any]:
        """Fold the norms and rotate, in place; notes: what is rotated at run time."""
        shapes, online = block.shapes, self.settings.online
        turn = self._rotation(shapes, next(block.module.parameters()).device)

        def outputs(columns: Tensor, axis: int) -> Tensor:
            columns = hadamard.transform(columns, axis)
            return hadamard.transform(columns, 1) if online else columns

        put_parameters(block, rotate_block(block, turn, hadamard.transform, outputs))
        if online:
            for pair in filter(makes_values, shapes.pairs):
                for name in pair.consumers:
                    block.set_input(
                        name, "input_hadamard", torch.tensor([[1, shapes.heads, shapes.head_dim]])
                    )
            for name in mlp_outputs(shapes):
                weight = block.linear(name).weight
                weight.copy_(hadamard.transform(weight.double()))
                block.set_input(name, "input_hadamard", torch.tensor([[1, weight.shape[1], 1]]))
        return {"online": sorted(writes_residual(shapes)) if online else []}

    def _rotation(self, shapes: Shapes, device: torch.device) -> Tensor:
        return hadamard.random_hadamard(shapes.hidden_size, self.settings.rotation_seed).to(device)
