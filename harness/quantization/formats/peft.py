"""Low-rank adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors, without the model that they belong to.

PEFT puts an adapter on whatever model it is given. The numbers are ours where that model holds the matrices of the cell without its
tuning: an export of that cell by another layout, or, for NF4 with double-quantized scales, what bitsandbytes makes of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch.nn.functional import pad

from harness.core.cell import ActivationScheme, WeightScheme
from harness.quantization.numerics.adapters import AdaptedWeight
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
