"""Architectures without a family file of their own: what they can do, and which refusals name the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small import cell, part

from harness.core.cell import Method
from harness.core.errors import ModelError
from harness.quantization import models

AWQ = Method(
    "awq",
    transform=part("awq", "transform", exponents=4, scale_grouped_values=True),
    rounding=part("rtn"),
)


def test_an_unknown_architecture_says_what_it_cannot_do(tiny_model: Callable[..., Path]) -> None:
    from harness.core import plugins

    shapes = models.shapes(tiny_model("starcoder2"))
    assert shapes.family == "generic" and "transforms are refused" in shapes.notes[0]
    scheme = cell(Path("x"), AWQ, group_size=16).scheme
    (reason,) = plugins.build("transform", "awq", {}).check(scheme, shapes)
    assert "no place where a scale can be folded" in reason
    assert not plugins.build("rounding", "gptq", {}).check(scheme, shapes)
    groups = {linear.name: linear.group for linear in shapes.linears}
    assert (
        groups["self_attn.q_proj"]
        == groups["self_attn.k_proj"]
        == groups["self_attn.v_proj"]
        != groups["mlp.c_fc"]
    )


def test_fused_experts_without_a_family_are_refused_by_name(
    tiny_model: Callable[..., Path],
) -> None:
    folder = tiny_model("olmoe", num_experts=4, num_hidden_layers=1)
    with pytest.raises(
        ModelError, match=r"fused matrices.*mlp.experts.gate_up_proj.*docs/adding.md"
    ):
        models.shapes(folder)
