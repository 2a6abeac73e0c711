"""Fixtures that every test may use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real benchmark subsets and small trained models beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture
def demo_sweep(tmp_path: Path) -> Callable[..., Any]:
    """demo_sweep("method=rtn", "scheme=w4", …) -> a Sweep of the embedded model in this process, results in tmp_path/runs."""

    def make(*overrides: str) -> Any:
        from harness.config import load_sweep

        own = ["model=demo", f"runs={tmp_path / 'runs'}", "tracking=none", "device=cpu"]
        if any("gptq" in override or "awq" in override for override in overrides):
            own += ["calibration=demo", "calibration.samples=4", "calibration.length=64"]
        if not any(override.startswith("cluster") for override in overrides):
            own += ["cluster=local", "cluster.workers=1"]
        return load_sweep(None, [*own, *overrides])

    return make


# model_type -> what differs from the common tiny shape; a new family adds its line
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
}
COMMON: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """tiny_model("llama", num_hidden_layers=2) -> a folder with config, safetensors and a byte tokenizer of 259 tokens.

    Random weights from a fixed seed, with input channels of unequal size and non-zero biases, so that methods have work to do.
    `dtype` ("float32") is the stored type, `shards` (1) the number of weight files; everything else goes to the model's config.
    """

    def make(family: str = "llama", *, dtype: str = "float32", shards: int = 1, seed: int = 0, **overrides: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(family, **{**COMMON, **TINY.get(family, {}), **overrides})
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    start = 1.0 if name.endswith("weight") else 0.0
                    parameter.copy_(start + 0.1 * torch.randn(parameter.shape, generator=generator))
                else:
                    channels = 1 + torch.rand(parameter.shape[-1], generator=generator) ** 4 * 4
                    spread = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * channels * spread)
        model = model.to(getattr(torch, dtype))
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size=total if shards == 1 else max(1, total // shards))
        write_byte_tokenizer(folder)
        return folder

    return make


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens 0 … 255 are bytes, then <s>, </s> and <pad>; every text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "model_max_length": 128, "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
