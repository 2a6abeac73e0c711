"""Which weights are pruned: exact counts, ties by position, and the compiled loop to the bits of the torch loop."""

from __future__ import annotations

import pytest
import torch
from evidence import generator

from harness.core.cell import WeightScheme
from harness.core.number_formats import FORMATS
from harness.core.sparsity import read_sparsity
from harness.quantization.numerics import error_feedback
from harness.quantization.numerics.error_feedback import GridColumns, PrunedColumns, prune_columns
from harness.quantization.numerics.grids import Fitting
from harness.quantization.numerics.pruning import lowest, lowest_per_row, pruned_by_score

FORMS = {
    "as it is": None,
    "steps": WeightScheme("int", 3, 8, False, "float16"),
    "float zero": WeightScheme("int", 3, 8, False, "float16", zero_point="float"),
    "nf4": WeightScheme("nf4", FORMATS["nf4"].bits, 8, False, "float32"),
    "by inverse": WeightScheme("nf4", 4, 8, False, "double_quantized"),
}


def test_the_first_of_equal_scores_are_pruned() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    assert lowest(scores, 3).tolist() == [[True, True, False], [True, False, False]]
    assert lowest_per_row(scores, 1).tolist() == [[False, True, False], [True, False, False]]
    assert not bool(lowest(scores, 0).any()) and bool(lowest(scores, 6).all())


@pytest.mark.parametrize("text", ["0.5", "0.31", "0.7", "2:4", "4:8", "1:4"])
@pytest.mark.parametrize("per_row", [False, True])
def test_counts_are_exact(text: str, per_row: bool) -> None:
    scores = torch.randint(0, 4, (5, 40), generator=generator(1)).float()  # many ties
    sparsity = read_sparsity(text)
    pruned = pruned_by_score(scores, sparsity, per_row=per_row)
    if sparsity.of:
        groups = pruned.reshape(5, -1, sparsity.of).sum(-1)
        assert bool((groups == sparsity.of - sparsity.kept).all())
    elif per_row:
        assert bool((pruned.sum(1) == int(40 * sparsity.share)).all())
    else:
        assert int(pruned.sum()) == int(200 * sparsity.share)


def test_shares_are_exact_fractions() -> None:
    """0.7 of 10 weights are seven: 10 * 0.7 in floats, cut, could be six elsewhere; 0.29 of 100 is 28.999… in floats."""
    assert read_sparsity("0.7").pruned_of(10) == 7
    assert read_sparsity("0.29").pruned_of(100) == 29 and int(100 * 0.29) == 28


@pytest.mark.parametrize(
    "text", ["1", "0", "0.0", "1.5", "half", "4:4", "0:4", "5:4", "2:4:8", "-0.5"]
)
def test_other_texts_are_no_sparsity(text: str) -> None:
    with pytest.raises(ValueError, match=r"share|pattern"):
        read_sparsity(text)


def run(
    form: str, pattern: tuple[int, int] | None, rows: int, block_size: int
) -> list[torch.Tensor]:
    """Everything that the loop writes."""
    rng, columns = generator(3), 48
    weight = torch.randn(rows, columns, generator=rng)
    weight[0] = 0
    factor = torch.randn(columns, columns, generator=rng).triu() / columns**0.5
    factor.diagonal().copy_(0.5 + torch.rand(columns, generator=rng))
    pruned = torch.rand(columns, rows, generator=rng) < 0.5
    scheme, grids = FORMS[form], None
    if scheme is not None:
        fitted = Fitting(scheme).fit(weight.reshape(rows, -1, 8))
        codes = torch.zeros(columns, rows, dtype=torch.uint8)
        scale, zero = (t[..., 0].T.contiguous() for t in (fitted.scale, fitted.zero))
        grids = GridColumns(fitted, scale, zero, [i // 8 for i in range(columns)], codes)
    values = torch.zeros(columns, rows)
    prune_columns(
        weight, factor, PrunedColumns(pruned, pattern, values, grids), block_size=block_size
    )
    return [pruned, values, *(() if grids is None else (grids.codes,))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8), (1, 4)])
def test_the_compiled_loop_gives_the_bits_of_the_torch_loop(
    form: str, pattern: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    compiled = [run(form, pattern, rows, size) for rows, size in ((70, 16), (1, 48), (5, 32))]
    monkeypatch.setattr(error_feedback, "_compiled_columns", lambda *tensors: None)
    plain = [run(form, pattern, rows, size) for rows, size in ((70, 16), (1, 48), (5, 32))]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_pattern_does_not_depend_on_the_block_size() -> None:
    small, large = run("as it is", (2, 4), 12, 4), run("as it is", (2, 4), 12, 48)
    assert torch.equal(small[0], large[0])
    torch.testing.assert_close(small[1], large[1], rtol=1e-4, atol=1e-5)
