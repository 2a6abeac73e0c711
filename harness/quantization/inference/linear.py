"""A linear whose weight is quantized and whose input may be: the module that stands in a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from harness.quantization.inference import kernels
from harness.quantization.inference.kernels.protocols import Kernel
from harness.quantization.numerics.activations import outlier_channels
from harness.quantization.numerics.adapters import AdaptedWeight, low_rank
from harness.quantization.numerics.deltas import DeltaWeight
from harness.quantization.numerics.inputs import apply
from harness.quantization.numerics.weights import QuantizedWeight

MODES = ("dense", "packed", "native")


class QuantizedLinear(nn.Module):
    """y = round(t(x)) W'ᵀ + b, where t applies the linear's input tensors, if it has any (`numerics.inputs`).

    A low-rank adapter stays beside its matrix: it is added in the model's dtype and reads its input before that is rounded.

    mode "dense" dequantizes once, in the model's dtype: full size, full speed, the default of evaluations.
    mode "packed" keeps what the checkpoint stores and dequantizes in every forward: small and slow.
    Both give the same bits. A difference keeps its base beside it.
    mode "native" hands the codes to the first kernel of `inference.kernels` that holds them exactly, "native:int4pack" to that
    one; it equals the others up to the order of a sum and the rounding of its result. MethodError where no kernel holds them.
    Outlier channels of the activation scheme multiply a second matrix where the weight has one (LLM.int8(), 16 bits).
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        activation: Callable[[Tensor], Tensor] | None = None,
        mode: str = "dense",
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        mode, _, kernel = mode.partition(":")
        assert mode in MODES, mode
        self.out_features, self.in_features = weight.shape
        self.mode, self.kind, self.activation = mode, weight.kind, activation
        self._dtype = dtype
        self._threshold = float(
            getattr(getattr(activation, "scheme", None), "outlier_threshold", 0.0)
        )
        self._inputs = tuple(inputs or ())
        for name, tensor in (inputs or {}).items():
            self.register_buffer(
                name,
                tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype),
                persistent=False,
            )
        self.bias = (
            None if bias is None else nn.Parameter(bias.to(device, dtype), requires_grad=False)
        )
        self._scaling: float | None = None
        if isinstance(weight, AdaptedWeight):
            self._scaling = weight.scaling
            self.register_buffer("adapter_down", weight.down.to(device, dtype), persistent=False)
            self.register_buffer("adapter_up", weight.up.to(device, dtype), persistent=False)
            weight = weight.base
        self.kernel: Kernel | None = None
        if mode == "native":
            scheme = getattr(activation, "scheme", None)
            self.kernel = kernels.choose(weight, scheme, dtype, device, kernel)
            prepared = self.kernel.prepare(weight, device)
            for name, tensor in prepared.items():
                self.register_buffer(name, tensor, persistent=False)
            self._prepared = tuple(prepared)
        elif mode == "dense":
            self.register_buffer("dense", weight.dequantize().to(device, dtype), persistent=False)
            beside = weight.beside_outliers() if self._threshold else None
            self.register_buffer(
                "beside", None if beside is None else beside.to(device, dtype), persistent=False
            )
        else:
            if isinstance(weight, DeltaWeight) and weight.base is not None:
                # the base that its difference is added to; exact in the dtype that it was read in
                self.register_buffer("packed_base", weight.base.to(device, dtype), persistent=False)
            parts, self._meta = weight.pack()
            self._layout = type(weight)
            for name, part in parts.items():
                self.register_buffer(f"packed_{name}", part.to(device), persistent=False)
            self._parts = tuple(parts)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix [out, in] in the model's dtype; with an adapter, their sum."""
        if self._scaling is None:
            return self._matrix()
        change = self._scaling * (
            self.get_buffer("adapter_up").float() @ self.get_buffer("adapter_down").float()
        )
        return (self._matrix() + change).to(self._dtype)

    def _matrix(self) -> Tensor:
        if self.kernel is not None:
            return self.kernel.dequantize(self._buffers_of_kernel()).to(self._dtype)
        if self.mode == "dense":
            return self.get_buffer("dense")
        return self._unpacked().dequantize().to(self._dtype)

    def _buffers_of_kernel(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self._prepared}

    def _by_kernel(self, kernel: Kernel, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if not flat.shape[0]:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        scheme = getattr(self.activation, "scheme", None)
        y = kernel.multiply(flat, self._buffers_of_kernel(), scheme)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _unpacked(self) -> QuantizedWeight:
        stored = {name: self.get_buffer(f"packed_{name}") for name in self._parts}
        weight = self._layout.unpack(stored, self._meta)
        return (
            weight.with_base(self.get_buffer("packed_base"))
            if isinstance(weight, DeltaWeight)
            else weight
        )

    def _beside_outliers(self) -> Tensor | None:
        """The matrix that outlier channels multiply, in the model's dtype; None where that is `weight`."""
        if not self._threshold or self.kernel is not None:
            return None
        if self.mode == "dense":
            return self._buffers["beside"]
        beside = self._unpacked().beside_outliers()
        return None if beside is None else beside.to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self._inputs:
            x = apply(x, {name: self.get_buffer(name) for name in self._inputs})
        if self.kernel is not None:
            y = self._by_kernel(self.kernel, x)
            y = y if self.bias is None else y + self.bias
        else:
            y = self._multiplied(x)
        if self._scaling is None:
            return y
        return y + low_rank(
            x, self.get_buffer("adapter_down"), self.get_buffer("adapter_up"), self._scaling
        )

    def _multiplied(self, x: Tensor) -> Tensor:
        """x, rounded, times the matrix without an adapter; bias added."""
        beside = self._beside_outliers()
        kept = outlier_channels(x, self._threshold) if beside is not None else None
        x = x if self.activation is None else self.activation(x)
        if beside is not None and kept is not None:
            apart = nn.functional.linear(x.masked_fill(~kept, 0), beside)
            return nn.functional.linear(x.masked_fill(kept, 0), self._matrix(), self.bias) + apart
        return nn.functional.linear(x, self._matrix(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}, mode={self.mode}"
