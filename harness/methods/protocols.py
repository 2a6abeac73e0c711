"""What a method is given and what it returns. Methods import this module and `harness.numerics`, nothing else of ours.

A method file (`harness/methods/<name>.py`, one paper each) defines one or more of the classes `Transform`, `Rounding`,
`Tuning`. Each has a nested frozen dataclass `Settings` whose fields and defaults equal `conf/<slot>/<name>.yaml`, takes it as
its only constructor argument, and states its facts as literals, which `harness.plugins` reads without importing the file:

    class Rounding:
        version = 1                     # raised when its numbers change; part of every key
        needs = ("hessian",)            # statistics it reads: names of STATISTICS; () is data-free
        stochastic = False              # True: draws from `rng`
        activation_aware = False        # True: its codes depend on the activation or KV scheme

Shapes in one notation: weight [out, in], hessian [in, in], inputs [tokens, in], scale [out, groups].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Generator as Generating
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from harness.cell import Scheme, WeightScheme
from harness.errors import MethodError, unknown_name
from harness.numerics.grids import CONVENTIONS
from harness.numerics.hessians import Factor, factored
from harness.numerics.learning import Document
from harness.numerics.number_formats import FORMATS, PLAIN_SCALES, SCALE_TYPES
from harness.numerics.weights import QuantizedWeight

__all__ = [
    "STATISTICS", "BlockView", "Document", "Evidence", "LinearShape", "Network", "Rounding", "ScalePair", "Scheme", "Shapes",
    "TrainedLinear", "Transform", "Tuning", "WeightScheme", "WholeModel", "check_grid", "check_tables", "check_turning",
    "check_uniform", "fold_scales", "in_attention", "put_parameters", "refusals", "repeat_scales", "require_finite",
    "sensitivity_of", "shared_factor", "turn_ends", "turned", "writes_residual",
]

STATISTICS: dict[str, str] = {
    "hessian": "mean over tokens of x xᵀ, [in, in] float32",
    "mean": "mean over tokens of x, [in] float32",
    "abs_mean": "mean over tokens of |x|, [in] float32",
    "abs_max": "maximum over tokens of |x|, [in] float32",
    "abs_max_per_sequence": "maximum over the tokens of each sequence of |x|, [sequences, in] float32",
    "inputs": "the inputs themselves, [sequences, length, in], in the model's dtype",
    "reference": "outputs of the full-precision block on full-precision inputs (block-wise training)",
    "squared_gradient": "sum over sequences of (d loss / d W)², [out, in] float32, of the full-precision model",
    "tokens": "the calibration windows themselves (training of the whole model)",
    "documents": "the calibration's texts, tokenized, each with what of it is a prompt (training after rounding)",
    "teacher": "the full-precision model, to learn from (training after rounding)",
}

T = TypeVar("T")


@runtime_checkable
class Evidence(Protocol):
    """What calibration says of one linear's input. Read-only; linears with one input share one object.

    A statistic that the method did not name in `needs` raises KeyError. Values are shared between cells: never write to them.
    """

    basis: str                                  # "quantized" or "full_precision": what ran before this block
    tokens: int                                 # calibration tokens seen

    def __getitem__(self, statistic: str) -> Tensor: ...

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """compute() the first time, its result ever after: factorisations shared by q, k, v and by cells of one stream.

        key must name everything that the result depends on besides the statistics themselves.
        """
        ...


@dataclass(frozen=True)
class LinearShape:
    """One quantizable matrix. name: within its block, e.g. "self_attn.q_proj"; group: matrices of one group share their input;
    expert: one of many that see only the tokens a router sends them."""

    name: str
    out_features: int
    in_features: int
    group: str
    bias: bool = False
    expert: bool = False
    fused: bool = False                         # shares its parameter, and so its input at run time, with other matrices


@dataclass(frozen=True)
class ScalePair:
    """A place where a diagonal scale on the input of `consumers` can be folded into what produces that input.

    producer   a norm ("input_layernorm") or a linear ("self_attn.v_proj", "mlp.up_proj") of the block
    consumers  linears that read the input; all of its readers
    region     the submodule whose output shows the effect ("self_attn", "mlp"); "" is the consumer itself
    repeats    how often each producer channel is repeated in the consumers' input (query heads per key-value head)
    offset     added to the norm's weight before use (Gemma: 1)
    """

    producer: str
    consumers: tuple[str, ...]
    kind: str                                   # "norm" or "linear"
    region: str = ""
    repeats: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Shapes:
    """What a plan knows of a model from its config.json alone."""

    family: str
    blocks: int
    linears: tuple[LinearShape, ...]            # of one block, in order of execution
    pairs: tuple[ScalePair, ...]
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int                             # of the whole model
    tied_head: bool = False
    rotations: bool = False                     # residual-stream rotations leave the function unchanged (RMSNorm only)
    ends: tuple[str, str, str] | None = None    # parameters of embeddings, final norm and head, where rotations are allowed
    query_key: tuple[str, str] | None = None    # linears that make queries and keys, with nothing but rotary positions (halves of
                                                # a head turned against each other) between them and their product
    experts: int = 0
    notes: tuple[str, ...] = ()


class BlockView(Protocol):
    """One decoder block in the hands of a transform or a block-wise rounding; its weights are float, on the device."""

    index: int                                  # position in the model, from 0
    module: nn.Module
    shapes: Shapes
    evidence: Mapping[str, Evidence]            # by linear name
    notes: dict[str, Any]                       # a block-wise rounding writes here what the record should hold: JSON values

    def linear(self, name: str) -> nn.Linear: ...

    def set_input(self, name: str, kind: str, value: Tensor) -> None:
        """From now on, and in the loaded model, the linear's input is transformed before it is rounded (`numerics.inputs`):
        kind "input_scale", value [in]; or "input_hadamard", value [.., 3] integers. Raises MethodError for a fused matrix."""
        ...

    def inputs(self) -> Sequence[Tensor]:
        """The block's own inputs, one tensor [1, length, hidden] per calibration sequence."""
        ...

    def references(self) -> Sequence[Tensor]:
        """Full-precision outputs on full-precision inputs, one tensor per sequence; needs "reference"."""
        ...

    def run(
        self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None,
        receive: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The block's output [1, length, hidden] for one sequence, with `weights` in place of named parameters
        ("self_attn.q_proj.weight"); differentiable in them.

        receive(linear, its input [..., in]) returns what the linear shall see instead: rounded activations, or what it was
        given by a method that only watches. Linears that are parts of one parameter are asked for once, by the first's name.
        """
        ...

    def run_region(self, region: str, index: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output of one submodule (a ScalePair's region) on the input it received for calibration sequence `index`."""
        ...


class WholeModel(Protocol):
    """The unrounded model in the hands of a transform that learns from its loss: one block at a time, in both directions."""

    shapes: Shapes
    sequences: int                              # calibration sequences

    def gradients(
        self, parameters: Sequence[Tensor], sequences: Sequence[int], enter: Callable[[Tensor], Tensor],
        run: Callable[[BlockView, Sequence[Tensor]], Sequence[Tensor]], leave: Callable[[Tensor], Tensor],
    ) -> float:
        """Add the gradients of the mean next-token cross-entropy over `sequences` to the .grad of parameters; return the loss.

        enter   the embeddings' output [1, length, hidden] -> the first block's input
        run     a block, and its inputs of all sequences -> its outputs
        leave   the last block's output -> what the final norm expects
        All three are called with gradients off and on, and are differentiable in the parameters and in their inputs. The cache
        is rounded as the scheme says. Parameters () is evaluation.
        """
        ...


class Transform(Protocol):
    """Rewrites a block into an equivalent one before rounding.

    One that learns from the whole model before the walk over its blocks names "tokens" in `needs` and defines two more methods:

        def learn(self, model: WholeModel, scheme: Scheme, rng: Generator) -> Generating[tuple[int, int], None, dict[str, Tensor]]
        def use(self, learned: Mapping[str, Tensor]) -> None

    learn yields (step, steps) and returns what it learned; `use` is given that, by this pass or by one that resumes it, before
    anything is rewritten.
    """

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Reasons why it cannot run; empty when it can."""
        ...

    def rewrite_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, Any]:
        """Change the block's parameters in place; return notes for the record (chosen exponents, losses, …)."""
        ...


class Rounding(Protocol):
    """Turns weight matrices into codes, one linear at a time.

    A method that must see a block at once (block-wise training) defines `round_block` instead of `round_layer`:

        def round_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, QuantizedWeight]

    sequential: True re-runs the block after each group of linears, so that a group sees the rounded groups before it
    ("true-sequential"); class attribute or property.
    """

    sequential: bool

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]: ...

    def round_layer(
        self, name: str, weight: Tensor, evidence: Evidence | None, scheme: WeightScheme, rng: Generator
    ) -> QuantizedWeight:
        """Quantize one matrix.

        name: within its block, "self_attn.q_proj".   weight: [out, in] float32, not written to.
        evidence: of the layer's input; None when `needs` is empty.   rng: seeded by cell, block and linear.
        Raises MethodError when the numbers break down; the pass adds block and layer to what it says.
        """
        ...


class Network(Protocol):
    """A whole causal language model in the hands of a tuning."""

    def logits(self, tokens: Tensor) -> Tensor:
        """[sequences, length] tokens -> [sequences, length, vocabulary] float32; of the model in training differentiable."""
        ...

    def sample(self, first: Tensor, length: int, rng: Generator) -> Tensor:
        """Text by the model itself: continue the tokens first [sequences] to [sequences, length], at temperature 1."""
        ...


class TrainedLinear(Protocol):
    """One quantized linear while it is trained: an nn.Module whose nn.Parameters, and nothing else, are trained."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], bias added; differentiable in its parameters and in x."""
        ...

    def stored(self) -> QuantizedWeight:
        """What the checkpoint shall hold of it now."""
        ...


class Tuning(Protocol):
    """Trains the whole model after rounding.

    The pass makes, or finds, the checkpoint of the same method without its tuning; each of its matrices becomes a `linear`, `tune`
    trains them all, and what they have `stored` is the cell's checkpoint. Needs "tokens" or "documents" and, to be taught,
    "teacher". Weights are trained, activations and cache are not rounded meanwhile.
    """

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]: ...

    def linear(self, name: str, weight: QuantizedWeight, bias: Tensor | None, original: Tensor | None) -> TrainedLinear:
        """The trainable form of one linear. original: the model's matrix before rounding, [out, in] float32; None where a
        transform rescaled its block. Raises MethodError for a layout that this tuning cannot train."""
        ...

    def tune(
        self, student: Network, teacher: Network | None, parameters: Sequence[nn.Parameter], windows: Any, rng: Generator
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """Train `parameters`, all of the linears', in place. Yields (step, steps) and returns notes for the record, JSON values.

        windows: [samples, length] calibration tokens; with "documents" in `needs` a sequence of Document instead.
        teacher: the full-precision model, None unless "teacher" is needed.
        Raises MethodError when a loss is not finite.
        """
        ...


def require_finite(weight: Tensor, name: str = "") -> None:
    """Raise MethodError when a matrix [out, in] holds NaN or infinity; name: of its linear, where the caller has several."""
    if not bool(torch.isfinite(weight).all()):
        raise MethodError(f"{name and f'{name}: '}the weight holds NaN or infinity; the model itself is damaged")


def shared_factor(weight: Tensor, evidence: Evidence | None, damping_fraction: float, act_order: bool = False) -> Factor:
    """What a column-by-column rounding of weight [out, in] starts from: its Hessian, damped, inverted and factored.

    Computed once for all matrices with one input and all cells of one stream. Raises MethodError when the weight or the Hessian
    is not finite, or the Hessian not positive definite.
    """
    assert evidence is not None, "a method that needs the Hessian is given evidence"
    require_finite(weight)
    return evidence.once(
        ("factor", damping_fraction, act_order), lambda: factored(evidence["hessian"], damping_fraction, act_order)
    )


def sensitivity_of(weight: Tensor, evidence: Evidence | None) -> Tensor:
    """Squared gradients of weight [out, in], for methods that weigh its errors with them. Raises MethodError when they, or the
    weight, are not finite."""
    assert evidence is not None, "a method that needs squared gradients is given evidence"
    require_finite(weight)
    sensitivity = evidence["squared_gradient"]
    if not bool(torch.isfinite(sensitivity).all()):
        raise MethodError("squared gradients hold NaN or infinity; load the model with model.dtype=float32")
    return sensitivity


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
        weight.copy_((weight.float() + pair.offset) / scales - pair.offset)    # type: ignore[operator]
        if bias is not None:
            bias.copy_(bias.float() / scales)
    else:
        linear = block.linear(pair.producer)
        rows = scales.numel()                                                  # of a fused q, k, v: the last ones, the values
        linear.weight[-rows:] = (linear.weight[-rows:].float() / scales[:, None]).to(linear.weight.dtype)
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


def turned(
    block: BlockView, residual: Tensor, heads: Callable[[Tensor, int], Tensor], outputs: Callable[[Tensor, int], Tensor],
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
    for pair in (pair for pair in shapes.pairs if pair.kind == "linear" and in_attention(pair.producer)):
        rows = shapes.kv_heads * shapes.head_dim                                # of a fused q, k, v: the last ones, the values
        for name in (f"{pair.producer}.weight", f"{pair.producer}.bias"):
            if (values := take(name)) is not None:
                by_head = values[-rows:].to(dtype).unflatten(0, (shapes.kv_heads, shapes.head_dim))
                put(name, torch.cat((values[:-rows].to(dtype), heads(by_head, 1).flatten(0, 1))), values)
        for consumer in pair.consumers:
            reader = take(f"{consumer}.weight")
            assert reader is not None
            columns = reader.to(dtype).unflatten(1, (shapes.heads, shapes.head_dim))
            put(f"{consumer}.weight", outputs(columns, 2).flatten(1), reader)
    return found


def turn_ends(ends: Mapping[str, Tensor], shapes: Shapes, residual: Tensor) -> dict[str, Tensor]:
    """Embeddings, final norm and head of a residual stream turned by residual [hidden, hidden], by name."""
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
        parameter = getattr(block.linear(owner), kind) if owner in linears else block.module.get_parameter(name)
        parameter.copy_(value)


def check_turning(shapes: Shapes) -> list[str]:
    """Reasons why the residual stream and the values of a model cannot be rotated."""
    if not shapes.rotations or shapes.ends is None:
        return [f'family "{shapes.family}" does not allow rotations of its residual stream']
    reasons = []
    if shapes.experts:
        reasons.append("rotations inside experts are not supported; use a dense model")
    if any(pair.offset for pair in shapes.pairs):
        reasons.append("norms with an offset cannot be folded into the linears behind them")
    return reasons


def check_uniform(
    scheme: Scheme, shapes: Shapes, *, bits: Collection[int] = range(2, 9), convention: str | None = None,
    never_symmetric: str | None = None,
) -> list[str]:
    """Reasons why some linear cannot be stored on uniform integer grids of these bit widths; overrides are looked at too.

    One reason per kind of problem, naming every layer it concerns. convention: also that this grid exists for the scheme.
    never_symmetric: the reason to refuse symmetric schemes for, where the method does.
    """
    reasons = _check_grids(scheme, shapes, bits, convention, formats=(), scales=PLAIN_SCALES)
    if never_symmetric is not None and any(weight.symmetric for weight, _ in _weight_schemes(scheme, shapes)):
        reasons.append(f"{never_symmetric}; use symmetric=false")
    return reasons


def check_tables(scheme: Scheme, shapes: Shapes, *, bits: Collection[int] = range(2, 9)) -> list[str]:
    """Reasons why some linear cannot have one table of 2^bits values per output row."""

    def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
        if weight.group_size != -1:
            yield f"there is one table per output row; use group_size=-1 instead of {weight.group_size}"
        if weight.bits in bits and 2 ** int(weight.bits) > linear.in_features:
            yield f"a table of {2 ** int(weight.bits)} values is longer than the row it stands for"

    return check_uniform(scheme, shapes, bits=bits) + refusals(scheme, shapes, reasons)


def check_grid(scheme: Scheme, shapes: Shapes, *, convention: str) -> list[str]:
    """The same for methods that take their grids from `grids.Fitting`: integers of 2 to 8 bits and all of `number_formats`."""
    return _check_grids(scheme, shapes, range(2, 9), convention, formats=FORMATS, scales=SCALE_TYPES)


def _check_grids(
    scheme: Scheme, shapes: Shapes, bits: Collection[int], convention: str | None, formats: Collection[str], scales: Collection[str]
) -> list[str]:
    widths = f"{min(bits)} to {max(bits)}" if len(bits) > 1 else str(min(bits))
    reasons: list[str] = []
    undivided: dict[int, dict[str, None]] = {}                    # group size -> layers, in order, each once
    for weight, linears in _weight_schemes(scheme, shapes):
        if weight.format in formats:
            reasons += _check_format(weight, scales)
        elif weight.format != "int" and formats:
            reasons.append(unknown_name("number format", weight.format, ("int", *formats)))
            continue
        elif weight.format != "int":
            reasons.append(f'format "{weight.format}" is not an integer grid; use scheme.weight.format=int or a method made for it')
            continue
        else:
            if weight.zero_point != "integer" and not formats:
                reasons.append("this method chooses zero points in its own way; leave scheme.weight.zero_point=integer")
            elif weight.zero_point != "integer" and weight.symmetric:
                reasons.append("symmetric grids have no zero point to be float; use symmetric=false or zero_point=integer")
            if weight.bits not in bits:
                reasons.append(f"{weight.bits:g} bits; this method rounds to whole widths of {widths}")
            if weight.scale_dtype not in scales:
                reasons.append(f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join(scales)}')
        if convention is not None and convention not in CONVENTIONS:
            reasons.append(f'no grid "{convention}"; known: {", ".join(CONVENTIONS)}')
        elif convention == "compressed" and weight.format == "int" and not weight.symmetric:
            reasons.append('grid "compressed" is symmetric only; use a symmetric scheme or another grid')
        size = weight.group_size
        if size != -1 and size < 2:
            reasons.append(f"group size {size}; use -1 for one scale per output channel, or 2 and more")
        elif size != -1:
            for linear in linears:
                if linear.in_features % size:
                    undivided.setdefault(size, {})[f"{linear.name} ({linear.in_features})"] = None
    reasons += [f"group size {size} does not divide in_features of {', '.join(layers)}" for size, layers in undivided.items()]
    return list(dict.fromkeys(reasons))


def _check_format(weight: WeightScheme, scales: Collection[str]) -> Iterator[str]:
    """Reasons why a scheme contradicts what its format fixes."""
    name, fixed = weight.format, FORMATS[weight.format]
    if weight.zero_point != "integer":
        yield f"{name} has no zero points; leave scheme.weight.zero_point=integer"
    if weight.bits != fixed.bits:
        yield f"{name} has {fixed.bits} bits, not {weight.bits:g}; set scheme.weight.bits={fixed.bits}"
    if fixed.block is not None and weight.group_size != fixed.block:
        yield f"{name} has blocks of {fixed.block}, not group_size {weight.group_size}; set scheme.weight.group_size={fixed.block}"
    if fixed.scale_dtype is not None and weight.scale_dtype != fixed.scale_dtype:
        yield f"{name} has {fixed.scale_dtype} scales; set scheme.weight.scale_dtype={fixed.scale_dtype}, not {weight.scale_dtype}"
    elif fixed.scale_dtype is None and weight.scale_dtype not in (*scales, *fixed.more_scales):
        yield f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join((*scales, *fixed.more_scales))}'


def _weight_schemes(scheme: Scheme, shapes: Shapes) -> Iterator[tuple[WeightScheme, list[LinearShape]]]:
    """Every distinct weight scheme of the model with the linears that have it in some block."""
    per_block = any(override.blocks is not None for override in scheme.overrides)
    found: dict[WeightScheme, dict[str, LinearShape]] = {}
    for block in range(shapes.blocks if per_block else 1):
        for linear in shapes.linears:
            found.setdefault(scheme.weight_for(block, linear.name), {})[linear.name] = linear
    for weight, linears in found.items():
        yield weight, list(linears.values())


def refusals(scheme: Scheme, shapes: Shapes, reasons: Callable[[LinearShape, WeightScheme], Iterable[str]]) -> list[str]:
    """Every reason that reasons(linear, its weight scheme) gives, once, with all the layers that it concerns.

    "group_size 48 does not divide the inputs: self_attn.q_proj [32 × 32], mlp.down_proj [32 × 64] (blocks 0, 3)"; blocks are
    named where overrides of the scheme make them differ.
    """
    found: dict[str, dict[LinearShape, list[int]]] = {}
    for block in range(shapes.blocks):
        for linear in shapes.linears:
            for reason in reasons(linear, scheme.weight_for(block, linear.name)):
                found.setdefault(reason, {}).setdefault(linear, []).append(block)
    listed = []
    for reason, layers in found.items():
        parts = []
        for linear, blocks in layers.items():
            some = "" if len(blocks) == shapes.blocks else f" (blocks {', '.join(map(str, blocks))})"
            parts.append(f"{linear.name} [{linear.out_features} × {linear.in_features}]{some}")
        listed.append(f"{reason}: {', '.join(parts)}")
    return listed
