"""The compiled loop over columns gives what the torch loop gives, to the bit, whatever the input."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.core.cell import WeightScheme
from harness.core.number_formats import FORMATS
from harness.quantization.numerics import compiled_columns, error_feedback
from harness.quantization.numerics.error_feedback import (
    BinaryEntries,
    Columns,
    Correction,
    GridColumns,
    feed_forward,
    round_on_grids,
)
from harness.quantization.numerics.grids import Fitting

ROOT = Path(__file__).resolve().parents[3]
FORMS = {
    "steps": WeightScheme("int", 4, -1, False, "float32"),
    "two bits": WeightScheme("int", 2, -1, False, "float16"),
    "symmetric": WeightScheme("int", 3, -1, True, "float32"),
    "signed": WeightScheme("int", 3, -1, True, "float16", signed_scales=True),
    "eight bits": WeightScheme("int", 8, -1, False, "bfloat16"),
    "float zero": WeightScheme("int", 3, -1, False, "float16", zero_point="float"),
    **{
        name: WeightScheme(name, FORMATS[name].element.bits, -1, False, dtype)
        for name, dtype in (("nf4", "float32"), ("fp8_e4m3", "float16"), ("mxfp4", "e8m0"))
    },
    "by inverse": WeightScheme("nf4", 4, -1, False, "double_quantized"),
}
DAMAGE = (
    "none",
    "nan",
    "infinity",
    "zero diagonal",
    "zeros",
    "nan factor",
    "tiny",
    "not triangular",
)


def problem(
    rows: int, columns: int, size: int, form: str, damage: str, seed: int, binary: float = 0
) -> tuple[Tensor, Tensor, GridColumns]:
    """A matrix, a factor, and grids of groups fitted on the matrix as it is when their block begins."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng)
    factor = torch.randn(columns, columns, generator=rng).triu() / columns**0.5
    factor.diagonal().copy_(0.5 + torch.rand(columns, generator=rng))
    place = int(torch.randint(columns, (1,), generator=rng))
    if damage in ("nan", "infinity") and rows:
        weight[rows // 2, place] = float(damage)
    elif damage == "zero diagonal":
        factor[place, place] = 0
    elif damage == "nan factor":
        factor[0, place] = float("nan")
    elif damage == "zeros":
        weight[: rows // 2] = 0
        weight[:, place] = 0
    elif damage == "tiny":
        weight *= 1e-38
    elif damage == "not triangular":
        factor = torch.randn(columns, columns, generator=rng)
    fitting = Fitting(FORMS[form])
    groups = -(-columns // size)
    scale, zero = torch.ones(2, groups, rows)

    def begin(matrix: Columns) -> None:
        first, end = matrix.start, matrix.start + matrix.block.shape[1]
        for group in range(groups):
            if first <= group * size < end:  # a group may reach over the end of the block
                grid = fitting.fit(matrix.group(group * size, min(size, columns - group * size)))
                scale[group], zero[group] = grid.scale[:, 0], grid.zero[:, 0]

    codes = torch.zeros(columns, rows, dtype=torch.uint8)
    form_grid = fitting.fit(torch.randn(2, 4, generator=rng))
    group_of = [column // size for column in range(columns)]
    rule = GridColumns(form_grid, scale, zero, group_of, codes, begin)
    if binary:
        mask = torch.rand(columns, rows, generator=rng) < binary
        low, mean = torch.randn(2, groups, rows, generator=rng)
        rule.binary = BinaryEntries(mask, low, mean)
    return weight, factor, rule


@settings(max_examples=150, deadline=None)
@given(
    rows=st.sampled_from((0, 1, 2, 7, 8, 63, 64, 65, 130)),
    columns=st.integers(1, 50),
    size=st.integers(1, 50),
    block_size=st.integers(1, 60),
    form=st.sampled_from(sorted(FORMS)),
    damage=st.sampled_from(DAMAGE),
    binary=st.sampled_from((0, 0.3, 1)),
    seed=st.integers(0, 2**31),
)
@example(rows=0, columns=3, size=2, block_size=2, form="steps", damage="none", binary=0, seed=0)
@example(
    rows=3,
    columns=1,
    size=1,
    block_size=128,
    form="steps",
    damage="zero diagonal",
    binary=0.3,
    seed=0,
)
@example(rows=65, columns=40, size=12, block_size=16, form="steps", damage="nan", binary=0, seed=1)
def test_both_loops_agree_to_the_bit(
    rows: int,
    columns: int,
    size: int,
    block_size: int,
    form: str,
    damage: str,
    binary: float,
    seed: int,
) -> None:
    weight, factor, compiled = problem(rows, columns, size, form, damage, seed, binary)
    _, _, plain = problem(rows, columns, size, form, damage, seed, binary)
    before = weight.clone()
    round_on_grids(weight, factor, compiled, block_size=block_size)
    feed_forward(weight, factor, plain, block_size=block_size)
    assert torch.equal(compiled.codes, plain.codes)
    for ours, theirs in ((compiled.scale, plain.scale), (compiled.zero, plain.zero)):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32)), "written to"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from((1, 7, 64, 65, 130)),
    columns=st.integers(1, 50),
    size=st.integers(1, 50),
    block_size=st.integers(1, 60),
    form=st.sampled_from(sorted(FORMS)),
    damage=st.sampled_from(("none", "zeros", "tiny")),
    rounded_behind=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_both_loops_agree_with_a_correction(
    rows: int,
    columns: int,
    size: int,
    block_size: int,
    form: str,
    damage: str,
    rounded_behind: bool,
    seed: int,
) -> None:
    weight, factor, compiled = problem(rows, columns, size, form, damage, seed)
    _, _, plain = problem(rows, columns, size, form, damage, seed)
    rng = torch.Generator().manual_seed(seed)
    added = 0.3 * torch.randn(columns, columns, generator=rng).triu(1)
    correction = Correction(added, rounded_behind)
    round_on_grids(weight, factor, compiled, block_size=block_size, correction=correction)
    feed_forward(weight, factor, plain, block_size=block_size, correction=correction)
    assert torch.equal(compiled.codes, plain.codes)
    assert torch.equal(compiled.scale.view(torch.int32), plain.scale.view(torch.int32))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor, rule = problem(1500, 96, 32, "steps", "none", 3)
    feed_forward(weight, factor, rule, block_size=32)
    expected = rule.codes.clone()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rule.codes.zero_()
    round_on_grids(weight, factor, rule, block_size=32)
    assert torch.equal(rule.codes, expected)


def test_other_tensors_take_the_torch_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, and environments without Numba."""
    weight, factor, rule = problem(9, 4, 2, "steps", "none", 0)
    feed_forward(weight, factor, rule, block_size=2)
    expected = rule.codes.clone()

    def refuse(*arguments: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(compiled_columns, "round_block", refuse)
    with pytest.raises(AssertionError, match="compiled"):
        round_on_grids(weight, factor, rule, block_size=2)
    fixed = dataclasses.replace(rule, begin=None)
    double = dataclasses.replace(fixed, scale=rule.scale.double(), zero=rule.zero.double())
    round_on_grids(weight.double(), factor.double(), double, block_size=2)

    def not_installed(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(error_feedback.importlib, "import_module", not_installed)
    rule.codes.zero_()
    round_on_grids(weight, factor, rule, block_size=2)
    assert torch.equal(rule.codes, expected)


def test_without_a_folder_for_the_cache_functions_still_compile() -> None:
    code = (
        "import numba, numba.core.caching as caching\n"
        "def nowhere(self, function): raise RuntimeError('cannot cache function: no locator')\n"
        "caching.CacheImpl.__init__ = nowhere\n"
        "from harness.quantization.numerics import compiled_columns\n"
        "print(type(compiled_columns._round_block._cache).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "NullCache"


def test_kinds_are_those_of_the_grid() -> None:
    kinds = {
        name: compiled_columns.kind_of(Fitting(scheme).fit(torch.randn(2, 4)))
        for name, scheme in FORMS.items()
    }
    assert kinds["steps"] == kinds["symmetric"] == compiled_columns.STEPS
    assert kinds["float zero"] == compiled_columns.FLOAT_ZERO
    assert kinds["nf4"] == compiled_columns.ELEMENT
    assert kinds["by inverse"] == compiled_columns.ELEMENT_BY_INVERSE


def test_the_form_may_change_from_block_to_block() -> None:
    """SliM-LLM gives each group, a block of its own, another width."""
    found = []
    for loop in (round_on_grids, feed_forward):
        weight, factor, rule = problem(70, 24, 8, "eight bits", "none", 5)
        fit = rule.begin
        assert fit is not None

        def begin(matrix: Columns, rule: GridColumns = rule, fit: Any = fit) -> None:
            fit(matrix)
            rule.form = dataclasses.replace(rule.form, bits=2 + matrix.start // 8)

        rule.begin = begin
        loop(weight, factor, rule, block_size=8)  # type: ignore[operator]
        found.append(rule.codes)
    assert torch.equal(*found)
    assert [int(part.max()) for part in found[0].split(8)] == [3, 7, 15]
