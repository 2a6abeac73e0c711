"""Squared gradients of the loss with respect to each block's matrices, by a streamed backward pass.

The whole model is never on the device with its gradients: the forward spools every block's inputs to disk, the loss gives the
gradient at the last block's output, and the backward walks from the last block to the first. Disk: one copy of all block inputs
(blocks × tokens × hidden) and one float32 copy of the quantizable matrices.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.quantization.models.protocols import get_tensor
from harness.quantization.pipeline.blocks import Blocks


class SquaredGradients:
    """read(block) gives {linear: sum over sequences of (d loss / d W)², [out, in] float32} of the full-precision model.

    The loss of a sequence is its mean cross-entropy of the next token. `folder` is scratch space, the caller's to delete.
    """

    def __init__(self, blocks: Blocks, windows: Tensor, folder: Path) -> None:
        self._folder, self._device = folder, blocks.device
        folder.mkdir(parents=True, exist_ok=True)
        hidden = self._forward(blocks, windows)
        self._backward(blocks, self._loss_gradients(blocks, windows, hidden))

    def read(self, index: int) -> dict[str, Tensor]:
        return {
            name: tensor.to(self._device)
            for name, tensor in load_file(self._gradients(index)).items()
        }

    @torch.no_grad()
    def _forward(self, blocks: Blocks, windows: Tensor) -> list[Tensor]:
        hidden = [h.cpu() for h in blocks.start(windows)]
        for index in range(len(blocks)):
            save_file({str(s): h.contiguous() for s, h in enumerate(hidden)}, self._inputs(index))
            block = blocks.build(index, blocks.tensors(index))
            hidden = [
                blocks.run(block, index, sequence, h).cpu() for sequence, h in enumerate(hidden)
            ]
        return hidden

    def _loss_gradients(
        self, blocks: Blocks, windows: Tensor, hidden: list[Tensor]
    ) -> list[Tensor]:
        gradients = []
        with blocks.head(windows, hidden) as head:
            for sequence, output in enumerate(hidden):
                leaf = output.to(blocks.device).requires_grad_()
                logits = head.logits(sequence, leaf)[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(
                    logits, windows[sequence, 1:].to(blocks.device)
                )
                gradients.append(torch.autograd.grad(loss, leaf)[0].cpu())
        return gradients

    def _backward(self, blocks: Blocks, gradients: list[Tensor]) -> None:
        for index in reversed(range(len(blocks))):
            inputs = load_file(self._inputs(index))
            block = blocks.build(index, blocks.tensors(index))
            locations = blocks.locations(index)
            names = list(dict.fromkeys(location.parameter for location in locations))
            trained = [block.get_parameter(name).requires_grad_() for name in names]
            sums: dict[str, Tensor] = {}
            for sequence in range(len(gradients)):
                leaf = inputs[str(sequence)].to(blocks.device).requires_grad_()
                output = blocks.run(block, index, sequence, leaf)
                found = torch.autograd.grad(
                    output,
                    [leaf, *trained],
                    gradients[sequence].to(blocks.device),
                    allow_unused=True,
                )
                gradients[sequence] = found[0].cpu()
                by_name = dict(zip(names, found[1:], strict=True))
                for location in locations:
                    gradient = by_name[location.parameter]
                    if gradient is None:  # an expert that this sequence never chose
                        continue
                    square = location.view(gradient).float().square()
                    sums[location.name] = (
                        sums[location.name] + square if location.name in sums else square
                    )
            for location in locations:
                shape = location.view(get_tensor(block, location.parameter)).shape
                sums.setdefault(location.name, torch.zeros(shape))
            save_file(
                {name: total.cpu().contiguous() for name, total in sums.items()},
                self._gradients(index),
            )
            self._inputs(index).unlink()

    def _gradients(self, index: int) -> Path:
        return self._folder / f"gradients-{index}.safetensors"

    def _inputs(self, index: int) -> Path:
        return self._folder / f"inputs-{index}.safetensors"
