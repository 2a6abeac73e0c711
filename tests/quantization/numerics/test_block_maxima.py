"""Maxima of blocks in 8 bits: the table of bitsandbytes, and codes that are always the nearest."""

from __future__ import annotations

import torch
from evidence import generator

from harness.quantization.numerics.block_maxima import BlockMaxima, dynamic_table


def test_the_dynamic_table_has_256_entries_from_minus_one_side_to_one() -> None:
    table = dynamic_table()
    assert table.shape == (256,) and bool((table.diff() > 0).all())
    assert float(table[-1]) == 1 and 0.0 in table and float(table[0]) > -1


def test_every_double_quantized_maximum_takes_the_nearest_code() -> None:
    """Also near the mean, where bitsandbytes' table of 65,536 entries is coarser than its codes."""
    values = 0.05 + torch.randn(256, generator=generator(3)) * 10.0 ** torch.linspace(-9, -2, 256)
    stored = BlockMaxima.double_quantized(values)
    assert stored.codes is not None and stored.scale is not None and stored.offset is not None
    centred = ((values - stored.offset) / stored.scale).double()
    distances = (centred[:, None] - dynamic_table().double()).abs()
    taken = distances.gather(1, stored.codes.long()[:, None])[:, 0]
    torch.testing.assert_close(taken, distances.amin(1), rtol=1e-4, atol=1e-9)
