"""QuIP: rotate weights and Hessian until no direction stands out, round with linear feedback, rotate back.

QuIP: 2-Bit Quantization of Large Language Models With Guarantees (arXiv 2307.13304).
Objective: min tr((W - W') H (W - W')ᵀ) (eq. 1). With W̃ = U W diag(s) Vᵀ, H̃ = V diag(1/s) H diag(1/s) Vᵀ for random orthogonal U, V
(algorithms 1 and 2: incoherence processing) and H̃ = (L + I) D (L + I)ᵀ, columns are rounded from last to first (LDLQ, eq. 2):

    q_i = clamp(floor(t_i + sum over j > i of (t_j - q_j) L_ji + 1/2), 0, 2^bits - 1),      t = clamp((W̃ / S + 1) (2^bits - 1) / 2)

with one scale S = 2.4 · rms(W̃) for the matrix. greedy_passes adds coordinate descent after it ("QuIP-RG").
incoherence=false is the paper's baseline mode: no rotation, GPTQ's asymmetric grid per output channel.

As in the authors' code: values are clamped before rounding, so that clipping errors are not fed back; damping comes on top of
the 0.01 I added to the trace-normalised H̃; greedy passes sort the columns by the diagonal of H̃, and clamp after each pass.
Where we differ (written from the published description; no licence is stated for the code, which was not read): rotations are made
from a seed of our own stream and are stored as that seed; s is rounded to scale_dtype before use; the way back is computed in
float32, theirs with a cast to half after each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.error_feedback import descend, ldlq
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored, fit
from harness.quantization.numerics.hessians import damped
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.rotations import Butterfly
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

SPREAD = 2.4  # half the range of the grid, in root mean squares of the rotated matrix
TRACE_DAMPING = 0.01


@dataclass(frozen=True)
class RotatedWeight(QuantizedWeight):
    """Uᵀ (step · (code - (2^bits - 1) / 2)) V / column_scale.

    codes         [out, in] uint8
    step          [1] float32
    column_scale  [in] float32, exact in scale_dtype, or None
    seed          of both rotations; None: no rotation
    """

    kind = "rotated"
    codes: Tensor
    step: Tensor
    column_scale: Tensor | None
    seed: int | None
    bits: int
    scale_dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        values = self.step * (self.codes.float() - (2**self.bits - 1) / 2)
        if self.seed is not None:
            left, right = rotations(self.shape, self.seed, values.device)
            values = right.undo(left.undo(values.T).T)
        return values if self.column_scale is None else values / self.column_scale

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"codes": pack(self.codes, self.bits), "step": self.step.contiguous()}
        if self.column_scale is not None:
            tensors["column_scale"] = self.column_scale.to(
                SCALE_DTYPES[self.scale_dtype]
            ).contiguous()
        if self.seed is not None:
            tensors["seed"] = torch.tensor([self.seed])
        return tensors, {
            "shape": list(self.shape),
            "bits": self.bits,
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        codes = unpack(tensors["codes"], meta["bits"], rows * columns).reshape(rows, columns)
        scale = tensors["column_scale"].float() if "column_scale" in tensors else None
        seed = int(tensors["seed"]) if "seed" in tensors else None
        return cls(codes, tensors["step"], scale, seed, meta["bits"], meta["scale_dtype"])


class Rounding:
    """Incoherence processing and LDLQ."""

    version = 1
    needs = ("hessian",)
    stochastic = True
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        incoherence       rotate, with one scale per matrix; False: the paper's baseline, one grid per output channel
        rescale           balance weights and Hessian per input channel before rotating; needs incoherence
        damping_fraction  of the mean diagonal, added to the diagonal of H
        greedy_passes     coordinate descent after LDLQ, with columns in ascending order of the diagonal; 0: none
        block_size        columns between two products; changes the order of float sums only
        """

        incoherence: bool = True
        rescale: bool = True
        damping_fraction: float = 0.01
        greedy_passes: int = 0
        block_size: int = 128

        def __post_init__(self) -> None:
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")
            if self.greedy_passes < 0 or self.block_size < 1:
                raise ValueError(
                    f"greedy_passes={self.greedy_passes}, block_size={self.block_size}: both count from 0 and 1 up"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Asymmetric integers of 2 to 8 bits without groups."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.group_size != -1:
                yield f"groups have no meaning after a rotation; use group_size=-1 instead of {weight.group_size}"

        return check_uniform(
            scheme, shapes, never_symmetric="QuIP's grid is not symmetric"
        ) + refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: five copies of weight and four [in, in]."""
        assert evidence is not None, "quip needs the Hessian"
        require_finite(weight)
        bits, settings = int(scheme.bits), self.settings
        top = 2**bits - 1
        if not settings.incoherence:
            hessian, dead = damped(evidence["hessian"], settings.damping_fraction)
            grid = fit(weight, bits, False, "gptq", scheme.scale_dtype)
            target = (weight.masked_fill(dead, 0) / grid.scale + grid.zero).clamp_(0, top)
            codes = self._round(target, hessian, top)
            return UniformWeight.from_grid(
                codes, grid, symmetric=False, scale_dtype=scheme.scale_dtype
            )
        seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
        rotated, hessian, column_scale = incoherent(
            weight, evidence["hessian"], settings.rescale, seed, scheme.scale_dtype
        )
        hessian, dead = damped(hessian, settings.damping_fraction)
        largest = SPREAD * rotated.square().mean().sqrt() + 1e-16
        target = ((rotated / largest + 1) * (top / 2)).clamp_(0, top)
        codes = self._round(target, hessian, top)
        return RotatedWeight(
            codes.to(torch.uint8),
            (2 * largest / top).reshape(1),
            column_scale,
            seed,
            bits,
            scheme.scale_dtype,
        )

    def _round(self, target: Tensor, hessian: Tensor, top: int) -> Tensor:
        """Codes [out, in], float32 holding integers 0 … top, of targets in units of the grid."""
        settings = self.settings

        def half_up(values: Tensor) -> Tensor:
            return torch.floor(values + 0.5).clamp_(0, top)

        order = None
        if settings.greedy_passes:
            order = torch.argsort(hessian.diagonal(), stable=True)
            target, hessian = target[:, order], hessian[order][:, order]
        try:
            codes = ldlq(target, hessian, half_up, block_size=settings.block_size)
        except torch.linalg.LinAlgError as error:
            raise MethodError(
                f"the damped Hessian [{hessian.shape[0]} × {hessian.shape[0]}] is not positive definite; "
                "use more calibration tokens than the layer has inputs, or a larger damping_fraction"
            ) from error
        if order is not None:
            codes = descend(
                codes,
                target,
                hessian,
                torch.round,
                lambda values: values.clamp(0, top),
                passes=settings.greedy_passes,
                block_size=settings.block_size,
            )
            restored = torch.empty_like(codes)
            restored[:, order] = codes
            codes = restored
        return codes


def rotations(
    shape: tuple[int, int], seed: int, device: torch.device | str
) -> tuple[Butterfly, Butterfly]:
    """U over output and V over input channels."""
    return Butterfly.from_seed(shape[0], 2 * seed, device), Butterfly.from_seed(
        shape[1], 2 * seed + 1, device
    )


def incoherent(
    weight: Tensor, hessian: Tensor, rescale: bool, seed: int, scale_dtype: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """U W diag(s) Vᵀ, V diag(1/s) H diag(1/s) Vᵀ with normalised trace and 0.01 I, and s [in] (None without rescale)."""
    column_scale = None
    if rescale:
        hessian = hessian / hessian.abs().max().clamp(min=1e-30)
        ratio = hessian.diagonal().clamp(min=1e-8) / weight.square().sum(0).clamp(min=1e-8)
        column_scale = as_stored(ratio.pow(0.25).clamp(min=1e-8), scale_dtype).clamp(
            min=torch.finfo(torch.float16).tiny
        )
        weight = weight * column_scale
        hessian = hessian / column_scale / column_scale.unsqueeze(1)
    left, right = rotations((weight.shape[0], weight.shape[1]), seed, weight.device)
    columns = hessian.shape[0]
    hessian = hessian * (columns / (hessian.diagonal().sum() + 1e-8))
    hessian = hessian + TRACE_DAMPING * torch.eye(
        columns, dtype=hessian.dtype, device=hessian.device
    )
    return (
        left.apply(right.apply(weight).T).T.contiguous(),
        right.apply(right.apply(hessian).T).T.contiguous(),
        column_scale,
    )
