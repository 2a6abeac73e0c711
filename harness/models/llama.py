"""Llama and the families of its shape: Mistral, Qwen2 (biases on q, k, v), Qwen3 (norms on queries and keys).

Grouped-query attention, head_dim, sliding windows and tied heads come from the config. Blocks of Qwen and Mistral may differ in
their masks; the pass records each block's own.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.methods.protocols import ScalePair
from harness.models.protocols import DecoderFamily, Slot

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
GROUPS = {"qkv": QKV, "o": ("self_attn.o_proj",), "gate_up": GATE_UP, "down": ("mlp.down_proj",)}


class Family(DecoderFamily):
    """RMSNorm, rotary positions, gated MLP, separate projections."""

    architectures = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    rotations = True

    def slots(self, config: PretrainedConfig, index: int) -> tuple[Slot, ...]:
        biased = _biased(config)
        return tuple(
            Slot(name, group, f"{name}.weight", bias=f"{name}.bias" if name in biased else None)
            for group, names in GROUPS.items()
            for name in names
        )

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        repeats = config.num_attention_heads // config.num_key_value_heads
        return (
            ScalePair("input_layernorm", QKV, "norm", region="self_attn"),
            ScalePair("self_attn.v_proj", ("self_attn.o_proj",), "linear", repeats=repeats),
            ScalePair("post_attention_layernorm", GATE_UP, "norm", region="mlp"),
            ScalePair("mlp.up_proj", ("mlp.down_proj",), "linear"),
        )

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return None if config.model_type == "qwen3" else ("self_attn.q_proj", "self_attn.k_proj")


def _biased(config: PretrainedConfig) -> set[str]:
    if config.model_type == "qwen2":
        return set(QKV)                                 # built into the class, not a setting
    attention = (*QKV, "self_attn.o_proj") if getattr(config, "attention_bias", False) else ()
    mlp = (*GATE_UP, "mlp.down_proj") if getattr(config, "mlp_bias", False) else ()
    return {*attention, *mlp}
