"""Checkpoints in the layout of compressed-tensors, which transformers and vLLM load; written and read back by that library.

    format          scheme.weight                        stored as
    pack-quantized  int, 2 to 8 bits                     codes in int32 words, zero points packed likewise, scales
    int-quantized   int with rounded int activations     int8
    naive, float    fp8_e4m3                             float8_e4m3fn; "float-quantized" with rounded FP8 activations
    mxfp4, mxfp6, mxfp8, nvfp4                           packed codes, E8M0 or E4M3 scales

Scales are stored in the model's dtype, in which the library multiplies: they must be exact in it. NVFP4 and MX weights come back in
bfloat16, in which MX is exact and NVFP4 within 2^-8 of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor

from harness.core.cell import ActivationScheme, WeightScheme
from harness.core.errors import StoreError
from harness.quantization.formats.protocols import Description
from harness.quantization.numerics.weights import (
    DenseWeight,
    ElementWeight,
    QuantizedWeight,
    UniformWeight,
)

ELEMENTS: dict[str, dict[str, Any]] = {  # formats of ours that the library has -> its arguments
    "fp8_e4m3": {"num_bits": 8},
    "mxfp4": {"num_bits": 4, "scale_dtype": torch.uint8},
    "mxfp6_e2m3": {"num_bits": 6, "scale_dtype": torch.uint8},
    "mxfp8_e4m3": {"num_bits": 8, "scale_dtype": torch.uint8},
    "nvfp4": {"num_bits": 4, "scale_dtype": torch.float8_e4m3fn},
}
HALF = ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "nvfp4")  # read back in bfloat16


class Layout:
    """compressed-tensors."""

    stores_group_order = False

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]:
        reasons = []
        if weight.format == "int" and weight.bits not in range(2, 9):
            reasons.append(f"compressed-tensors has no integers of {weight.bits:g} bits")
        if weight.format not in ("int", "dense", *ELEMENTS):
            known = ", ".join(("int", *ELEMENTS))
            reasons.append(
                f'compressed-tensors has no number format "{weight.format}"; it has {known}'
            )
        if weight.signed_scales:
            reasons.append(
                "scales below 0: no engine was seen to read them from compressed-tensors; use a scheme without signed_scales"
            )
        if weight.zero_point != "integer":
            reasons.append(
                "compressed-tensors has integer zero points here; use scheme.weight.zero_point=integer"
            )
        if activation is not None and not _is_expressible(activation):
            reasons.append(
                "of rounded activations compressed-tensors has dynamic, symmetric ones per token: int with "
                "activation.grid=compressed, or fp8_e4m3; none other"
            )
        return reasons

    def weight_reasons(self, weight: QuantizedWeight, dtype: torch.dtype) -> list[str]:
        if isinstance(weight, DenseWeight):
            return []
        if not isinstance(weight, UniformWeight | ElementWeight):
            return [
                f'the layout "{weight.kind}" is no grid of integers or floats (codebooks, outliers, rotations, mixed widths)'
            ]
        reasons = []
        if weight.column_group is not None:
            reasons.append(
                "groups in the order of activations (act_order) are no longer supported; use static_groups=true"
            )
        if isinstance(weight, ElementWeight) and weight.format not in ELEMENTS:
            reasons.append(f'no number format "{weight.format}"')
        if isinstance(weight, UniformWeight) and weight.zero is not None:
            zero = weight.zero
            if not bool(((zero == zero.round()) & (zero >= 0) & (zero < 2**weight.bits)).all()):
                reasons.append("zero points that are not among the codes, or no integers")
        is_block_scaled = isinstance(weight, ElementWeight) and weight.format in HALF
        if not is_block_scaled and not torch.equal(weight.scale.to(dtype).float(), weight.scale):
            name = str(dtype).removeprefix("torch.")
            reasons.append(
                f"{weight.scale_dtype} scales are not exact in the model's {name}; use scheme.weight.scale_dtype={name}"
            )
        return reasons

    def describe(
        self, weight: QuantizedWeight, activation: ActivationScheme | None
    ) -> Description | None:
        if not isinstance(weight, UniformWeight | ElementWeight):
            return None
        scheme = _scheme(weight, activation)
        return scheme.model_dump(mode="json", exclude_none=True, exclude={"targets"})

    def model_reasons(self, described: Mapping[str, Description | None]) -> list[str]:
        groups = _groups(described)
        if any(_loads_dense(d) for d, _ in groups) and (
            len(groups) > 1 or "input_activations" in groups[0][0]
        ):
            return [
                "zero points, MX or NVFP4 weights together with a second scheme or with rounded activations: transformers does not "
                "load that; use one weight-only scheme for all linears, or symmetric integers"
            ]
        return []

    def pack_linear(
        self, weight: QuantizedWeight, activation: ActivationScheme | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Raises StoreError when the library would read another matrix back."""
        values = weight.dequantize()
        if isinstance(weight, DenseWeight):
            return {"weight": values.to(dtype)}
        assert isinstance(weight, UniformWeight | ElementWeight), weight.kind
        scheme = _scheme(weight, activation)
        given = {"weight": values, "weight_scale": weight.scale}
        if isinstance(weight, UniformWeight):
            middle = 2 ** (weight.bits - 1)
            zero = torch.full_like(weight.scale, middle) if weight.zero is None else weight.zero
            given["weight_zero_point"] = (zero - middle).to(torch.int8)
        elif weight.format == "nvfp4":
            assert weight.tensor_scale is not None
            given["weight_global_scale"] = 1 / weight.tensor_scale
            given["weight_scale"] = weight.scale / weight.tensor_scale
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        stored = {
            name: tensor.detach().contiguous()
            for name, tensor in compressor.compress(given, scheme).items()
        }
        if stored["weight_scale"].dtype == torch.float32:
            stored["weight_scale"] = stored["weight_scale"].to(dtype)
        back = compressor.decompress(stored, scheme)["weight"].float()
        coarse = (
            torch.bfloat16 if isinstance(weight, ElementWeight) and weight.format in HALF else dtype
        )
        allowed = torch.finfo(coarse).eps * values.abs() + torch.finfo(torch.float32).tiny
        if not bool(((back - values).abs() <= allowed).all()):
            worst = float(((back - values).abs() - allowed).max())
            raise StoreError(
                f"compressed-tensors ({scheme.format}) reads back weights that are off by {worst:.2e}"
            )
        return stored

    def quantization_config(
        self, described: Mapping[str, Description | None], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        groups = _groups(described)
        kept = [name for name, description in described.items() if description is None]
        alone = len(groups) == 1
        schemes = {
            f"group_{i}": QuantizationScheme(
                targets=["Linear"] if alone else members, **description
            )
            for i, (description, members) in enumerate(groups)
        }
        formats = {str(description["format"]) for description, _ in groups}
        config = QuantizationConfig(
            config_groups=schemes,
            ignore=[*others, *kept],
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        content = config.model_dump(mode="json", exclude_none=True)
        if any(_loads_dense(description) for description, _ in groups):
            content["dequantize"] = True
        return content

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _groups(described: Mapping[str, Description | None]) -> list[tuple[Description, list[str]]]:
    """Distinct descriptions with the modules that have them."""
    groups: list[tuple[Description, list[str]]] = []
    for name, description in described.items():
        members = next((members for known, members in groups if known == description), None)
        if members is not None:
            members.append(name)
        elif description is not None:
            groups.append((description, [name]))
    return groups


def _loads_dense(description: Description) -> bool:
    """transformers must dequantize the weights while it loads them: otherwise it drops packed zero points, and leaves MX and NVFP4
    weights in bfloat16 whatever the model's dtype."""
    weights = description["weights"]
    return not weights["symmetric"] or (
        weights["type"] == "float" and (weights["num_bits"] < 8 or weights["strategy"] == "group")
    )


def _is_expressible(activation: ActivationScheme) -> bool:
    plain = activation.granularity == "token" and activation.symmetric and activation.dynamic
    if getattr(activation, "outlier_threshold", 0):
        return False
    return plain and (
        activation.format == "fp8_e4m3"
        or (activation.format == "int" and activation.grid == "compressed")
    )


def _scheme(
    weight: UniformWeight | ElementWeight, activation: ActivationScheme | None
) -> QuantizationScheme:
    """The library's description of one linear."""
    grouped = weight.scale.shape[1] > 1
    if isinstance(weight, UniformWeight):
        arguments: dict[str, Any] = {
            "num_bits": weight.bits,
            "type": "int",
            "symmetric": weight.zero is None,
        }
    else:
        arguments = {**ELEMENTS[weight.format], "type": "float", "symmetric": True}
        grouped = grouped or weight.format in HALF
    arguments["strategy"] = (
        "tensor_group"
        if getattr(weight, "format", "") == "nvfp4"
        else "group"
        if grouped
        else "channel"
    )
    arguments["group_size"] = weight.group_size if grouped else None
    inputs = None
    if activation is not None:
        kind = "int" if activation.format == "int" else "float"
        inputs = QuantizationArgs(
            num_bits=activation.bits, type=kind, symmetric=True, strategy="token", dynamic=True
        )
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**arguments), input_activations=inputs
    )
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    return scheme
