"""A model as a row of blocks, one of them on the device at a time.

The real transformers model makes the first block's input and every block's arguments (masks, rotary embeddings, whatever the
class passes): its blocks are replaced by recorders, and only the modules before them have weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness.core.errors import ConfigError, MethodError, unknown_name
from harness.core.shapes import Shapes
from harness.quantization.formats.weight_files import DTYPES, ModelWeights
from harness.quantization.methods.protocols import Evidence
from harness.quantization.models import family_of, read_config, shapes
from harness.quantization.models.protocols import WeightLocation, get_tensor, set_tensor
from harness.quantization.numerics.inputs import attach_all, hold
from harness.quantization.numerics.weights import QuantizedWeight

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block receives besides its hidden state


class _Stop(Exception):
    """Ends the model's forward once the last block was called."""


class Blocks:
    """The blocks of the model in `folder`. Peak memory on the device: the modules before the blocks, or one block."""

    def __init__(self, folder: Path, dtype: str, device: str | torch.device) -> None:
        if dtype not in DTYPES:
            raise ConfigError(unknown_name("dtype", dtype, DTYPES, "model"))
        data = read_config(folder)
        self.folder, self.dtype, self.device = folder, DTYPES[dtype], torch.device(device)
        self.family = family_of(data)
        self.shapes: Shapes = shapes(folder)
        self.config = self.family.config(data)
        self.model = self.family.skeleton(self.config, self.dtype)
        self.weights = ModelWeights(folder, self.model)
        # a tied head counts once
        self.parameters = {name: p.numel() for name, p in self.model.named_parameters()}
        self._meta = list(self.family.blocks(self.model))
        self._calls: list[list[Call]] = []  # [block][sequence]

    def __len__(self) -> int:
        return len(self._meta)

    # --- weights --------------------------------------------------------------------------------------------------------------

    def locations(self, index: int) -> tuple[WeightLocation, ...]:
        return self.family.locations(self.config, index)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Every parameter and stored buffer of a block, by its name within it, on the device in the model's dtype."""
        prefix = self.family.block_prefix(index)
        names = list(self._meta[index].state_dict())
        return {name: self.weights.read(prefix + name, self.dtype, self.device) for name in names}

    def build(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A block that uses these tensors, without copying them."""
        block = copy.deepcopy(self._meta[index])
        for name, buffer in list(block.named_buffers()):
            if not buffer.is_meta:
                set_tensor(block, name, buffer.to(self.device))
        for name, tensor in tensors.items():
            set_tensor(block, name, tensor)
        attach_all(block)
        return block

    def with_weights(
        self,
        locations: Sequence[WeightLocation],
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, QuantizedWeight],
    ) -> dict[str, Tensor]:
        """A block's tensors with dequantized weights, in the model's dtype, in the places of its matrices.

        `tensors` stays as it is; a parameter that holds several matrices is copied once.
        """
        placed = dict(tensors)
        copied: set[str] = set()
        for location in locations:
            value = weights[location.name].dequantize().to(self.device, self.dtype)
            if location.is_whole:
                placed[location.parameter] = value
                continue
            if location.parameter not in copied:
                placed[location.parameter] = placed[location.parameter].clone()
                copied.add(location.parameter)
            location.view(placed[location.parameter]).copy_(value)
        return placed

    def ends(self) -> dict[str, Tensor]:
        """Every parameter outside the blocks, a tied head as a tensor of its own; on the CPU in the model's dtype."""
        inside = f"{self.family.blocks_name}."
        names = [n for n in self.model.state_dict() if not n.startswith(inside)]
        return {name: self.weights.read(name, self.dtype, "cpu") for name in names}

    # --- running --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, windows: Tensor, ends: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The first block's input for each window [length], and on the way every block's arguments.

        ends: tensors to use in place of the model's own outside the blocks.
        """
        recorders = [
            _Recorder(block, index == len(self) - 1, self.family.returns_tuple)
            for index, block in enumerate(self._meta)
        ]
        hidden: list[Tensor] = []
        self._calls = [[] for _ in self._meta]
        with _Ends(self, self.family.before, recorders, ends or {}):
            for window in windows:
                try:
                    self.model(window[None].to(self.device), use_cache=False)
                except _Stop:
                    pass
                interned: dict[int, Any] = {}
                for index, recorder in enumerate(recorders):
                    before = self._calls[index][-1] if self._calls[index] else None
                    self._calls[index].append(_intern(recorder.call, before, interned))
                hidden.append(recorders[0].hidden)
        return hidden

    def head(
        self, windows: Tensor, hidden: Sequence[Tensor], ends: Mapping[str, Tensor] | None = None
    ) -> _Head:
        """A context in which logits(sequence, hidden) runs the modules after the blocks; ends as in `start`."""
        return _Head(self, windows, hidden, ends or {})

    def run(self, block: nn.Module, index: int, sequence: int, hidden: Tensor) -> Tensor:
        """Output [1, length, hidden] of block `index` for one sequence, on the device."""
        args, kwargs = self._calls[index][sequence]
        return self.family.output(block(hidden.to(self.device), *args, **kwargs))

    def call(self, index: int, sequence: int) -> Call:
        return self._calls[index][sequence]

    def uniform_call(self, index: int) -> Call:
        """The arguments of block `index` where they are the same for every sequence. Raises MethodError where they are not."""
        calls = self._calls[index]
        if any(not _same(calls[0], call) for call in calls[1:]):
            raise MethodError(
                f"block {index} takes arguments that differ between sequences, "
                "and this method runs a block without naming the sequence"
            )
        return calls[0]


class StreamedBlock:
    """A block in the hands of a transform or a block-wise rounding (`methods.protocols.BlockView`).

    original: the block's tensors as the model has them; region inputs are taken from it, whatever the method has rewritten since.
    without_evidence: matrices of which calibration saw too little: no pair with one of them is offered.
    """

    def __init__(
        self,
        blocks: Blocks,
        index: int,
        module: nn.Module,
        original: Mapping[str, Tensor],
        evidence: Mapping[str, Evidence],
        hidden: Sequence[Tensor] | None,
        references: Sequence[Tensor] | None,
        without_evidence: Collection[str] = (),
    ) -> None:
        self.index, self.module, self.evidence = index, module, evidence
        self._blocks, self._original, self._hidden, self._references = (
            blocks,
            original,
            hidden,
            references,
        )
        self._locations = {location.name: location for location in blocks.locations(index)}
        self.shapes, self.left_out = self._own(blocks.shapes, without_evidence)
        # Inputs of regions belong to the block and the stream, as evidence does, and are kept with it for the stream's other cells.
        first = next(iter(evidence.values()), None)
        self._regions: dict[tuple[str, int], Call] = (
            first.once("inputs of regions", dict) if first is not None else {}
        )
        self._pristine: nn.Module | None = None
        self.notes: dict[str, Any] = {}

    def _own(
        self, shapes: Shapes, without_evidence: Collection[str]
    ) -> tuple[Shapes, tuple[str, ...]]:
        """The part of the model's shapes that this block has, since blocks may differ; and the pairs without evidence."""
        linears = tuple(linear for linear in shapes.linears if linear.name in self._locations)
        here = [
            pair
            for pair in shapes.pairs
            if all(name in self._locations for name in pair.consumers)
            and (pair.kind == "norm" or pair.producer in self._locations)
        ]
        offered = tuple(pair for pair in here if not set(pair.consumers) & set(without_evidence))
        left_out = tuple(
            f"{pair.producer} → {', '.join(pair.consumers)}" for pair in here if pair not in offered
        )
        return dataclasses.replace(shapes, linears=linears, pairs=offered), left_out

    def linear(self, name: str) -> nn.Linear:
        """The linear itself, or a stand-in over the part of a fused parameter; write to its weight in place."""
        location = self._locations[name]
        if location.is_whole:
            module = self.module.get_submodule(location.parameter.rpartition(".")[0])
            if isinstance(module, nn.Linear):
                return module
        weight = location.view(get_tensor(self.module, location.parameter))
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if location.bias is not None:
            bias = get_tensor(self.module, location.bias)
            linear.bias = nn.Parameter(
                bias if location.rows is None else bias[location.rows[0] : location.rows[1]],
                requires_grad=False,
            )
        return linear

    def set_input(self, name: str, kind: str, value: Tensor) -> None:
        location = self._locations[name]
        if not location.is_whole:
            raise MethodError(
                f"block {self.index}, {name}: a fused matrix shares its input with other matrices, "
                "so the input cannot be transformed for this one only"
            )
        hold(self.module.get_submodule(location.parameter.rpartition(".")[0]), kind, value)

    def inputs(self) -> Sequence[Tensor]:
        if self._hidden is None:
            raise MethodError("a method that reads block inputs must name a statistic in `needs`")
        return self._hidden

    def references(self) -> Sequence[Tensor]:
        if self._references is None:
            raise MethodError(
                'a method that reads full-precision outputs must name "reference" in `needs`'
            )
        return self._references

    def run(
        self,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        receive: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        args, kwargs = self._blocks.uniform_call(self.index)
        with self._watched(receive):
            result = functional_call(
                self.module,
                self._parameters(weights),
                (hidden.to(self._blocks.device), *args),
                kwargs,
            )
        return self._blocks.family.output(result)

    def run_region(
        self, region: str, index: int, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        args, kwargs = self._region_call(region, index)
        own = {
            name.removeprefix(f"{region}."): value
            for name, value in self._parameters(weights).items()
        }
        moved = tuple(_to(item, self._blocks.device) for item in args)
        named = {name: _to(item, self._blocks.device) for name, item in kwargs.items()}
        result = functional_call(self.module.get_submodule(region), own, moved, named)
        return result[0] if isinstance(result, tuple) else result

    def _region_call(self, region: str, index: int) -> Call:
        if (region, index) not in self._regions:
            storage = self.inputs()[index].device
            taken: list[Call] = []

            def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                shared = {id(v) for v in _leaves(self._blocks.call(self.index, index))}
                keep = lambda v: v if id(v) in shared else _to(v, storage)  # noqa: E731
                taken.append(
                    (
                        tuple(keep(item) for item in args),
                        {name: keep(item) for name, item in kwargs.items()},
                    )
                )
                raise _Stop

            # the method may have given the module's linears inputs of their own
            if self._pristine is None:
                self._pristine = self._blocks.build(self.index, self._original)
            handle = self._pristine.get_submodule(region).register_forward_pre_hook(
                take, with_kwargs=True
            )
            call_args, call_kwargs = self._blocks.call(self.index, index)
            try:
                with torch.no_grad():
                    hidden = self.inputs()[index].to(self._blocks.device)
                    self._pristine(hidden, *call_args, **call_kwargs)
            except _Stop:
                pass
            finally:
                handle.remove()
            self._regions[region, index] = taken[0]
        return self._regions[region, index]

    @contextmanager
    def _watched(self, receive: Callable[[str, Tensor], Tensor] | None) -> Iterator[None]:
        """While open, every module that owns matrices sees receive(the first of them, its input) in place of its input."""
        owners: dict[str, list[WeightLocation]] = {}
        for location in self._locations.values() if receive is not None else ():
            owners.setdefault(location.parameter.rpartition(".")[0], []).append(location)
        undo: list[Callable[[], None]] = []
        for owner, members in owners.items():
            assert receive is not None
            undo.append(self._blocks.family.replace_inputs(self.module, owner, members, receive))
        try:
            yield
        finally:
            for each in undo:
                each()

    def _parameters(self, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """`weights` under the names of real parameters: parts of a fused parameter are put into a copy of it, differentiably."""
        whole: dict[str, Tensor] = {}
        for name, value in (weights or {}).items():
            location = self._locations.get(name.removesuffix(".weight"))
            if location is None or (location.parameter == name and location.is_whole):
                whole[name] = value
                continue
            if location.parameter not in whole:
                whole[location.parameter] = get_tensor(self.module, location.parameter).clone()
            location.view(whole[location.parameter]).copy_(value)
        return whole


class _Recorder(nn.Module):
    """Stands where a block stood: keeps what it was called with and passes the hidden state on."""

    def __init__(self, block: nn.Module, last: bool, returns_tuple: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list: not a submodule
        self._last, self._returns_tuple = last, returns_tuple
        self.hidden = torch.empty(0)
        self.call: Call = ((), {})
        self.replacement: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden_states, (args, kwargs)
        if self._last and self.replacement is None:
            raise _Stop
        passed = hidden_states if self.replacement is None else self.replacement
        return (passed,) if self._returns_tuple else passed

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)  # models ask a block for its attention type


class _Ends:
    """While open, the modules named have their weights on the device, and recorders stand for the blocks."""

    def __init__(
        self,
        blocks: Blocks,
        modules: Sequence[str],
        recorders: Sequence[nn.Module],
        values: Mapping[str, Tensor],
    ) -> None:
        self._blocks, self._modules, self._recorders, self._values = (
            blocks,
            modules,
            recorders,
            values,
        )
        self._kept: dict[str, nn.Parameter | Tensor] = {}

    def __enter__(self) -> None:
        blocks = self._blocks
        layers = blocks.family.blocks(blocks.model)
        for index, recorder in enumerate(self._recorders):
            layers[index] = recorder
        names = [
            n
            for n in blocks.model.state_dict()
            if any(n.startswith(f"{module}.") for module in self._modules)
        ]
        for name in names:
            given = self._values.get(name)
            self._put(
                name, blocks.weights.read(name, blocks.dtype, "cpu") if given is None else given
            )
        for name, buffer in list(blocks.model.named_buffers()):
            if not buffer.is_meta:
                set_tensor(blocks.model, name, buffer.to(blocks.device))

    def __exit__(self, *_: object) -> None:
        layers = self._blocks.family.blocks(self._blocks.model)
        for index, block in enumerate(self._blocks._meta):
            layers[index] = block
        for name in self._kept:
            set_tensor(self._blocks.model, name, get_tensor(self._blocks.model, name).to("meta"))

    def _put(self, name: str, value: Tensor) -> None:
        self._kept[name] = get_tensor(self._blocks.model, name)
        set_tensor(self._blocks.model, name, value.to(self._blocks.device))


class _Head:
    """logits(sequence, hidden): [1, length, vocabulary], differentiable in hidden."""

    def __init__(
        self, blocks: Blocks, windows: Tensor, hidden: Sequence[Tensor], ends: Mapping[str, Tensor]
    ) -> None:
        self._blocks, self._windows = blocks, windows
        self._recorders = [
            _Recorder(b, i == len(blocks) - 1, blocks.family.returns_tuple)
            for i, b in enumerate(blocks._meta)
        ]
        self._open = _Ends(
            blocks, (*blocks.family.before, *blocks.family.after), self._recorders, ends
        )

    def __enter__(self) -> _Head:
        self._open.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        self._open.__exit__(*reason)

    def logits(self, sequence: int, hidden: Tensor) -> Tensor:
        self._recorders[-1].replacement = hidden.to(self._blocks.device)
        result = self._blocks.model(
            self._windows[sequence][None].to(self._blocks.device), use_cache=False
        )
        return result.logits


def _intern(call: Call, before: Call | None, seen: dict[int, Any]) -> Call:
    """The call with every tensor that equals the previous sequence's replaced by it: masks of all sequences are one object."""

    def pick(value: Any, old: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in seen:
                same = (
                    isinstance(old, Tensor)
                    and old.shape == value.shape
                    and old.dtype == value.dtype
                    and torch.equal(old, value)
                )
                # the value is kept alive, so that its id stays its own
                seen[id(value)] = (old if same else value, value)
            return seen[id(value)][0]
        if isinstance(value, tuple | list):
            olds = (
                old
                if isinstance(old, tuple | list) and len(old) == len(value)
                else [None] * len(value)
            )
            return type(value)(pick(item, other) for item, other in zip(value, olds, strict=True))
        if isinstance(value, dict):
            return {
                name: pick(item, old.get(name) if isinstance(old, dict) else None)
                for name, item in value.items()
            }
        return value

    args, kwargs = call
    old_args, old_kwargs = before if before is not None else ((), {})
    return pick(args, old_args), pick(kwargs, old_kwargs)


def _same(one: Call, other: Call) -> bool:
    return all(
        a is b or not isinstance(a, Tensor)
        for a, b in zip(_leaves(one), _leaves(other), strict=True)
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [value]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value


__all__ = ["Blocks", "Call", "StreamedBlock"]
