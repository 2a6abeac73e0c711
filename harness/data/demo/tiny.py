"""Tiny random models of every family, to try a family, a method or a scheme in seconds: "tiny:mixtral", "tiny:falcon_40b", …

A model is built from a config the first time it is asked for: three blocks of width 64, random weights from a fixed seed, a byte
tokenizer of 259 tokens. Input channels differ in size and biases are not zero, so that methods have work to do. They have learned
nothing: perplexities and errors compare methods on one such model, and say nothing of real ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import ModelError, unknown_name

VERSION = 1  # raised when the bytes of the models change
COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# name -> differences from the common shape; model_type where it is not the name. A new family adds its line.
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4},
    "opt_350m": {
        "model_type": "opt",
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "phi3": {"sliding_window": 24},
    "falcon_7b": {
        "model_type": "falcon",
        "ffn_hidden_size": 128,
        "multi_query": True,
        "tie_word_embeddings": True,
    },
    "falcon_40b": {
        "model_type": "falcon",
        "ffn_hidden_size": 128,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "falcon_rw": {
        "model_type": "falcon",
        "ffn_hidden_size": 128,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
    "gpt_neox": {},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 24,
        "query_pre_attn_scalar": 32,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "qwen3_moe": {**_MIXTURE, "head_dim": 16},
    "llava_next": {
        "text_config": {"model_type": "llama"},
        "vision_config": _CLIP,
        "image_token_index": 250,
    },
    "qwen2_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            }
        },
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        "image_token_id": 250,
        "video_token_id": 251,
    },
    "gpt2": {"n_positions": 256},  # these four have no family file: the generic one serves them
    "bloom": {},
    "starcoder2": {},
    "olmo2": {},
}


def tiny_folder(name: str, cache: Path) -> Path:
    """The folder of a tiny model below cache, built there unless a finished one exists. Raises ModelError on an unknown name."""
    if name not in TINY:
        raise ModelError(unknown_name("tiny model", name, TINY, where=f"tiny:{name}"))
    recipe = json.dumps([VERSION, COMMON, TINY[name]], sort_keys=True)
    folder = cache / f"tiny-{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        build(name, aside)
        aside.chmod(0o755)
        try:
            os.rename(aside, folder)
        except OSError:  # another process finished the same bytes first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def build(
    name: str,
    folder: Path,
    *,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    **overrides: Any,
) -> None:
    """Write a tiny model into a folder; name: of TINY, or any model_type of transformers.

    dtype: of the stored weights; shards: number of weight files; overrides: of the config.
    """
    # Imported here, because texts and model folders must load without torch.
    import torch
    import transformers
    from transformers import AutoConfig

    settings = {**COMMON, **TINY.get(name, {}), **overrides}
    config = AutoConfig.for_model(settings.pop("model_type", name), **_nested(settings))
    generator = torch.Generator().manual_seed(seed)
    several = hasattr(config, "vision_config")
    maker = (
        transformers.AutoModelForImageTextToText if several else transformers.AutoModelForCausalLM
    )
    model = maker.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                start = 1.0 if parameter_name.endswith("weight") else 0.0
                parameter.copy_(start + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                channels = 1 + torch.rand(parameter.shape[-1], generator=generator) ** 4 * 4
                spread = 1.0 if "embed" in parameter_name else parameter.shape[-1] ** -0.5
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * channels * spread
                )
    model = model.to(getattr(torch, dtype))
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=total if shards == 1 else max(1, total // shards))
    write_byte_tokenizer(folder)


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the config class takes them; for a model with images, those of the language model are in text_config."""
    if "vision_config" not in settings:
        return dict(settings)
    outer = {
        "vision_config",
        "text_config",
        "image_token_index",
        "image_token_id",
        "video_token_id",
        "tie_word_embeddings",
    }
    text = {key: value for key, value in settings.items() if key not in outer}
    return {
        **{key: value for key, value in settings.items() if key in outer},
        "text_config": {**text, **settings.get("text_config", {})},
    }


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens 0 … 255 are bytes, then <s>, </s> and <pad>; every text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(
            vocab={character: number for number, character in enumerate(alphabet)}, merges=[]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
