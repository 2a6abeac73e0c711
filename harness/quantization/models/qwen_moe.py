"""Qwen2-MoE and Qwen3-MoE: many small fused experts; in Qwen2 also an expert that every token passes, behind a gate of its own.

Blocks may differ: some have one dense MLP in place of the mixture. The router and the gate of the shared expert stay as they are;
both read what the experts read, so no scale is folded between a mixture and its norm. Of dense blocks all four pairs are folded.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import (
    ATTENTION,
    GATED_MLP,
    OUTPUT,
    QKV,
    MixtureFamily,
    attention_pairs,
    gated_mlp_pairs,
    whole_locations,
)
from harness.quantization.models.protocols import WeightLocation

SHARED = {
    "shared_gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_down": ("mlp.shared_expert.down_proj",),
}


class Family(MixtureFamily):
    """Llama's attention (biases in Qwen2, norms on queries and keys in Qwen3) and a mixture in most blocks."""

    architectures = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")

    def experts(self, config: PretrainedConfig) -> tuple[int, int]:
        return config.num_experts, config.moe_intermediate_size

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        attention = whole_locations(ATTENTION, self._biased(config))
        if not self._is_mixture(config, index):
            return (*attention, *whole_locations(GATED_MLP))
        shared = whole_locations(SHARED) if self._has_shared(config) else ()
        return (*attention, *shared, *self.expert_locations(config))

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        mixtures = [self._is_mixture(config, index) for index in range(config.num_hidden_layers)]
        dense = gated_mlp_pairs() if not all(mixtures) else ()
        shared = (
            (ScalePair("mlp.shared_expert.up_proj", SHARED["shared_down"], "linear"),)
            if self._has_shared(config)
            else ()
        )
        return (
            *attention_pairs(config),
            *dense,
            *(*shared, *self.expert_pairs(config)) * any(mixtures),
        )

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return (
            None if config.model_type == "qwen3_moe" else ("self_attn.q_proj", "self_attn.k_proj")
        )

    def _biased(self, config: PretrainedConfig) -> tuple[str, ...]:
        if config.model_type == "qwen2_moe":
            return QKV if config.qkv_bias else ()
        return (*QKV, OUTPUT) if config.attention_bias else ()

    def _has_shared(self, config: PretrainedConfig) -> bool:
        return config.model_type == "qwen2_moe"

    def _is_mixture(self, config: PretrainedConfig, index: int) -> bool:
        if index in (config.mlp_only_layers or ()) or config.num_experts == 0:
            return False
        return (index + 1) % config.decoder_sparse_step == 0
