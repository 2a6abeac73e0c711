"""Low-rank adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors, without the model that they belong to.

A difference of low rank from a base is an adapter of that base: A = diag(sizes) · right, B = left, with a rank of its own per
module and scaling 1. Both factors are written in float32, in which a dequantized code times its scale is exact (and times its size,
up to 4 bits; to 2⁻²⁴ for 8), or in the dtype that they are stored in where they are not rounded. Other tensors that differ from the
base's go to `modules_to_save`.

PEFT puts an adapter on whatever model it is given. The numbers are ours where that model holds the matrices of the cell without its
tuning: an export of that cell by another layout, or, for NF4 with double-quantized scales, what bitsandbytes makes of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from harness.core.cell import ActivationScheme, WeightScheme
from harness.quantization.numerics.adapters import AdaptedWeight
from harness.quantization.numerics.deltas import LowRankWeight
from harness.quantization.numerics.grids import SCALE_DTYPES


class Layout:
    """PEFT's LoRA."""

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]:
        """The base is not part of the folder, so its scheme does not matter."""
        return []

    def write_adapters(
        self, folder: Path, adapters: Mapping[str, AdaptedWeight], base: str, dropout: float
    ) -> None:
        """adapters: by module name in the model, of one scaling.   base: where the unquantized model lies.

        Adapters of lower rank than the largest are filled with zeros: the folder has one rank.
        """
        first = next(iter(adapters.values()))
        rank = max(adapter.down.shape[0] for adapter in adapters.values())
        LoraConfig(
            r=rank,
            lora_alpha=first.scaling * rank,
            lora_dropout=dropout,
            bias="none",
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base,
            target_modules=sorted({name.rpartition(".")[2] for name in adapters}),
        ).save_pretrained(str(folder))
        tensors = {}
        for name, adapter in adapters.items():
            assert adapter.scaling == first.scaling, "the adapters of a cell have one scaling"
            more = rank - adapter.down.shape[0]
            down, up = pad(adapter.down, (0, 0, 0, more)), pad(adapter.up, (0, more))
            for part, factor in (("lora_A", down), ("lora_B", up)):
                tensors[f"base_model.model.{name}.{part}.weight"] = factor.to(
                    SCALE_DTYPES[adapter.dtype]
                ).contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def write_differences(
        self,
        folder: Path,
        changes: Mapping[str, LowRankWeight],
        base: str,
        saved: Mapping[str, Tensor],
    ) -> None:
        """changes: by module name.   base: where the base lies.   saved: other parameters, by name in the model."""
        ranks = {name: max(1, change.rank) for name, change in changes.items()}
        rank = max(ranks.values())
        own = {name: each for name, each in ranks.items() if each != rank}
        LoraConfig(
            r=rank,
            lora_alpha=rank,  # scaling 1, as in alpha_pattern
            rank_pattern=own,
            alpha_pattern=own,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base,
            target_modules=sorted({name.rpartition(".")[2] for name in changes}),
            modules_to_save=sorted({name.rpartition(".")[0] for name in saved}) or None,
        ).save_pretrained(str(folder))
        tensors = {f"base_model.model.{name}": tensor for name, tensor in saved.items()}
        for name, change in changes.items():
            left, right = change.factors()
            if not change.rank:  # PEFT has no adapter of rank 0
                left, right = torch.zeros(change.shape[0], 1), torch.zeros(1, change.shape[1])
            dtype = SCALE_DTYPES[change.factor_dtype] if change.unit_sizes else torch.float32
            for part, factor in (("lora_A", right), ("lora_B", left)):
                tensors[f"base_model.model.{name}.{part}.weight"] = factor.to(dtype).contiguous()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
