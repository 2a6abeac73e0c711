"""A model whose matrices come from several checkpoints of it: run on calibration windows, and stored as a checkpoint of its own.

For a bit budget (docs/sweeps.md): candidates are checkpoints of one model that differ in the weight scheme, and an assembly takes
each matrix from one of them. Its measure is the divergence of its predictions from those of the full-precision model,

    KL = mean over tokens of sum_v p(v) (log p(v) - log q(v)),  p full precision, q the assembly, natural logarithm, in float64.

Where a rounding reads nothing of how other matrices were rounded (`is_exact`), the assembly's matrices are, byte for byte, those
that a pass with the same scheme makes, and `write` stores them without one. Elsewhere an assembly is a stand-in: its matrices were
rounded behind other neighbours than they have in it.

Memory: on the device the model in its dtype, as an evaluation has it, and up to 1 GB of the full-precision model's predictions; on
the CPU all candidates as packed, and one copy of every block's inputs for all windows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import Cell, to_json
from harness.core.errors import MethodError
from harness.quantization.formats.native import BlockContent, Checkpoint, CheckpointWriter
from harness.quantization.numerics.weights import QuantizedWeight
from harness.quantization.pipeline.blocks import Blocks
from harness.quantization.pipeline.fisher import SquaredGradients
from harness.quantization.pipeline.jobs import FULL
from harness.quantization.pipeline.report import methods_of

KEPT_NUMBERS = 2**28  # of the full-precision model's predictions that stay in memory
Matrix = tuple[int, str]  # block, linear
Parts = Mapping[Matrix, int]  # of each matrix the candidate


def is_exact(cell: Cell) -> bool:
    """Whether a pass would round each matrix of the cell as in any other cell that gives this matrix the same scheme.

    So it is where a rounding works linear by linear and reads no input that other rounded matrices have changed, and where the
    transform, if there is one, does the same for every scheme (`scheme_independent` in its class).
    """
    method = cell.method
    if method.rounding is None or method.tuning is not None:
        return False
    if method.reads_inputs and cell.inputs != FULL:
        return False
    if method.transform is not None and not is_scheme_independent(cell):
        return False
    rounding = plugins.build("rounding", method.rounding.name, to_json(method.rounding)["settings"])
    around = (rounding, getattr(rounding, "base", None))  # a rounding may be around another
    return not any(hasattr(r, "round_block") or getattr(r, "sequential", False) for r in around)


def is_scheme_independent(cell: Cell) -> bool:
    """Whether the transform of the cell, if any, rewrites the model alike for every weight scheme."""
    part = cell.method.transform
    return part is None or bool(
        plugins.facts("transform", part.name).get("scheme_independent", False)
    )


class Candidates:
    """The checkpoints that assemblies are made of, each block read once. Raises StoreError for a damaged one."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.checkpoints = [Checkpoint.open(folder) for folder in folders]
        self._read: dict[tuple[int, int], BlockContent] = {}

    @property
    def blocks(self) -> int:
        return int(self.checkpoints[0].manifest["blocks"])

    def block(self, candidate: int, index: int) -> BlockContent:
        """One block of one candidate, verified, on the CPU."""
        if (candidate, index) not in self._read:
            self._read[candidate, index] = self.checkpoints[candidate].block(index)
        return self._read[candidate, index]

    def weights(self, index: int, parts: Parts) -> dict[str, QuantizedWeight]:
        """The matrices of a block, each from its candidate."""
        names = self.block(0, index).weights
        return {name: self.block(parts[index, name], index).weights[name] for name in names}

    def dense(self, index: int, parts: Parts) -> dict[str, Tensor]:
        """The other tensors of a block that a transform changed. Raises MethodError where the candidates used differ in them."""
        used = sorted({parts[index, name] for name in self.block(0, index).weights})
        first = self.block(used[0], index).dense
        for other in used[1:]:
            if not _equal(first, self.block(other, index).dense):
                raise MethodError(
                    f"block {index}: the candidates differ in tensors besides the matrices, which belong to all matrices of the "
                    "block; use together: block"
                )
        return first

    def ends(self) -> dict[str, Tensor]:
        """Changed tensors outside the blocks. Raises MethodError where the candidates differ in them."""
        first = self.checkpoints[0].ends()
        if not all(_equal(first, other.ends()) for other in self.checkpoints[1:]):
            raise MethodError(
                "the candidates differ in embeddings, final norm or head, so that blocks of one do not fit the others"
            )
        return first


class Assembly:
    """Assemblies of one model on calibration windows, as a context that holds the modules outside the blocks.

    windows: [windows, length] tokens. The inputs of every block are kept for the assembly that `hold` names; `divergence` of
    another one runs the blocks from the first on that differs.
    """

    def __init__(
        self, folder: Path, dtype: str, candidates: Candidates, windows: Tensor, device: str
    ) -> None:
        self.candidates, self.windows = candidates, windows
        self.blocks = Blocks(folder, dtype, device)
        self._folder, self._dtype, self._device = folder, dtype, device
        self._fixed: dict[int, dict[str, Tensor]] = {}
        self._held: dict[Matrix, int] | None = None
        self._inputs: list[list[Tensor]] = []  # of each block, when the matrices are as held
        self._modules: dict[int, tuple[tuple[int, ...], nn.Module]] = {}
        self._log_ps: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Assembly:
        reference = Blocks(self._folder, self._dtype, self._device)
        self._full = [hidden.cpu() for hidden in reference.start(self.windows)]
        for index in range(len(reference)):
            block = reference.build(index, reference.tensors(index))
            self._full = _run(reference, block, index, self._full)
        self._reference = self._stack.enter_context(reference.head(self.windows, self._full))
        ends = self.candidates.ends()
        self._embedded = [hidden.cpu() for hidden in self.blocks.start(self.windows, ends)]
        self._head = (
            self._stack.enter_context(self.blocks.head(self.windows, self._full, ends))
            if ends
            else self._reference
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def hold(self, parts: Parts) -> None:
        """Assemblies that are measured next resemble this one: their first equal blocks are not run again."""
        if self._held != parts:
            self._held, self._inputs = dict(parts), []

    @torch.no_grad()
    def divergence(self, parts: Parts) -> float:
        """KL of the full-precision model's predictions to the assembly's, nats per token; infinite where logits are no numbers."""
        hidden, start = self._embedded, 0
        if self._held is not None:
            start = next(
                (
                    index
                    for index in range(len(self.blocks))
                    if any(
                        self._held[index, name] != parts[index, name]
                        for name in self.candidates.block(0, index).weights
                    )
                ),
                len(self.blocks),
            )
            hidden = self._inputs_of(start)
        for index in range(start, len(self.blocks)):
            hidden = _run(self.blocks, self._block(index, parts), index, hidden)
        return self._score(hidden)

    def _inputs_of(self, index: int) -> list[Tensor]:
        """Inputs of a block, or outputs of the last, in the assembly that is held."""
        assert self._held is not None
        if not self._inputs:
            self._inputs = [self._embedded]
        while len(self._inputs) <= index:
            last = len(self._inputs) - 1
            block = self._block(last, self._held)
            self._inputs.append(_run(self.blocks, block, last, self._inputs[-1]))
        return self._inputs[index]

    def _block(self, index: int, parts: Parts) -> nn.Module:
        """A block with the dequantized matrices of an assembly; the last of each index is kept."""
        used = tuple(parts[index, name] for name in self.candidates.block(0, index).weights)
        kept = self._modules.get(index)
        if kept is None or kept[0] != used:
            self._modules.pop(index, None)
            kept = self._modules[index] = used, self._build(index, parts)
        return kept[1]

    def _build(self, index: int, parts: Parts) -> nn.Module:
        locations = self.blocks.locations(index)
        if index not in self._fixed:
            whole = {location.parameter for location in locations if location.is_whole}
            tensors = self.blocks.tensors(index)
            self._fixed[index] = {n: t for n, t in tensors.items() if n not in whole}
        device = self.blocks.device
        dense = {
            name: tensor.to(
                device, self.blocks.dtype if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in self.candidates.dense(index, parts).items()
        }
        weights = self.candidates.weights(index, parts)
        tensors = {**self._fixed[index], **dense}
        return self.blocks.build(index, self.blocks.with_weights(locations, tensors, weights))

    def _log_p(self, sequence: int) -> Tensor:
        """Log-probabilities of the full-precision model, [length, vocabulary] float32; kept where those of all windows are few."""
        if sequence in self._log_ps:
            return self._log_ps[sequence]
        logits = self._reference.logits(sequence, self._full[sequence])[0]
        log_p = logits.float().log_softmax(-1)
        if log_p.numel() * len(self.windows) <= KEPT_NUMBERS:
            self._log_ps[sequence] = log_p
        return log_p

    def _score(self, hidden: Sequence[Tensor]) -> float:
        total, tokens = 0.0, 0
        for sequence, ours in enumerate(hidden):
            log_p = self._log_p(sequence)
            log_q = self._head.logits(sequence, ours)[0].float().log_softmax(-1)
            for p, q in zip(log_p.split(256), log_q.split(256), strict=True):  # bounds float64
                exact = p.double()
                total += float((exact.exp() * (exact - q.double())).sum())
            tokens += len(log_p)
        mean = total / tokens
        return max(mean, 0.0) if mean == mean else float("inf")


def fisher_table(
    folder: Path, dtype: str, candidates: Candidates, windows: Tensor, device: str, scratch: Path
) -> dict[Matrix, list[float]]:
    """For each matrix and candidate the sum of squared gradients times squared errors, sum g² ⊙ (W - Ŵ)².

    Gradients are those of the full-precision model's loss on the windows (`fisher`). scratch: a folder, the caller's to delete.
    """
    blocks = Blocks(folder, dtype, device)
    gradients = SquaredGradients(blocks, windows, scratch)
    found: dict[Matrix, list[float]] = {}
    for index in range(len(blocks)):
        squared, tensors = gradients.read(index), blocks.tensors(index)
        for location in blocks.locations(index):
            weight = location.view(tensors[location.parameter]).float()
            found[index, location.name] = [
                float((squared[location.name] * (weight - rounded).square()).sum())
                for rounded in _dequantized(candidates, index, location.name, weight)
            ]
    return found


def _dequantized(candidates: Candidates, index: int, name: str, like: Tensor) -> Iterator[Tensor]:
    for candidate in range(len(candidates.checkpoints)):
        yield candidates.block(candidate, index).weights[name].dequantize().to(like)


def write(
    candidates: Candidates, parts: Parts, cell: Cell, writer: CheckpointWriter
) -> dict[str, Any] | None:
    """Store an assembly as the checkpoint that a pass would make, and return its manifest; None where it would make another.

    cell: the assembly's; only for cells that are exact. None: the candidates' notes on a block, or tensors besides its matrices,
    differ. Finished blocks of the writer are kept. Its seconds are those of copying.
    """
    began = time.monotonic()
    manifests = [checkpoint.manifest for checkpoint in candidates.checkpoints]
    learned = any("learned.safetensors" in manifest["files"] for manifest in manifests)
    every = range(len(manifests))
    for index in range(candidates.blocks):
        contents = [candidates.block(candidate, index) for candidate in every]
        notes = [content.report.get("notes", {}) for content in contents]
        if learned or any(
            own != notes[0] or not _equal(content.dense, contents[0].dense)
            for own, content in zip(notes, contents, strict=True)
        ):
            return None
    ends = candidates.ends()
    for index in range(writer.finished_blocks(), candidates.blocks):
        weights = candidates.weights(index, parts)
        errors = {
            name: candidates.block(parts[index, name], index).report["linears"][name]
            for name in weights
        }
        notes_of_block = candidates.block(0, index).report["notes"]
        dense = candidates.dense(index, parts)
        writer.write_block(index, weights, dense, {"linears": errors, "notes": notes_of_block})
    if ends:
        writer.write_ends(ends)
    told = [writer.reported(manifests[candidate]) for candidate in sorted(set(parts.values()))]
    calibration = {
        name: value for report in told for name, value in report.items() if name == "calibration"
    }
    content = {**told[0], **calibration, "methods": methods_of(cell.method)}
    return writer.finish({**content, "seconds": time.monotonic() - began})


@torch.no_grad()
def _run(blocks: Blocks, block: nn.Module, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [blocks.run(block, index, sequence, each).cpu() for sequence, each in enumerate(hidden)]


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


__all__ = ["Assembly", "Candidates", "fisher_table", "is_exact", "is_scheme_independent", "write"]
