"""Gemma 1, 2 and 3: norms that multiply by 1 + weight, heads wider than hidden size / heads, and from 2 on norms behind each half.

The norms behind attention and MLP act on what is added to the residual stream; their inputs are no linear's, so nothing is folded
into them, and they keep the residual stream from being rotated. Gemma 2 caps the logits of attention and head, which changes
nothing in front of them; Gemma 3 has norms on queries and keys. Sliding and full attention alternate; each block's mask and rotary
embedding are recorded with it.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import (
    ATTENTION,
    GATED_MLP,
    OUTPUT,
    QKV,
    attention_pairs,
    gated_mlp_pairs,
    whole_locations,
)
from harness.quantization.models.protocols import DecoderFamily, WeightLocation


class Family(DecoderFamily):
    """The text models; the first generation has no norms behind its halves."""

    architectures = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        return whole_locations(
            ATTENTION | GATED_MLP, (*QKV, OUTPUT) if config.attention_bias else ()
        )

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        norm = (
            "post_attention_layernorm"
            if config.model_type == "gemma"
            else "pre_feedforward_layernorm"
        )
        return (*attention_pairs(config, offset=1.0), *gated_mlp_pairs(norm, offset=1.0))

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return (
            None
            if config.model_type.startswith("gemma3")
            else ("self_attn.q_proj", "self_attn.k_proj")
        )
