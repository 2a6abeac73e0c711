"""Checkpoints in the 4-bit layout of bitsandbytes (NF4, FP4), which transformers, PEFT, vLLM and TGI load.

A linear [out, in] is one flat row of codes, cut into blocks whose largest magnitude is stored; blocks run on from row to row:

    weight                                      [out · in / 2, 1] uint8   two codes in a byte, the first in the high half
    weight.absmax                               [blocks] float32, or uint8 where the maxima are double quantized
    weight.quant_map                            [16] float32              the table of the format
    weight.nested_absmax, weight.nested_quant_map   [blocks / 256], [256] float32, with double-quantized maxima alone
    weight.quant_state.bitsandbytes__<format>   JSON as bytes: format, block, shape, dtype, mean of the maxima

weight = table[code] · maximum, in float32, then cast to the model's dtype: what `dequantize` of the checkpoint gives. Codes and
maxima are ours and are not computed anew from a module: with double quantization bitsandbytes' own state dict would change some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, WeightScheme
from harness.core.number_formats import FORMATS
from harness.quantization.formats.protocols import Description
from harness.quantization.numerics.block_maxima import (
    SECOND_BLOCK,
    BlockMaxima,
    check_block,
    dynamic_table,
)
from harness.quantization.numerics.grids import decode
from harness.quantization.numerics.weights import ElementWeight, NormalFloatWeight, QuantizedWeight

NAMES = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"


class Layout:
    """bitsandbytes, 4 bits."""

    stores_group_order = False

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]:
        reasons = []
        if weight.format not in NAMES and weight.bits < 16:
            reasons.append(
                f'bitsandbytes\' layout holds {" and ".join(NAMES)}, not "{weight.format}"; use scheme=nf4g64'
            )
        if activation is not None:
            reasons.append(
                "bitsandbytes' layout is of weights alone; the scheme rounds activations too"
            )
        return reasons

    def weight_reasons(self, weight: QuantizedWeight, dtype: torch.dtype) -> list[str]:
        if not isinstance(weight, NormalFloatWeight | ElementWeight) or weight.format not in NAMES:
            return [f'the layout "{weight.kind}" has no blocks of NF4 or FP4']
        reasons = check_block("bitsandbytes'", _block(weight))
        if isinstance(weight, ElementWeight) and weight.column_group is not None:
            reasons.append("groups in the order of activations (act_order); use static_groups=true")
        if isinstance(weight, ElementWeight) and weight.tensor_scale is not None:
            reasons.append("float8_e4m3 scales; use scheme.weight.scale_dtype=float32")
        return reasons

    def describe(
        self, weight: QuantizedWeight, activation: ActivationScheme | None
    ) -> Description | None:
        if not isinstance(weight, NormalFloatWeight | ElementWeight):
            return None
        return {
            "format": weight.format,
            "double": isinstance(weight, NormalFloatWeight) and weight.maxima.values is None,
        }

    def model_reasons(self, described: Mapping[str, Description | None]) -> list[str]:
        reasons = []
        for key, title in (("format", "tables"), ("double", "kinds of maxima")):
            found = {d[key] for d in described.values() if d is not None}
            if len(found) > 1:
                listed = ", ".join(sorted(map(str, found)))
                reasons.append(
                    f"bitsandbytes' config has one description for all linears; here {title} are {listed}"
                )
        return reasons

    def pack_linear(
        self, weight: QuantizedWeight, activation: ActivationScheme | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        if not isinstance(weight, NormalFloatWeight | ElementWeight):
            return {"weight": weight.dequantize().to(dtype)}
        flat = weight.codes.reshape(-1)
        element = FORMATS[weight.format].element
        flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2), value=element.values.index(0.0))
        state: dict[str, Any] = {
            "quant_type": weight.format,
            "blocksize": _block(weight),
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(weight.shape),
        }
        parts = {
            "weight": ((flat[::2] << 4) | flat[1::2]).unsqueeze(1),
            "weight.quant_map": decode(torch.arange(16, dtype=torch.uint8), element),
        }
        maxima = _maxima(weight)
        if maxima.values is not None:
            parts["weight.absmax"] = maxima.values
        else:
            assert maxima.codes is not None
            assert maxima.scale is not None
            assert maxima.offset is not None
            parts["weight.absmax"] = maxima.codes
            parts["weight.nested_absmax"] = maxima.scale
            parts["weight.nested_quant_map"] = dynamic_table()
            state |= {
                "nested_blocksize": SECOND_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(maxima.offset),
            }
        parts[STATE + weight.format] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        return parts

    def quantization_config(
        self, described: Mapping[str, Description | None], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        first = next(d for d in described.values() if d is not None)
        dense = [name for name, description in described.items() if description is None]
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": first["format"],
            "bnb_4bit_use_double_quant": first["double"],
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [*dense, *others],
        }

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def unpack_linear(tensors: Mapping[str, Tensor]) -> NormalFloatWeight:
    """The matrix of a linear's tensors, as `pack_linear` names them. Raises ValueError for a table that is not the format's."""
    (name,) = (name for name in tensors if name.startswith(STATE))
    state = json.loads(bytes(tensors[name].tolist()))
    kind = state["quant_type"]
    element = FORMATS[kind].element
    if not torch.equal(
        tensors["weight.quant_map"], decode(torch.arange(16, dtype=torch.uint8), element)
    ):
        raise ValueError(f"weight.quant_map: a table of its own, not that of {kind}")
    maxima = BlockMaxima(tensors["weight.absmax"])
    if "nested_offset" in state:
        if not torch.equal(tensors["weight.nested_quant_map"], dynamic_table()):
            raise ValueError(
                "weight.nested_quant_map: a table of its own, not bitsandbytes' dynamic one"
            )
        maxima = BlockMaxima(
            None,
            tensors["weight.absmax"],
            tensors["weight.nested_absmax"],
            torch.tensor([state["nested_offset"]]),
        )
    rows, columns = state["shape"]
    bytes_ = tensors["weight"].reshape(-1)
    codes = torch.stack((bytes_ >> 4, bytes_ & 15), 1).reshape(-1)[: rows * columns]
    return NormalFloatWeight(codes.reshape(rows, columns), maxima, state["blocksize"], kind)


def _block(weight: NormalFloatWeight | ElementWeight) -> int:
    """Weights per block of the flattened matrix."""
    return weight.block if isinstance(weight, NormalFloatWeight) else weight.group_size


def _maxima(weight: NormalFloatWeight | ElementWeight) -> BlockMaxima:
    """The numbers that codes of the format's table, largest magnitude 1, are multiplied by."""
    if isinstance(weight, NormalFloatWeight):
        return weight.maxima
    return BlockMaxima(weight.scale.reshape(-1))
