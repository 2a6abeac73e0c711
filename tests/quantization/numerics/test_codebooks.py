"""Tables per row: sorted rows, clustering and splitting against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.quantization.numerics.block_maxima import nearest
from harness.quantization.numerics.codebooks import (
    LookupWeight,
    SortedRows,
    cluster_rows,
    split_clusters,
)
from harness.quantization.numerics.sparse import Outliers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(values: list[float], weights: list[float]) -> SortedRows:
    return SortedRows.of(torch.tensor([values]), torch.tensor([weights]))


def whole(rows: SortedRows) -> tuple[Tensor, Tensor]:
    n = rows.values.shape[1]
    borders = torch.tensor([[0, n]]).expand(rows.values.shape[0], -1)
    return rows.mean(borders[:, :1], borders[:, 1:]), borders


def test_the_nearest_entry_and_ties() -> None:
    assert nearest(
        torch.tensor([-1.0, 0.4, 0.5, 0.6, 9.0]), torch.tensor([0.0, 1.0, 2.0])
    ).tolist() == [0, 0, 0, 1, 2]


def test_means_of_runs() -> None:
    rows = rows_of([3.0, 1.0, 2.0], [1.0, 0.0, 3.0])
    index = torch.tensor([[0, 1, 0]]), torch.tensor([[3, 3, 1]])
    torch.testing.assert_close(
        rows.mean(*index), torch.tensor([[2.25, 2.25, 1.0]], dtype=torch.float64)
    )


def test_codes_return_to_the_original_order() -> None:
    rows = rows_of([3.0, 1.0, 2.0, 0.0], [1.0] * 4)
    assert rows.codes(torch.tensor([[0, 1, 1, 3, 4]])).tolist() == [[3, 2, 2, 0]]


@pytest.mark.parametrize("weighted", [False, True])
def test_clusters_are_a_fixed_point_of_lloyd(weighted: bool) -> None:
    values = torch.randn(8, 200, generator=generator())
    weights = torch.rand(8, 200, generator=generator(1)) if weighted else torch.ones(8, 200)
    rows = SortedRows.of(values, weights)
    table, borders = cluster_rows(rows, 8, generator(2), iterations=500)
    codes = rows.codes(borders).long()
    closest = (values.double().unsqueeze(2) - table.unsqueeze(1)).abs().argmin(2)
    assert torch.equal(codes, closest)
    for code in range(8):
        member = (codes == code) * weights.double()
        torch.testing.assert_close((member * values).sum(1) / member.sum(1), table[:, code])


def test_spread_starts_beat_clusters_of_equal_width() -> None:
    values = torch.randn(16, 300, generator=generator())
    values[:, 0] = 30  # a far outlier deserves its own centre
    rows = SortedRows.of(values, torch.ones_like(values))
    table, borders = cluster_rows(rows, 8, generator())
    back = table.gather(1, rows.codes(borders).long())
    assert float((back[:, 0] - 30).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("values", "weights", "table", "border"),
    [
        ([5.0], [1.0], [5.0, 5.0], 1),  # one value: twice
        ([1.0, 4.0], [1.0, 1.0], [1.0, 4.0], 1),  # two: each its own
        (
            [1.0, 2.0, 9.0],
            [0.0, 1.0, 0.0],
            [2.0, 2.0],
            3,
        ),  # one positive weight: all left, at its value
        ([0.0, 1.0, 10.0, 11.0], [1.0] * 4, [0.5, 10.5], 2),
        ([0.0, 1.0, 10.0, 11.0], [3.0, 1.0, 1.0, 3.0], [0.25, 10.75], 2),
    ],
)
def test_splitting_one_cluster(
    values: list[float], weights: list[float], table: list[float], border: int
) -> None:
    rows = rows_of(values, weights)
    new_table, new_borders = split_clusters(rows, *whole(rows))
    torch.testing.assert_close(new_table, torch.tensor([table], dtype=torch.float64))
    assert new_borders.tolist() == [[0, border, len(values)]]


def test_splitting_an_empty_cluster_and_one_without_weight() -> None:
    rows = rows_of([0.0, 1.0, 2.0, 10.0, 11.0, 12.0], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    table, borders = (
        torch.tensor([[1.0, 5.0, 11.0]], dtype=torch.float64),
        torch.tensor([[0, 3, 3, 6]]),
    )
    new_table, new_borders = split_clusters(rows, table, borders)
    assert new_table[0, 2:4].tolist() == [5.0, 5.0] and new_borders[0, 2:5].tolist() == [3, 3, 3]
    divided = {4: [10.0, 11.5], 5: [10.5, 12.0]}  # both are 2-means of 10, 11, 12
    assert new_table[0, 4:].tolist() == divided[int(new_borders[0, 5])]


def test_splits_are_two_means() -> None:
    rows = SortedRows.of(
        torch.randn(32, 64, generator=generator()),
        torch.rand(32, 64, generator=generator(1)) + 0.01,
    )
    table, borders = split_clusters(rows, *whole(rows))
    for row in range(32):
        border, centre = int(borders[row, 1]), float(table[row].mean())
        assert (
            float(rows.values[row, border - 1]) <= centre + 0.1
            and float(rows.values[row, border]) >= centre - 0.1
        )


def test_packing_with_outliers_is_exact() -> None:
    codes = torch.randint(0, 8, (6, 20), generator=generator()).to(torch.uint8)
    mask = torch.rand(6, 20, generator=generator(1)) < 0.1
    outliers = Outliers.where(mask, torch.randn(6, 20, generator=generator(2)), "float16")
    weight = LookupWeight(
        codes, torch.randn(6, 8, generator=generator(3)).half().float(), 3, "float16", outliers
    )
    again = LookupWeight.unpack(*weight.pack())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(weight.dequantize()[mask], outliers.values)


def test_outliers_of_empty_rows() -> None:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[2, 3] = mask[2, 1] = True
    outliers = Outliers.where(mask, torch.arange(20.0).reshape(4, 5), "float32")
    assert outliers.put_into(torch.zeros(4, 5))[2].tolist() == [0, 11, 0, 13, 0]
    empty = Outliers.where(torch.zeros_like(mask), torch.zeros(4, 5), "float16")
    assert torch.equal(Outliers.unpack(*empty.pack()).put_into(torch.ones(4, 5)), torch.ones(4, 5))
