"""L0 masks trained to a target shape: the masks' distribution, folding, what training reaches, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from reductions import logits, reduce, reduced_cell, reducing
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from harness.core import plugins
from harness.core.cell import Calibration
from harness.core.errors import MethodError
from harness.data.demo.train import FOLDER as DEMO
from harness.quantization.calibration import draw_windows
from harness.quantization.methods import l0_target_shape as method
from harness.quantization.models import config_by_block, read_config, shapes
from harness.quantization.pipeline.reduction import FunctionalModel

NAME = "l0_target_shape"
# too few steps to reach a target, which tests of other properties do without
QUICK = {"steps": 12, "batch": 2, "sparsity_warmup": 0.1, "rate_warmup": 0.1, "rate": 0.01}
SMALLER = {"blocks": 2, "intermediate": 72, "kv_heads": 1, "hidden": 48}


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may end anywhere; what is cut has the target shape all the same."""
    monkeypatch.setattr(method, "TOLERANCE", math.inf)


def test_masks_are_open_as_often_as_their_probability_says() -> None:
    rng = torch.Generator().manual_seed(0)
    log_alpha = torch.linspace(-4, 4, 9)
    uniform = torch.rand(100_000, 9, generator=rng).clamp(1e-6, 1 - 1e-6)
    masks = method.sampled(log_alpha, uniform)
    assert masks.min() == 0 and masks.max() == 1
    share = (masks > 0).float().mean(0)
    torch.testing.assert_close(share, method.open_share(log_alpha), atol=0.006, rtol=0)
    # Sheared LLaMA's masks start at log α = 5: open with probability 0.9986
    assert float(method.open_share(torch.tensor(5.0))) == pytest.approx(0.9986, abs=5e-5)
    assert float(method.settled(torch.tensor([method.LIMIT]), 1)) == pytest.approx(0.9960, abs=5e-5)


def test_settled_masks_keep_exactly_the_target_in_every_row() -> None:
    log_alpha = torch.tensor([[3.0, -1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    masks = method.settled(log_alpha, 2)
    assert masks.ne(0).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert bool((method.settled(log_alpha, 4) > 0).all())


def test_multipliers_climb_with_the_distance_from_the_target() -> None:
    closed = torch.tensor([0.1, 0.3, 0.4], requires_grad=True)
    multipliers = torch.tensor([2.0, 5.0], requires_grad=True)
    loss = method.lagrangian(closed, 0.25, multipliers)
    loss.backward()
    distance = closed.detach() - 0.25
    assert multipliers.grad is not None and closed.grad is not None
    expected = torch.stack([distance.mean(), distance.square().mean()])
    torch.testing.assert_close(multipliers.grad, expected)
    torch.testing.assert_close(closed.grad, (2 + 10 * distance) / 3)


def test_rates_warm_up_and_end_at_a_tenth() -> None:
    shares = [method.rate_share(step, 100, 10) for step in range(101)]
    assert shares[0] == 0 and shares[5] == 0.5 and shares[10] == 1
    assert shares[55] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)
    assert shares[10:] == sorted(shares[10:], reverse=True)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_the_cut_model_is_the_masked_model(
    family: str,
    settings: dict[str, Any],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    anywhere: None,
) -> None:
    """At full shape with the masks that were left, each where it acts, and after the cut: the same logits."""
    # a large ε in the norms, which a mean square over too many channels would show
    folder, windows = tiny_model(family, rms_norm_eps=1e-2, **settings), small.windows(4, 16)
    seen: dict[str, Any] = {}
    fold = method.fold

    def keep_last(tensors: Any, masks: Any, own: Any, name_of: Any, stretch: bool) -> Any:
        if not stretch:
            with torch.no_grad():
                masked = fold(tensors, masks, own, name_of, True)
                seen["masks"] = masks
                seen["logits"] = network[0].logits(windows, {**tensors, **masked}).clone()
        return fold(tensors, masks, own, name_of, stretch)

    network: list[FunctionalModel] = []
    made = FunctionalModel.__init__

    def remember(self: FunctionalModel, *arguments: Any) -> None:
        made(self, *arguments)
        network.append(self)

    monkeypatch.setattr(FunctionalModel, "__init__", remember)
    monkeypatch.setattr(method, "fold", keep_last)
    record = reduce(folder, tmp_path / "cut", reducing(NAME, **SMALLER, **QUICK), windows)
    expected = seen["logits"]
    largest = float((logits(tmp_path / "cut", windows) - expected).abs().max())
    assert largest < 1e-5 * float(expected.abs().max()), (largest, expected.abs().max())
    choice = record["choice"]
    for kind, count in SMALLER.items():
        assert bool((seen["masks"][kind].count_nonzero(-1) == count).all())
    assert len(choice["blocks"]) == 2 and len(choice["hidden"]) == 48
    found = shapes(tmp_path / "cut")
    assert (found.blocks, found.hidden_size, found.kv_heads) == (2, 48, 1)
    assert read_config(tmp_path / "cut")["intermediate_size"] == 72


def test_channels_that_are_zero_can_be_masked_without_a_change(
    tiny_model: Callable[..., Path],
) -> None:
    """The mean square is over open channels: of a stream whose closed channels are zero, that of a narrower model."""
    folder = tiny_model(rms_norm_eps=1e-2)
    own = shapes(folder)
    tensors = load_file(folder / "model.safetensors")
    hidden = torch.ones(64)
    hidden[48:] = 0
    folded = method.fold(
        tensors, {"hidden": hidden}, own, lambda i, n: f"model.layers.{i}.{n}", True
    )
    state = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * hidden
    wider = math.sqrt(64 / 48)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight

    name = "model.layers.1.input_layernorm.weight"
    expected = norm(state[:, :48], tensors[name][:48])
    torch.testing.assert_close(norm(state * wider, folded[name])[:, :48], expected)


def test_a_target_of_everything_leaves_the_model_but_for_masks_below_one(
    tiny_model: Callable[..., Path], tmp_path: Path, anywhere: None
) -> None:
    """One channel goes; with weights and masks that do not move, the masks of what is kept are σ(0.8 · log 100 / β) at most."""
    folder, windows = tiny_model(), small.windows(4, 16)

    settings = {"hidden": 64, "intermediate": 95, "rate": 0.0, "steps": 1}
    settings = {**QUICK, **settings, "rate_warmup": 0.9}
    record = reduce(folder, tmp_path / "made", reducing(NAME, **settings), windows)
    choice = record["choice"]
    assert choice["hidden"] == list(range(64)) and choice["blocks"] == [0, 1, 2]
    assert all(len(kept) == 95 for kept in choice["channels"].values())
    assert choice["closed"] == pytest.approx({"hidden": 0.0020, "intermediate": 0.0020}, abs=5e-5)
    tensors = load_file(folder / "model.safetensors")
    made = load_file(tmp_path / "made" / "model.safetensors")
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(made[name], tensors[name] * 0.9960, rtol=1e-3, atol=0)
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(made[name], tensors[name], rtol=0, atol=0)


def test_the_same_seed_makes_the_same_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path, anywhere: None
) -> None:
    folder, windows = tiny_model(), small.windows(4, 16)
    made = []
    for name in ("one", "two"):
        reduce(folder, tmp_path / name, reducing(NAME, **SMALLER, **QUICK), windows)
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_masks_that_miss_the_target_fail_with_their_numbers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model()
    with pytest.raises(
        MethodError, match=r"masks did not reach the target.*hidden 0\.\d\d\d of 0\.250"
    ):
        reduce(folder, tmp_path / "made", reducing(NAME, **SMALLER, **QUICK), small.windows(4, 16))
    assert not (tmp_path / "made").exists()


def test_training_beats_saliency_at_the_same_shape(tmp_path: Path) -> None:
    """On the demo model, a shape with 24 % fewer weights; loss on text that neither saw."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    def text(split: str, samples: int) -> Tensor:
        return draw_windows(
            Calibration("demo", "demo", split=split, samples=samples, length=48, digest="demo"),
            tokenizer,
        )

    def loss(folder: Path) -> float:
        windows = text("test", 16)
        found = logits(folder, windows)[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(found, windows[:, 1:].flatten()))

    shape = {"intermediate": 120, "hidden": 60, "kv_heads": 3}
    windows = text("calibration", 256)
    trained = reducing(NAME, **shape, steps=200, rate=0.002)
    record = reduce(DEMO, tmp_path / "trained", trained, windows)
    targets = {"intermediate": 1 / 4, "hidden": 1 / 16, "kv_heads": 1 / 4}
    assert record["choice"]["closed"] == pytest.approx(targets, abs=0.02)
    reduce(DEMO, tmp_path / "cut", reducing("prune_to_shape", **shape), windows)
    assert shapes(tmp_path / "trained").parameters == shapes(tmp_path / "cut").parameters
    assert record["parameters"]["after"] < 0.77 * record["parameters"]["before"]
    assert loss(tmp_path / "trained") < loss(tmp_path / "cut")


def test_the_plan_says_why_not_and_what_it_costs(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model()
    own, config = shapes(folder), config_by_block(read_config(folder))

    def reasons(**settings: Any) -> list[str]:
        found: list[str] = plugins.build("reduction", NAME, settings).check(own, config)
        return found

    assert "nothing would be removed" in reasons()[0]
    assert "hidden 100: this model has 64" in reasons(hidden=100)[0]
    (large,) = reasons(hidden=48, most_parameters=1e4)
    assert "trains every weight" in large and "GB" in large and "most_parameters (1e+04)" in large
    assert not reasons(hidden=48)
    cell = reduced_cell(folder, reducing(NAME, hidden=48))
    (warned,) = plugins.build("reduction", NAME, {"hidden": 48}).warnings(cell, own)
    assert "on 9.6e+04 tokens of 2.4e+02 different ones" in warned  # 400 · 6 · 40 of 6 · 40


def test_other_structures_are_refused(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("opt")
    built = plugins.build("reduction", NAME, {"hidden": 8})
    found = built.check(shapes(folder), config_by_block(read_config(folder)))
    assert found == ['shapes are cut of Llama and models of its structure, not of family "opt"']
