"""OPT: layer norms with biases before attention and MLP, learned positions, ReLU between two linears.

ReLU lets a positive scale through, so fc1 → fc2 can be folded. The 350M model has its norms behind the residual sums, where the
residual stream reads them too: nothing can be folded into those, and its project_in and project_out stay as they are.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import QKV, whole_locations
from harness.quantization.models.protocols import DecoderFamily, WeightLocation

GROUPS = {"qkv": QKV, "out": ("self_attn.out_proj",), "fc1": ("fc1",), "fc2": ("fc2",)}


class Family(DecoderFamily):
    """Pre-norm OPT from 125M to 175B, and post-norm OPT 350M."""

    architectures = ("OPTForCausalLM",)
    blocks_name = "model.decoder.layers"
    before = (
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
        "model.decoder.project_in",
    )
    after = ("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head")

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        names = [name for members in GROUPS.values() for name in members]
        return whole_locations(GROUPS, names if config.enable_bias else ())

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        found = [ScalePair("self_attn.v_proj", ("self_attn.out_proj",), "linear")]
        if config.do_layer_norm_before and config.layer_norm_elementwise_affine:
            found.insert(0, ScalePair("self_attn_layer_norm", QKV, "norm", region="self_attn"))
            found.append(ScalePair("final_layer_norm", ("fc1",), "norm"))
        if config.activation_function == "relu":
            found.append(ScalePair("fc1", ("fc2",), "linear"))
        return tuple(found)

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return ("self_attn.q_proj", "self_attn.k_proj")
