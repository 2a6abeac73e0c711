"""Low-rank adapters of a quantized matrix (LoRA, arXiv 2106.09685): y = x W'ᵀ + α/r · (x Aᵀ) Bᵀ, A [r, in], B [out, r].

As stored (`AdaptedWeight`: the adapter is not merged, its bits are counted), as run (`low_rank`), as trained (`LowRankLinear`), and
what the methods that train them share: their settings and the loop over documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator as Generating
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Generator, Tensor, nn

from harness.core.errors import MethodError, unknown_name
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.training import Document, fine_tune, shorten
from harness.quantization.numerics.weights import QuantizedWeight


def low_rank(x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """The adapter's part of the output, [..., out] in x's dtype, of x [..., in]; A = down [r, in], B = up [out, r]."""
    return nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), up.to(x.dtype)) * scaling


@dataclass(frozen=True)
class AdaptedWeight(QuantizedWeight):
    """A quantized matrix with its adapter: base + scaling · up @ down.

    down     A [r, in] float32, exact in dtype
    up       B [out, r] float32, exact in dtype
    scaling  α / r
    """

    kind = "adapted"
    base: QuantizedWeight
    down: Tensor
    up: Tensor
    scaling: float
    dtype: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def contained(self) -> tuple[QuantizedWeight, ...]:
        return (self.base,)

    def dequantize(self) -> Tensor:
        return self.base.dequantize() + self.scaling * (self.up @ self.down)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        inner, meta = self.base.pack()
        tensors = {f"base_{name}": tensor for name, tensor in inner.items()}
        for name in ("down", "up"):
            tensors[f"adapter_{name}"] = (
                getattr(self, name).to(SCALE_DTYPES[self.dtype]).contiguous()
            )
        return tensors, {
            "base": {"kind": self.base.kind, "meta": meta},
            "scaling": self.scaling,
            "dtype": self.dtype,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        inner = {
            name.removeprefix("base_"): tensor
            for name, tensor in tensors.items()
            if name.startswith("base_")
        }
        base = QuantizedWeight.kinds[meta["base"]["kind"]].unpack(inner, meta["base"]["meta"])
        return cls(
            base,
            tensors["adapter_down"].float(),
            tensors["adapter_up"].float(),
            meta["scaling"],
            meta["dtype"],
        )


def singular_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular directions of matrix [out, in]: U [out, r], σ [r], Vᵀ [r, in], in the matrix's dtype.

    r is rank, or the smaller side of the matrix where that is less. U diag(σ) Vᵀ is the nearest matrix of rank r (Eckart–Young).
    Raises MethodError when the matrix is not finite or the decomposition fails.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise MethodError("no low-rank part of a matrix with NaN or infinity")
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise MethodError(f"the singular values of a matrix were not found: {error}") from error
    return left[:, :rank], values[:rank], right[:rank]


def weighted_factors(
    error: Tensor, root: Tensor, inverse: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] that minimise tr((E - B A) H (E - B A)ᵀ), E = error [out, in], H = root rootᵀ; float32.

    root     S [in, n], n the rank of H   (`hessians.square_root`)
    inverse  its pseudo-inverse [n, in]
    E S = U Σ Vᵀ gives B = U_r Σ_r^½ and A = Σ_r^½ V_rᵀ S⁺; the sum over i > r of σ_i² remains (Eckart–Young). r is rank, or less
    where the error has fewer directions.
    """
    left, values, right = singular_factors(error.to(root.dtype) @ root, rank)
    half = values.sqrt()
    return ((half[:, None] * right) @ inverse).float(), (left * half).float()


# ---- training --------------------------------------------------------------------------------------------------------


def is_named(name: str, linears: Sequence[str]) -> bool:
    """Whether a linear ("self_attn.q_proj") is among the short names `linears` ("q_proj"); every one is where there are none."""
    return not linears or name.rpartition(".")[2] in linears


def unknown_linears(linears: Sequence[str], names: Sequence[str]) -> list[str]:
    """Reasons for entries of the setting `linears` that name none of the model's linears `names`."""
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return [unknown_name("linear", name, known, "linears") for name in linears if name not in known]


@dataclass(frozen=True)
class LowRankSettings:
    """
    rank           r: rows of A, columns of B
    alpha          the adapter's output is multiplied by alpha / rank
    dropout        share of the adapter's inputs that is zeroed while training
    linears        short names of the linears with an adapter ("q_proj"); empty: all
    rate           learning rate of AdamW, constant; no weight decay
    steps          optimizer steps
    batch          documents per step
    micro_batch    documents in memory at once: the same sums in another order
    clip           largest norm of a step's gradient; 0: no limit
    prompt_length  tokens that are kept of a prompt
    answer_length  tokens that are kept of an answer; texts without prompts are cut into pieces of both lengths together
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    linears: tuple[str, ...] = ()
    rate: float = 0.0002
    steps: int = 10000
    batch: int = 16
    micro_batch: int = 4
    clip: float = 0.3
    prompt_length: int = 384
    answer_length: int = 128

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch", "micro_batch", "prompt_length", "answer_length"):
            if getattr(self, name) < (least := int(name != "steps")):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not all(isinstance(name, str) for name in self.linears):
            raise ValueError(f"linears is {list(self.linears)}; names of linears are expected")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.clip >= 0:
            raise ValueError(f"clip is {self.clip}; it must not be negative")


@dataclass(frozen=True)
class StoredSettings(LowRankSettings):
    """adapter_dtype: in which A and B are stored, where they are not merged: bfloat16, float16 or float32."""

    adapter_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtype("adapter_dtype", self.adapter_dtype)


def check_dtype(name: str, dtype: str) -> None:
    """Raises ValueError for a setting that names no floating type."""
    if dtype not in SCALE_DTYPES:
        raise ValueError(f'no {name} "{dtype}"; known: {", ".join(SCALE_DTYPES)}')


class FrozenLinear(nn.Module):
    """x W'ᵀ + b, nothing of it trained: a linear without an adapter, and the base of those with one.

    The matrix is dequantized at the first call, in the dtype of its input.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias, persistent=False)
        self._dense: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._dense is None or self._dense.dtype != x.dtype or self._dense.device != x.device:
            self._dense = self.weight.dequantize().to(x.device, x.dtype)
        return nn.functional.linear(x, self._dense, self.bias)  # type: ignore[arg-type]

    def stored(self) -> QuantizedWeight:
        """As it came."""
        return self.weight


class LowRankLinear(FrozenLinear):
    """A frozen linear with trainable A and B. Both are zeros until `start`. features: columns of A."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        settings: LowRankSettings,
        features: int,
        dtype: str = "float32",
    ) -> None:
        super().__init__(weight, bias)
        self.scaling, self.dropout, self.dtype = (
            settings.alpha / settings.rank,
            settings.dropout,
            dtype,
        )
        self.down = nn.Parameter(torch.zeros(settings.rank, features))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], settings.rank))
        self._rng: Generator | None = None

    def start(self, rng: Generator) -> None:
        """Draw A uniformly within 1 / √features (Kaiming's with a = √5); B stays 0, the function is the base's.

        rng: also what dropout draws from.
        """
        self._rng = rng
        with torch.no_grad():
            bound = self.down.shape[1] ** -0.5
            self.down.copy_((2 * torch.rand(self.down.shape, generator=rng) - 1) * bound)

    def drop(self, x: Tensor) -> Tensor:
        """x with a share of its entries 0 and the others larger, while gradients are recorded."""
        if not self.dropout or self._rng is None or not torch.is_grad_enabled():
            return x
        kept = torch.rand(x.shape, generator=self._rng) >= self.dropout
        return x * (kept.to(x.device) / (1 - self.dropout)).to(x.dtype)

    def change(self, x: Tensor) -> Tensor:
        """The part of the output that comes from the adapter."""
        return low_rank(self.drop(x), self.down, self.up, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = super().forward(x) + self.change(x)
        return changed

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] as they are stored and run."""
        return self.down, self.up

    @torch.no_grad()
    def stored(self) -> QuantizedWeight:
        """The base with its adapter as it stands, rounded to its storage type."""
        down, up = (as_stored(factor.detach().cpu(), self.dtype) for factor in self.factors())
        return AdaptedWeight(self.weight, down, up, self.scaling, self.dtype)


class Student(Protocol):
    """The model in training, as far as this module uses it."""

    def logits(self, tokens: Tensor) -> Tensor:
        """[sequences, length] tokens -> [sequences, length, vocabulary] float32, differentiable."""
        ...


class AdapterTuning(ABC):
    """The base of tunings by adapters: it selects the linears and loops over documents; a method defines its adapter."""

    def __init__(self, settings: LowRankSettings) -> None:
        self.settings = settings
        self._linears: list[FrozenLinear] = []

    @abstractmethod
    def adapted(self, weight: QuantizedWeight, bias: Tensor | None) -> LowRankLinear:
        """A linear with its adapter, not yet started."""

    def linear(
        self, name: str, weight: QuantizedWeight, bias: Tensor | None, original: Tensor | None
    ) -> nn.Module:
        """The quantized linear with an adapter, or frozen where it gets none."""
        linear = (
            self.adapted(weight, bias)
            if is_named(name, self.settings.linears)
            else FrozenLinear(weight, bias)
        )
        self._linears.append(linear)
        return linear

    def unknown_linears(self, names: Sequence[str]) -> list[str]:
        """Reasons for entries of `linears` that name no linear of the model."""
        return unknown_linears(self.settings.linears, names)

    def tune(
        self,
        student: Student,
        teacher: Student | None,
        parameters: Sequence[nn.Parameter],
        windows: Sequence[Document],
        rng: Generator,
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """Start and train the adapters. Yields (step, steps); notes: mean losses, and how many documents were used."""
        settings = self.settings
        adapted = [linear for linear in self._linears if isinstance(linear, LowRankLinear)]
        for linear in adapted:
            linear.start(rng)
        kept = shorten(windows, settings.prompt_length, settings.answer_length)
        if not kept:
            raise MethodError(
                "no document has a token to learn; see the calibration's text, prompt_length and answer_length"
            )
        trained = [parameter for linear in adapted for parameter in linear.parameters()]
        losses = yield from fine_tune(
            student.logits,
            trained,
            kept,
            rate=settings.rate,
            steps=settings.steps,
            batch=settings.batch,
            micro_batch=settings.micro_batch,
            clip=settings.clip,
            rng=rng,
            what="fine-tuning of adapters",
        )
        return {
            "loss": losses,
            "documents": len(kept),
            "with_prompt": sum(document.prompt > 0 for document in kept),
        }


__all__ = [
    "AdaptedWeight",
    "AdapterTuning",
    "FrozenLinear",
    "LowRankLinear",
    "LowRankSettings",
    "StoredSettings",
    "Student",
    "check_dtype",
    "is_named",
    "low_rank",
    "singular_factors",
    "unknown_linears",
    "weighted_factors",
]
