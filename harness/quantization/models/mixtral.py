"""Mixtral: Llama's attention, and eight fused experts of which a router chooses two for every token.

Files of the hub hold one matrix per expert under names of their own (w1 gate, w2 down, w3 up); the module holds two fused
parameters, which are put together while a block is read (`stored.py`).
"""

from __future__ import annotations

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

    def experts(self, config: PretrainedConfig) -> tuple[int, int]:
        return config.num_local_experts, config.intermediate_size

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        return (*whole_locations(ATTENTION), *self.expert_locations(config))

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        return (*attention_pairs(config), *self.expert_pairs(config))

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return ("self_attn.q_proj", "self_attn.k_proj")
