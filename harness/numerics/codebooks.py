"""Fixed tables of values, and the nearest entry of a table."""

from __future__ import annotations

import torch
from torch import Tensor

# 16 quantiles of the normal distribution with an exact zero, divided by the largest: QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)


def normal_quantiles() -> Tensor:
    """The NF4 table from its definition, [16] float32: quantiles of evenly spaced probabilities, 8 above zero and 7 below.

    Equal to the constants of `NF4` up to the float noise of the quantile function.
    """
    outermost = 0.9677083
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (values / values.max()).float()


def dynamic_table() -> Tensor:
    """The signed 8-bit table of bitsandbytes, [256] float32 ascending, for numbers of very unequal size.

    For i = 0 … 6, the midpoints of 2^i equal intervals of [0.1, 1] times 10^(i - 6), with both signs; and 0 and 1.
    """
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    values = torch.cat(positive)
    return torch.cat((-values, torch.tensor([0.0, 1.0]), values)).sort().values


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of an ascending table [k] for each value, int64; a value exactly between two takes the lower."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2)
