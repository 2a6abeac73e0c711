"""Phi-3: Llama's block with queries, keys and values in one linear, and gate and up in another.

Each part of a fused linear is a matrix of its own here, with its own grid, errors and place in the record; the rows are split
as the module's forward splits them. Phi-4 has the same class; Phi-4-mini rotates only a part of each head.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import (
    DOWN,
    GATE_UP,
    OUTPUT,
    QKV,
    attention_pairs,
    gated_mlp_pairs,
    row_locations,
    whole_locations,
)
from harness.quantization.models.protocols import DecoderFamily, WeightLocation


class Family(DecoderFamily):
    """RMSNorm, rotary positions, gated MLP, fused projections without biases."""

    architectures = ("Phi3ForCausalLM",)
    rotations = True

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows = (
            head * config.num_attention_heads,
            head * config.num_key_value_heads,
            head * config.num_key_value_heads,
        )
        return (
            *row_locations("qkv", "self_attn.qkv_proj", dict(zip(QKV, rows, strict=True))),
            *whole_locations({"o": (OUTPUT,)}),
            *row_locations(
                "gate_up", "mlp.gate_up_proj", dict.fromkeys(GATE_UP, config.intermediate_size)
            ),
            *whole_locations({"down": (DOWN,)}),
        )

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        return (*attention_pairs(config), *gated_mlp_pairs())

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        rotated = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        return ("self_attn.q_proj", "self_attn.k_proj") if rotated == 1.0 else None
