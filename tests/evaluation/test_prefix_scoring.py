"""Shared prefixes: rows say what each path alone says, for every way that paths can meet, and models that cannot are told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import random_llama
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from harness.core.cell import ActivationScheme, Cell, Method, Model, Override, Scheme, freeze
from harness.evaluation import prefix_scoring
from harness.evaluation.protocols import depends_on_company

VOCABULARY = 5  # few tokens, so that paths meet often
MODEL = random_llama(VOCABULARY)


def pair(context: list[int], continuation: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(context, np.int32), np.array(continuation, np.int32)


@torch.inference_mode()
def alone(
    model: torch.nn.Module, context: np.ndarray, continuation: np.ndarray
) -> prefix_scoring.Answer:
    """One request by itself, without padding or sharing."""
    inputs, targets = prefix_scoring.clip(context, continuation, 512)
    logits = (
        model(torch.from_numpy(inputs.astype(np.int64))[None])
        .logits[0, -len(targets) :]
        .log_softmax(-1)
    )
    wanted = torch.from_numpy(targets.astype(np.int64))
    return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


def answers(
    model: torch.nn.Module, pairs: list[tuple[np.ndarray, np.ndarray]], batch_tokens: int = 0
) -> list[prefix_scoring.Answer]:
    requests = [prefix_scoring.clip(before, after, 512) for before, after in pairs]
    found = {
        i: answer
        for batch in prefix_scoring.scores(model, requests, "cpu", batch_tokens)
        for i, answer in batch.items()
    }
    assert sorted(found) == list(range(len(pairs)))
    return [found[index] for index in range(len(pairs))]


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12), st.sampled_from([0, 1, 20]))
def test_a_path_in_company_is_the_path_alone(
    requests: list[tuple[list[int], list[int]]], batch_tokens: int
) -> None:
    pairs = [pair(*request) for request in requests]
    for found, (before, after) in zip(answers(MODEL, pairs, batch_tokens), pairs, strict=True):
        expected = alone(MODEL, before, after)
        assert found[0] == pytest.approx(expected[0], abs=1e-4) and found[1] == expected[1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_kinds_of_attention(implementation: str) -> None:
    model = random_llama(VOCABULARY, attn_implementation=implementation)
    assert prefix_scoring.unsupported(model) is None
    pairs = [pair([1, 2, 3], [4]), pair([1, 2, 3], [2, 2]), pair([1, 2], [3, 4]), pair([0], [1])]
    for found, (before, after) in zip(answers(model, pairs), pairs, strict=True):
        assert found[0] == pytest.approx(alone(model, before, after)[0], abs=1e-4)


def test_shared_stems_are_computed_once() -> None:
    examples = list(range(5)) * 20
    pairs = [
        pair([*examples, question, 1], [choice]) for question in range(4) for choice in range(4)
    ]
    rows = prefix_scoring.plan_rows(
        [prefix_scoring.clip(before, after, 512) for before, after in pairs], 64, 10**6
    )
    assert [row.length for row in rows] == [100 + 4 * 2]


def test_strangers_get_rows_of_their_own() -> None:
    generator = np.random.default_rng(0)
    pairs = [pair(generator.integers(0, 10**6, 400).tolist(), [1]) for _ in range(4)]
    requests = [prefix_scoring.clip(before, after, 512) for before, after in pairs]
    # attention over masked pairs would cost more than it saves
    assert len(prefix_scoring.plan_rows(requests, 8, 10**6)) == 4


def test_contexts_that_do_not_fit_lose_their_beginning() -> None:
    inputs, targets = prefix_scoring.clip(*pair(list(range(10)), [10, 11]), 6)
    assert inputs.tolist() == [5, 6, 7, 8, 9, 10] and targets.tolist() == [10, 11]


def test_models_that_cannot_are_told_apart() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1))
    assert "rotary" in str(prefix_scoring.unsupported(gpt2))
    small = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    assert "window" in str(
        prefix_scoring.unsupported(MistralForCausalLM(MistralConfig(**small, sliding_window=8)))
    )
    assert (
        prefix_scoring.unsupported(MistralForCausalLM(MistralConfig(**small, sliding_window=None)))
        is None
    )
    dynamic = random_llama(
        16, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    assert "length" in str(prefix_scoring.unsupported(dynamic))
    dynamic.config._attn_implementation = "flash_attention_2"
    assert "mask" in str(prefix_scoring.unsupported(dynamic))


def test_a_layer_of_its_own_scheme_may_depend_on_company() -> None:
    def depends(*overrides: Override, **activation: object) -> bool:
        scheme = Scheme("x", activation=ActivationScheme(**activation), overrides=overrides)  # type: ignore[arg-type]
        return depends_on_company(Cell(Model("demo", "demo"), Method("none"), scheme))

    def down(**fields: object) -> Override:
        return Override(("down_proj",), activation=freeze(fields))

    assert not depends() and not depends(down(bits=4))
    assert (
        depends(granularity="tensor")
        and depends(down(granularity="tensor"))
        and depends(down(outlier_threshold=6.0))
    )
    assert not depends(down(granularity="tensor", dynamic=False)), (
        "fixed scales are the same in any company"
    )


def test_rope_settings_do_not_make_rotary_positions() -> None:
    """Falcon with ALiBi has rope settings that it does not use, and so may any config."""
    from transformers import FalconConfig, FalconForCausalLM

    small = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    falcon = FalconForCausalLM(FalconConfig(**small, alibi=True))
    assert falcon.config.rope_parameters
    assert "ALiBi" in str(prefix_scoring.unsupported(falcon))
    assert prefix_scoring.unsupported(FalconForCausalLM(FalconConfig(**small))) is None
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1, rope_theta=10000.0)
    )
    assert "rotary" in str(prefix_scoring.unsupported(gpt2))
