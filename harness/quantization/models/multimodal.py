"""Language parts of LLaVA-NeXT and Qwen2-VL: Llama's block inside a model that also sees images.

Quantized and calibrated on text only, as the published studies did; vision tower and projector stay as they are and are loaded
with the model, so that it still answers about images.
"""

from __future__ import annotations

from transformers import AutoModelForImageTextToText, PretrainedConfig

from harness.core.errors import ModelError
from harness.core.shapes import ScalePair
from harness.quantization.models.parts import (
    ATTENTION,
    GATED_MLP,
    QKV,
    attention_pairs,
    gated_mlp_pairs,
    whole_locations,
)
from harness.quantization.models.protocols import DecoderFamily, WeightLocation

# language part -> its linears with biases
BIASED = {"llama": (), "mistral": (), "qwen2": QKV, "qwen2_vl_text": QKV}


class Family(DecoderFamily):
    """Both read text exactly as their language part does."""

    architectures = ("LlavaNextForConditionalGeneration", "Qwen2VLForConditionalGeneration")
    auto_class = AutoModelForImageTextToText
    blocks_name = "model.language_model.layers"
    before = ("model.language_model.embed_tokens",)
    after = ("model.language_model.norm", "lm_head")

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        text = config.get_text_config()
        if text.model_type not in BIASED:
            raise ModelError(
                f'the language part "{text.model_type}" of {config.model_type} is none of {", ".join(BIASED)}'
            )
        return whole_locations(ATTENTION | GATED_MLP, BIASED[text.model_type])

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        return (*attention_pairs(config.get_text_config()), *gated_mlp_pairs())

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return ("self_attn.q_proj", "self_attn.k_proj")

    def notes(self, config: PretrainedConfig) -> tuple[str, ...]:
        return ("only the language part is quantized; vision tower and projector stay as they are",)
