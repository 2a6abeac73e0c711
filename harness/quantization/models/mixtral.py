"""Mixtral: Llama's attention, and eight fused experts of which a router chooses two for every token.

Files of the hub hold one matrix per expert under names of their own (w1 gate, w2 down, w3 up); the module holds two fused
parameters, which are put together while a block is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import (
    ATTENTION,
    MixtureFamily,
    attention_pairs,
    whole_locations,
)
from harness.quantization.models.protocols import WeightLocation


class Family(MixtureFamily):
    """Sparse mixture in every block."""

    architectures = ("MixtralForCausalLM",)
    expert_files: ClassVar[dict[str, str]] = {
        "gate_proj": "block_sparse_moe.experts.{expert}.w1.weight",
        "up_proj": "block_sparse_moe.experts.{expert}.w3.weight",
        "down_proj": "block_sparse_moe.experts.{expert}.w2.weight",
    }

    def experts(self, config: PretrainedConfig) -> tuple[int, int]:
        return config.num_local_experts, config.intermediate_size

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        return (*whole_locations(ATTENTION), *self.expert_locations(config))

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        return (*attention_pairs(config), *self.expert_pairs(config))

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return ("self_attn.q_proj", "self_attn.k_proj")

    def file_names(self, name: str) -> Iterator[str]:
        yield from super().file_names(name)
        if ".mlp.gate." in name:  # the router
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
