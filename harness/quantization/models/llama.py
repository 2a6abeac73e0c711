"""Llama and the families of its shape: Mistral, Qwen2 (biases on q, k, v), Qwen3 (norms on queries and keys).

Grouped-query attention, head_dim, sliding windows and tied heads come from the config. Blocks of Qwen and Mistral may differ in
their masks; the pass records each block's own.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import (
    ATTENTION,
    DOWN,
    GATE_UP,
    GATED_MLP,
    OUTPUT,
    QKV,
    attention_pairs,
    gated_mlp_pairs,
    whole_locations,
)
from harness.quantization.models.protocols import DecoderFamily, WeightLocation


class Family(DecoderFamily):
    """RMSNorm, rotary positions, gated MLP, separate projections."""

    architectures = (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    )
    rotations = True

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        return whole_locations(ATTENTION | GATED_MLP, _biased(config))

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        return (*attention_pairs(config), *gated_mlp_pairs())

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return None if config.model_type == "qwen3" else ("self_attn.q_proj", "self_attn.k_proj")


def _biased(config: PretrainedConfig) -> set[str]:
    if config.model_type == "qwen2":
        return set(QKV)  # built into the class, not a setting
    attention = (*QKV, OUTPUT) if getattr(config, "attention_bias", False) else ()
    mlp = (*GATE_UP, DOWN) if getattr(config, "mlp_bias", False) else ()
    return {*attention, *mlp}
