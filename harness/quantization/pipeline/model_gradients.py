"""The loss of a whole model and its gradients, with one block at a time on the device: for transforms that learn before the pass.

A step runs the blocks forward without gradients and keeps their inputs on the CPU; the loss gives the gradient behind the last
block, and each block is run again, backwards from the last, to pass it on. Every block is read twice per step.

Peak memory: on the device one block with what a method makes of it, and the activations of the step's sequences in one block; on
the CPU the inputs of all blocks for these sequences, and the embeddings of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.core.cell import KVScheme
from harness.quantization.inference import kv_cache
from harness.quantization.methods.protocols import BlockView
from harness.quantization.pipeline.blocks import Blocks, StreamedBlock


class StreamedModel:
    """The unrounded model in the hands of a learning transform (`methods.protocols.WholeModel`). windows: [sequences, length]."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str | torch.device,
        windows: Tensor,
        kv: KVScheme | None = None,
    ) -> None:
        self._blocks, self._windows = Blocks(folder, dtype, device), windows
        if kv is not None:
            kv_cache.simulate(self._blocks.model, kv, differentiable=True)
        self._embedded = [hidden.cpu() for hidden in self._blocks.start(windows)]
        self.shapes, self.sequences = self._blocks.shapes, len(windows)

    def gradients(
        self,
        parameters: Sequence[Tensor],
        sequences: Sequence[int],
        enter: Callable[[Tensor], Tensor],
        run: Callable[[BlockView, Sequence[Tensor]], Sequence[Tensor]],
        leave: Callable[[Tensor], Tensor],
    ) -> float:
        blocks, device = self._blocks, self._blocks.device
        inputs: list[list[Tensor]] = []
        with torch.no_grad():
            hidden = [enter(self._embedded[s].to(device)).cpu() for s in sequences]
            for index in range(len(blocks)):
                inputs.append(hidden)
                hidden = [
                    output.cpu()
                    for output in run(self._view(index), [h.to(device) for h in hidden])
                ]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        with torch.set_grad_enabled(bool(parameters)), blocks.head(self._windows, hidden) as head:
            for sequence, output in zip(sequences, hidden, strict=True):
                leaf = output.to(device).requires_grad_(bool(parameters))
                logits = head.logits(sequence, leave(leaf))[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(
                    logits, self._windows[sequence, 1:].to(device)
                )
                losses.append(loss.detach())
                if parameters:
                    (loss / len(sequences)).backward(inputs=[leaf, *parameters])
                    gradients.append(_gradient(leaf))
        if parameters:
            self._backward(parameters, sequences, inputs, gradients, enter, run)
        return float(torch.stack(losses).mean())

    @torch.enable_grad()
    def _backward(
        self,
        parameters: Sequence[Tensor],
        sequences: Sequence[int],
        inputs: list[list[Tensor]],
        gradients: list[Tensor],
        enter: Callable[[Tensor], Tensor],
        run: Callable[[BlockView, Sequence[Tensor]], Sequence[Tensor]],
    ) -> None:
        for index in reversed(range(len(self._blocks))):
            leaves = [hidden.to(self._blocks.device).requires_grad_() for hidden in inputs.pop()]
            outputs = run(self._view(index), leaves)
            torch.autograd.backward(list(outputs), gradients, inputs=[*leaves, *parameters])
            gradients = [_gradient(leaf) for leaf in leaves]
        entered = [
            enter(self._embedded[sequence].to(self._blocks.device)) for sequence in sequences
        ]
        torch.autograd.backward(entered, gradients, inputs=list(parameters))

    def _view(self, index: int) -> StreamedBlock:
        tensors = self._blocks.tensors(index)
        return StreamedBlock(
            self._blocks, index, self._blocks.build(index, tensors), tensors, {}, None, None
        )


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, (
        "a method's block, enter and leave are differentiable in their inputs"
    )
    return leaf.grad


__all__ = ["StreamedModel"]
