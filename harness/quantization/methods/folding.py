"""Scales and rotations folded into the linears and norms of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from harness.core.shapes import ScalePair, Shapes
from harness.quantization.methods.protocols import BlockView


def repeat_scales(scales: Tensor, pair: ScalePair, shapes: Shapes) -> Tensor:
    """Scales of the producer's channels as scales of the consumers' input channels."""
    if pair.repeats == 1:
        return scales
    return scales.reshape(-1, 1, shapes.head_dim).expand(-1, pair.repeats, -1).reshape(-1)


def fold_scales(block: BlockView, pair: ScalePair, scales: Tensor) -> None:
    """Divide the producer's outputs by scales [its channels] and multiply the consumers' columns, in place."""
    if pair.kind == "norm":
        norm = block.module.get_submodule(pair.producer)
        weight, bias = norm.weight, getattr(norm, "bias", None)
        weight.copy_((weight.float() + pair.offset) / scales - pair.offset)  # type: ignore[operator]
        if bias is not None:
            bias.copy_(bias.float() / scales)
    else:
        linear = block.linear(pair.producer)
        rows = scales.numel()  # in a fused q, k, v the last rows are the values
        linear.weight[-rows:] = (linear.weight[-rows:].float() / scales[:, None]).to(
            linear.weight.dtype
        )
        if linear.bias is not None:
            linear.bias[-rows:] = (linear.bias[-rows:].float() / scales).to(linear.bias.dtype)
    columns = repeat_scales(scales, pair, block.shapes)
    for name in pair.consumers:
        weight = block.linear(name).weight
        weight.copy_(weight.float() * columns)


def in_attention(name: str) -> bool:
    """A linear of the attention, by its name within a block."""
    return "att" in name.rpartition(".")[0]


def writes_residual(shapes: Shapes) -> list[str]:
    """Linears that write to the residual stream: those behind no norm."""
    behind = {name for pair in shapes.pairs if pair.kind == "norm" for name in pair.consumers}
    return [linear.name for linear in shapes.linears if linear.name not in behind]


def rotate_block(
    block: BlockView,
    residual: Tensor,
    heads: Callable[[Tensor, int], Tensor],
    outputs: Callable[[Tensor, int], Tensor],
) -> dict[str, Tensor]:
    """Parameters of a block behind x -> x Q of the residual stream and a rotation of its values, by name; computed in Q's dtype.

    residual  Q [hidden, hidden], orthogonal
    heads     (values, axis) -> each head's values, which lie along the axis, rotated
    outputs   the same for the inputs of the output linear, [out, heads, head_dim] and axis 2
    Norms are folded into the linears behind them. Differentiable in Q and in what the functions close over.
    """
    shapes, dtype = block.shapes, residual.dtype
    found: dict[str, Tensor] = {}

    def take(name: str) -> Tensor | None:
        owner, _, kind = name.rpartition(".")
        held = getattr(block.linear(owner), kind)
        return None if held is None else found.get(name, held)

    def put(name: str, value: Tensor, like: Tensor) -> None:
        found[name] = value.to(like.dtype)

    for pair in (pair for pair in shapes.pairs if pair.kind == "norm"):
        gain = block.module.get_submodule(pair.producer).weight
        assert isinstance(gain, Tensor)
        for name in pair.consumers:
            weight = block.linear(name).weight
            put(f"{name}.weight", (weight.to(dtype) * gain.to(dtype)) @ residual, weight)
        found[f"{pair.producer}.weight"] = torch.ones_like(gain)
    for name in writes_residual(shapes):
        linear = block.linear(name)
        put(f"{name}.weight", residual.T @ linear.weight.to(dtype), linear.weight)
        if linear.bias is not None:
            put(f"{name}.bias", residual.T @ linear.bias.to(dtype), linear.bias)
    for pair in (
        pair for pair in shapes.pairs if pair.kind == "linear" and in_attention(pair.producer)
    ):
        rows = shapes.kv_heads * shapes.head_dim  # in a fused q, k, v the last rows are the values
        for name in (f"{pair.producer}.weight", f"{pair.producer}.bias"):
            if (values := take(name)) is not None:
                by_head = values[-rows:].to(dtype).unflatten(0, (shapes.kv_heads, shapes.head_dim))
                put(
                    name,
                    torch.cat((values[:-rows].to(dtype), heads(by_head, 1).flatten(0, 1))),
                    values,
                )
        for consumer in pair.consumers:
            reader = take(f"{consumer}.weight")
            assert reader is not None
            columns = reader.to(dtype).unflatten(1, (shapes.heads, shapes.head_dim))
            put(f"{consumer}.weight", outputs(columns, 2).flatten(1), reader)
    return found


def rotate_ends(ends: Mapping[str, Tensor], shapes: Shapes, residual: Tensor) -> dict[str, Tensor]:
    """Embeddings, final norm and head of a residual stream rotated by residual [hidden, hidden], by name."""
    assert shapes.ends is not None
    embeddings, norm, head = shapes.ends
    residual = residual.to(ends[embeddings].device)
    folded = ends[head].to(residual.dtype) * ends[norm].to(residual.dtype)
    return {
        embeddings: (ends[embeddings].to(residual.dtype) @ residual).to(ends[embeddings].dtype),
        norm: torch.ones_like(ends[norm]),
        head: (folded @ residual).to(ends[head].dtype),
    }


def put_parameters(block: BlockView, values: Mapping[str, Tensor]) -> None:
    """Write weights, biases and norms of a block, by name, in place."""
    linears = {linear.name for linear in block.shapes.linears}
    for name, value in values.items():
        owner, _, kind = name.rpartition(".")
        parameter = (
            getattr(block.linear(owner), kind)
            if owner in linears
            else block.module.get_parameter(name)
        )
        parameter.copy_(value)
