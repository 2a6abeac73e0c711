"""DB-LLM: the dual-binary map and its gradients, the distillation loss, and a whole model distilled end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes, random_weight
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.quantization.methods.db_llm import Tuning, distillation_loss
from harness.quantization.numerics.dual_binary import (
    DualBinaryWeight,
    TrainedScales,
    initial_step,
    nearest,
    planes_of,
)
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight

W2 = WeightScheme("int", 2, 16, False, "float32")


def rounded(weight: Tensor, scheme: WeightScheme = W2, **settings: Any) -> DualBinaryWeight:
    return plugins.build("rounding", "db_llm", settings).round_layer(
        "self_attn.q_proj", weight, None, scheme, generator()
    )


def test_untrained_it_is_nearest_of_four_levels() -> None:
    """10,000 weights, and the ties: -s/2 to -s, s/2 to s, 3s/2 to s."""
    step = 0.25
    weight = torch.cat(
        (
            3 * torch.randn(10_000, generator=generator(1)) * step,
            torch.tensor([-0.5, 0.5, 1.5]) * step,
        )
    )
    levels = torch.tensor([-1.0, 0.0, 1.0, 2.0]) * step
    found = nearest(weight, torch.tensor(2 * step), torch.tensor(-step))
    expected = levels[(weight[:-3, None] - levels).abs().argmin(1)]
    assert torch.equal(found[:-3], expected)
    assert found[-3:].tolist() == [-step, step, step]


def test_weights_on_the_levels_stay() -> None:
    codes = torch.randint(-1, 3, (32, 4, 16), generator=generator(2)).float()
    codes[..., 0] = 2  # every group reaches its largest level
    step = 0.1 + torch.rand(32, 4, 1, generator=generator(3))
    weight = (codes * step).reshape(32, 64)
    assert torch.allclose(rounded(weight).dequantize(), weight, rtol=1e-6)


def test_the_step_is_half_the_largest_magnitude() -> None:
    groups = random_weight(8, 64).reshape(8, 4, 16)
    found = rounded(groups.reshape(8, 64))
    assert torch.equal(found.first_scale, groups.abs().amax(-1)) and torch.equal(
        found.second_scale, -groups.abs().amax(-1) / 2
    )
    assert found.group_size == 16


def test_the_range_search_is_never_worse() -> None:
    weight = random_weight(32, 128)
    groups = weight.reshape(32, 8, 16)
    plain, searched = (
        rounded(weight, range_search=flag).dequantize().reshape(groups.shape)
        for flag in (False, True)
    )
    errors = [(found - groups).square().sum(-1) for found in (plain, searched)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all()) and float(
        errors[1].sum()
    ) < 0.97 * float(errors[0].sum())
    assert bool((initial_step(groups, True) <= initial_step(groups)).all())


def test_gradients_of_both_scales_with_codes_held() -> None:
    weight, target = random_weight(6, 32).double(), random_weight(6, 32, seed=5).double()
    step = initial_step(weight.reshape(6, 2, 16))[..., 0]
    trained = TrainedScales(weight, 2 * step, -step).double()
    trained.growth.data = 0.1 * torch.randn(
        trained.growth.shape, generator=generator(4), dtype=torch.float64
    )
    loss = (trained.weight() - target).square().sum()
    (gradient,) = torch.autograd.grad(loss, trained.growth)
    with torch.no_grad():
        first_scale, second_scale = trained.scales()
        first, second = planes_of(weight.reshape(6, 2, 16), first_scale, second_scale)
        residue = first_scale * first + second_scale * second - target.reshape(6, 2, 16)
        # d w' / d a1 = b1, d w' / d a2 = b2, and a = start · exp(growth)
        halves = ((first, first_scale), (second, second_scale))
        by_hand = torch.stack([(2 * residue * b).sum(-1, keepdim=True) * a for b, a in halves])
        assert torch.allclose(gradient, by_hand)
        eps = 1e-6
        for index in ((0, 1, 0, 0), (1, 4, 1, 0)):
            values = []
            for sign in (1, -1):
                scales = (
                    trained.get_buffer("start")
                    * (trained.growth + sign * eps * _unit(trained.growth, index)).exp()
                )
                values.append(
                    (scales[0] * first + scales[1] * second - target.reshape(6, 2, 16))
                    .square()
                    .sum()
                )
            assert float((values[0] - values[1]) / (2 * eps)) == pytest.approx(
                float(gradient[index]), rel=1e-5
            )


def _unit(like: Tensor, index: tuple[int, ...]) -> Tensor:
    unit = torch.zeros_like(like)
    unit[index] = 1
    return unit


def test_through_the_thresholds_scales_feel_the_codes_they_move() -> None:
    """Scaling a1 and a2 together: codes held, w' grows by itself; let through, by w' - w inside the levels and w' outside."""
    weight = random_weight(6, 32)
    step = initial_step(weight.reshape(6, 2, 16))[..., 0] / 2  # so that some weights lie outside
    plain, through = (TrainedScales(weight, 2 * step, -step, flag) for flag in (False, True))
    values = plain.weight().detach()
    assert torch.equal(values, through.weight())
    wide = step.repeat_interleave(16, dim=1)
    inside = (weight > -1.5 * wide) & (weight < 2.5 * wide)
    assert bool(inside.any()) and not bool(inside.all())
    for scales, expected in (
        (plain, values),
        (through, torch.where(inside, values - weight, values)),
    ):
        row, column = 3, int((~inside[3]).nonzero()[0]) if bool((~inside[3]).any()) else 0
        for j in (column, 7, 20):
            (gradient,) = torch.autograd.grad(scales.weight()[row, j], scales.growth)
            assert float(gradient.sum()) == pytest.approx(float(expected[row, j]), abs=1e-6)


def test_without_gamma_it_is_plain_distillation() -> None:
    student, teacher = (torch.randn(1, 12, 20, generator=generator(seed)) for seed in (1, 2))
    plain = -(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).sum(-1).mean()
    assert torch.allclose(distillation_loss(student, teacher, 0.0), plain)
    assert torch.allclose(distillation_loss(student, teacher, 1e-9), plain)
    assert not torch.allclose(distillation_loss(student, teacher, 1.0), plain)


def test_ambiguous_tokens_weigh_more() -> None:
    """Of two tokens with one loss each, the gradient of the less certain one is larger; the weights get none themselves."""
    student = torch.zeros(1, 2, 8)
    student[0, 0, 0] = 6.0  # certain, and right or wrong by as much as the other
    teacher = torch.zeros(1, 2, 8)
    teacher[0, 0, 0] = 4.0
    student.requires_grad_()
    ratios = []
    for gamma in (0.0, 1.0):
        (gradient,) = torch.autograd.grad(
            distillation_loss(student + 0.1 * torch.arange(8.0), teacher, gamma), student
        )
        ratios.append(float(gradient[0, 1].norm() / gradient[0, 0].norm()))
    assert ratios[1] > 2 * ratios[0]


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_the_layout_stores_two_planes_and_two_scales(scale_dtype: str) -> None:
    found = rounded(random_weight(24, 128), WeightScheme("int", 2, 64, False, scale_dtype))
    again = QuantizedWeight.kinds["dual_binary"].unpack(*found.pack())
    assert torch.equal(again.dequantize(), found.dequantize())
    assert found.bits_per_weight == 2 + 2 * (16 if scale_dtype == "float16" else 32) / 64


def test_zero_groups_stay_zero() -> None:
    weight = random_weight(8, 32)
    weight[3, :16] = 0
    found = rounded(weight)
    assert not bool(found.dequantize()[3, :16].any())
    trained = TrainedScales(weight, found.first_scale, found.second_scale, through_thresholds=True)
    assert torch.equal(trained.weight(), found.dequantize())
    assert bool(
        torch.isfinite(torch.autograd.grad(trained.weight().sum(), trained.growth)[0]).all()
    )


class TinyNetwork:
    """Logits of one linear over one-hot tokens: enough of a model for a tuning."""

    def __init__(self, linear: Any, vocabulary: int = 32) -> None:
        self.linear, self.vocabulary, self.sampled = linear, vocabulary, 0

    def logits(self, tokens: Tensor) -> Tensor:
        return self.linear(nn.functional.one_hot(tokens, self.vocabulary).float() * 8)

    def sample(self, first: Tensor, length: int, rng: torch.Generator) -> Tensor:
        self.sampled += 1
        return torch.randint(0, self.vocabulary, (first.shape[0], length), generator=rng)


def tuned(
    settings: dict[str, Any], seed: int = 0
) -> tuple[Any, TinyNetwork, TinyNetwork, dict[str, Any], list[tuple[int, int]]]:
    weight = random_weight(32, 32)
    tuning = plugins.build("tuning", "db_llm", settings)
    linear = tuning.linear("q", rounded(weight), None, weight)
    student, teacher = TinyNetwork(linear), TinyNetwork(lambda x: x @ weight.T)
    walk = tuning.tune(
        student,
        teacher,
        list(linear.parameters()),
        torch.zeros(6, 24, dtype=torch.int64),
        generator(seed),
    )
    steps = []
    while True:
        try:
            steps.append(next(walk))
        except StopIteration as end:
            return linear, student, teacher, end.value, steps


def test_distillation_brings_the_student_nearer() -> None:
    linear, student, teacher, notes, steps = tuned({"epochs": 8, "rate": 0.01, "gamma": 0.0})
    assert steps[-1] == (48, 48) and len(notes["loss"]) == 8
    assert notes["loss"][-1] < notes["loss"][0]
    tokens = torch.arange(32)[None]
    weight = random_weight(32, 32)
    start = TinyNetwork(
        plugins.build("tuning", "db_llm", {}).linear("q", rounded(weight), None, weight)
    )
    losses = [
        distillation_loss(each.logits(tokens), teacher.logits(tokens), 0.0).item()
        for each in (start, student)
    ]
    assert losses[1] < losses[0]
    assert torch.allclose(linear.stored().dequantize(), linear.trained.weight(), rtol=1e-5)


def test_the_text_is_the_teachers_unless_told_otherwise() -> None:
    assert tuned({})[2].sampled == 1 and tuned({})[1].sampled == 0
    assert tuned({"generated": False})[2].sampled == 0
    first, again, other = (tuned({}, seed)[0].stored().dequantize() for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_epochs_leave_the_rounding() -> None:
    linear, *_ = tuned({"epochs": 0})
    assert torch.equal(linear.stored().dequantize(), rounded(random_weight(32, 32)).dequantize())


def test_only_its_own_untransformed_weights_are_trained() -> None:
    tuning, weight = plugins.build("tuning", "db_llm", {}), random_weight(16, 32)
    with pytest.raises(MethodError, match="dense"):
        tuning.linear("q", DenseWeight(weight), None, weight)
    with pytest.raises(MethodError, match="transform"):
        tuning.linear("q", rounded(weight), None, None)


@pytest.mark.parametrize("kind", ["rounding", "tuning"])
@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (WeightScheme("int", 3, 16), "3 bits"),
        (WeightScheme("int", 2, 16, True), "symmetric=false"),
        (WeightScheme("int", 2, 7), "7"),
    ],
)
def test_other_schemes_are_refused(kind: str, scheme: WeightScheme, reason: str) -> None:
    assert any(
        reason in each
        for each in plugins.build(kind, "db_llm", {}).check(Scheme("test", scheme), llama_shapes())
    )


@pytest.mark.parametrize("settings", [{"epochs": -1}, {"rate": 0.0}, {"gamma": -1.0}])
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plugins.build("tuning", "db_llm", settings)


def test_the_blockwise_variant_starts_at_the_rounding_and_improves() -> None:
    scheme = Scheme("test", W2)
    block = FakeBlock(needs=("reference",))
    untrained = plugins.build("rounding", "db_llm_blockwise", {"epochs": 0}).round_block(
        block, scheme, generator()
    )
    for name, found in untrained.items():
        assert torch.equal(
            found.dequantize(),
            rounded(block.linear(name).weight.detach(), range_search=True).dequantize(),
        )
    trained = plugins.build(
        "rounding", "db_llm_blockwise", {"epochs": 20, "rate": 0.003}
    ).round_block(block, scheme, generator())
    losses = block.notes["db_llm_blockwise"]["loss"]
    assert losses[-1] < losses[0]
    errors = []
    for weights in (untrained, trained):
        placed = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
        with torch.no_grad():
            errors.append(
                sum(
                    float((block.run(x, placed) - y).square().mean())
                    for x, y in zip(block.inputs(), block.references(), strict=True)
                )
            )
    assert errors[1] < 0.9 * errors[0]


def test_teachers_are_named_in_the_facts() -> None:
    assert Tuning.needs == ("tokens", "teacher") and Tuning.stochastic
