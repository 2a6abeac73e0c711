"""The contract of a method: what it receives and what it returns.

A method file (`harness/quantization/methods/<name>.py`, one paper each) defines one or more of the classes `Reduction`,
`Transform`, `Rounding`, `Tuning`. Each has a nested frozen dataclass `Settings` whose fields and defaults equal those of
`conf/<part>/<name>.yaml` (conf/reduction, conf/transform, conf/rounding, conf/tuning), takes it as its only constructor argument,
and states its facts as literals, which `harness.core.plugins` reads without importing the file:

    class Rounding:
        version = 1                     # raised when its numbers change; part of every key
        needs = ("hessian",)            # statistics it reads: names of STATISTICS; () is data-free
        stochastic = False              # True: draws from `rng`
        activation_aware = False        # True: its codes depend on the activation or KV scheme

    optional:
        scheme_independent = True       # of a transform: it reads nothing of the weight scheme, so that bit budgets can mix schemes
        prunes = True                   # of a rounding: it prunes, so that schemes state a sparsity
        settings_added_later = {"scale_search": "none"}   # settings that keys leave out while they have this default
        holds_all_widths = "parent_bits"   # the setting that is not 0 where a checkpoint holds several widths
        no_adapter = "…"                # of a rounding of differences: why none of its matrices is an adapter
        unneeded = {"hessian": {"objective": "weight"}}   # a statistic that is not needed with these settings
        wraps = True                    # a rounding around another, which its settings `base` and `base_settings` name
                                        # (`build_rounding`): needs and facts are the union of both (`core.cell.make_part`).
                                        # The instance keeps the other one in its attribute `base`.
        keeps_base = True               # and the base rounds what it would round alone, to the same codes

A method may import `harness.core`, `harness.quantization.numerics`, this module, and the tools that methods share: `checks` (which
schemes a method accepts), `evidence` (factors and sensitivities), `folding` (scales and rotations), `correction` (low-rank parts
beside another rounding), `blockwise` (training of a block). It imports no other method.

Shapes in one notation: weight [out, in], hessian [in, in], inputs [tokens, in], scale [out, groups].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Generator as Generating
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Generator, Tensor, nn

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.numerics.weights import QuantizedWeight

STATISTICS: dict[str, str] = {
    "hessian": "mean over tokens of x xᵀ, [in, in] float32",
    "cross": "mean over tokens of x x̃ᵀ, [in, in] float32: x in the full-precision model, x̃ this input (experts: as the Hessian)",
    "mean": "mean over tokens of x, [in] float32",
    "square_mean": "mean over tokens of x², [in] float32; the diagonal of the Hessian without the Hessian",
    "abs_mean": "mean over tokens of |x|, [in] float32",
    "abs_max": "maximum over tokens of |x|, [in] float32",
    "abs_max_per_sequence": "maximum over the tokens of each sequence of |x|, [sequences, in] float32",
    "inputs": "the inputs themselves, [sequences, length, in], in the model's dtype",
    "reference": "outputs of the full-precision block on full-precision inputs (block-wise training)",
    "squared_gradient": "sum over sequences of (d loss / d W)², [out, in] float32, of the full-precision model",
    "base_weight": "the matrix of the model that this one was fine-tuned from (model.base), [out, in] float32; no calibration data",
    "tokens": "the calibration windows themselves (training of the whole model)",
    "documents": "the calibration's texts, tokenized, each with what of it is a prompt (training after rounding)",
    "teacher": "the full-precision model, to learn from (training after rounding)",
    "block_states": "inputs and outputs of whole blocks (reductions)",
    "expert_output": "of each expert: tokens, their gates and the norms of its outputs (reductions)",
}

T = TypeVar("T")


def other_basis(needs: Iterable[str]) -> str | None:
    """Why statistics of the unrounded model do not go with a transform that rotates the residual stream (`rewrite_ends`)."""
    named = sorted({"cross", "reference"}.intersection(needs))
    if not named:
        return None
    return (
        f"{' and '.join(named)} statistics need the original basis, and the transform rotates the residual stream; "
        "use a transform without rotations of the residual stream"
    )


@runtime_checkable
class Evidence(Protocol):
    """Calibration statistics of one linear's input. Read-only; linears with one input share one object.

    A statistic that the method did not name in `needs` raises KeyError. Values are shared between cells: never write to them.
    """

    basis: str  # "quantized" or "full_precision": what ran before this block
    tokens: int  # calibration tokens seen

    def __getitem__(self, statistic: str) -> Tensor: ...

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """compute() the first time, its result ever after: factorisations shared by q, k, v and by cells of one stream.

        key must name everything that the result depends on besides the statistics themselves.
        """
        ...


class BlockView(Protocol):
    """One decoder block as a transform or a block-wise rounding gets it; its weights are float, on the device."""

    index: int  # position in the model, from 0
    module: nn.Module
    shapes: Shapes
    evidence: Mapping[str, Evidence]  # by linear name
    # a block-wise rounding writes here what the record should hold: JSON values
    notes: dict[str, Any]

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
        self,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        receive: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The block's output [1, length, hidden] for one sequence, with `weights` in place of named parameters
        ("self_attn.q_proj.weight"); differentiable in them.

        receive(linear, its input [..., in]) returns the input that the linear uses instead: rounded activations, or the same
        tensor if the method only observes. Linears that are parts of one parameter get one call, with the name of the first.
        """
        ...

    def run_region(
        self, region: str, index: int, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Output of one submodule (a ScalePair's region) on the input it received for calibration sequence `index`."""
        ...


class WholeModel(Protocol):
    """The unrounded model as a transform that learns from its loss gets it: one block at a time, forward and backward."""

    shapes: Shapes
    sequences: int  # calibration sequences

    def gradients(
        self,
        parameters: Sequence[Tensor],
        sequences: Sequence[int],
        enter: Callable[[Tensor], Tensor],
        run: Callable[[BlockView, Sequence[Tensor]], Sequence[Tensor]],
        leave: Callable[[Tensor], Tensor],
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

    A transform that learns from the whole model, before its blocks are rewritten, names "tokens" in `needs` and defines two
    more methods:

        def learn(self, model: WholeModel, scheme: Scheme, rng: Generator) -> Generating[tuple[int, int], None, dict[str, Tensor]]
        def use(self, learned: Mapping[str, Tensor]) -> None

    learn yields (step, steps) and returns what it learned. The pass, or one that resumes it, calls `use` with that before it
    rewrites a block.
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

    Any part of a method may define `warnings(self, cell: Cell, shapes: Shapes) -> list[str]`: what the plan notes of a cell that it
    accepts, such as a cost or too little calibration data.
    """

    sequential: bool

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]: ...

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize one matrix.

        name: within its block, "self_attn.q_proj".   weight: [out, in] float32, not written to.
        evidence: of the layer's input; None when `needs` is empty.   rng: seeded by cell, block and linear.
        Raises MethodError when the numbers break down; the pass adds block and layer to what it says.
        """
        ...


def build_rounding(name: str, settings: Mapping[str, Any]) -> Any:
    """The rounding of a name with these settings over its defaults, for a rounding around another.

    Raises ConfigError for an unknown name, and for an unknown or impossible setting.
    """
    return plugins.build("rounding", name, settings)


@dataclass(frozen=True)
class ExpertOutputs:
    """What was seen of the experts of one block, summed over calibration tokens; one entry per expert, [experts] float64.

    tokens      that were sent to it
    gate        Σ of its gates, as the model applies them
    norm        Σ of ||f(x)||₂, f(x) its output before the gate
    gated_norm  Σ of gate · ||f(x)||₂
    largest     the largest |entry| of its outputs
    """

    tokens: Tensor
    gate: Tensor
    norm: Tensor
    gated_norm: Tensor
    largest: Tensor


class SurveyedBlock(Protocol):
    """One block of the unrounded model as a reduction sees it."""

    index: int
    # by linear name: [out, in] float32, and the statistics of its inputs that the reduction needs
    matrices: Mapping[str, Tensor]
    evidence: Mapping[str, Evidence]
    # one [1, length, hidden] per sequence, where "block_states" is needed; else empty
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    experts: ExpertOutputs | None  # where "expert_output" is needed and the block has experts


class ModelReader(Protocol):
    """The tensors of a model by name, in its dtype, on the CPU."""

    shapes: Shapes

    def block(self, index: int) -> dict[str, Tensor]:
        """Every parameter and stored buffer of a block, by its name within it."""
        ...

    def ends(self) -> dict[str, Tensor]:
        """Every tensor outside the blocks, by its name in the model; a tied head is left out."""
        ...

    def name(self, index: int, tensor: str) -> str:
        """The name in the model of a tensor of block `index`."""
        ...

    def expert_tensors(self, index: int) -> tuple[str, ...]:
        """Names within a block of the tensors with one entry per expert in their first dimension; the router's are among them."""
        ...


class Survey(ModelReader, Protocol):
    """The unrounded model on the calibration windows, and its tensors, one block in memory at a time.

    config is config.json, with the lists by block that transformers derives from it (`layer_types`).
    """

    config: Mapping[str, Any]

    def surveyed(self) -> Iterator[SurveyedBlock]:
        """Run the blocks in order. Raises DataError without calibration data."""
        ...


class Reduction(Protocol):
    """Makes a smaller ordinary model, once; the rest of the cell runs on that one."""

    def check(self, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
        """Reasons why this model cannot be reduced so; empty when it can."""
        ...

    def config(
        self, config: Mapping[str, Any], choice: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The config of what comes out. choice: what `choose` returned; None in a plan, which needs shapes only."""
        ...

    def choose(
        self, model: Survey, rng: Generator
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """Decide what is kept. Yields (step, steps) and returns JSON values for `config` and `tensors`, and for the record."""
        ...

    def tensors(
        self, choice: Mapping[str, Any], model: ModelReader
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the smaller model, by its name there; one block in memory at a time."""
        ...


class Network(Protocol):
    """A whole causal language model as a tuning gets it."""

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
        """The weight that the checkpoint stores, as training has left it."""
        ...


class Tuning(Protocol):
    """Trains the whole model after rounding.

    The pass makes, or finds, the checkpoint of the same method without its tuning; each of its matrices becomes a `linear`, `tune`
    trains them all, and what they have `stored` is the cell's checkpoint. With a true `trains_others` all other
    parameters of the model are among those that it trains, and are stored in full. Needs "tokens" or "documents" and, to be
    taught, "teacher". Weights are trained, activations and cache are not rounded meanwhile.
    """

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]: ...

    def linear(
        self, name: str, weight: QuantizedWeight, bias: Tensor | None, original: Tensor | None
    ) -> TrainedLinear:
        """The trainable form of one linear. original: the model's matrix before rounding, [out, in] float32; None where a
        transform rescaled its block. Raises MethodError for a layout that this tuning cannot train."""
        ...

    def tune(
        self,
        student: Network,
        teacher: Network | None,
        parameters: Sequence[nn.Parameter],
        windows: Any,
        rng: Generator,
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """Train `parameters`, all of the linears', in place. Yields (step, steps) and returns notes for the record, JSON values.

        windows: [samples, length] calibration tokens; with "documents" in `needs` a sequence of Document instead.
        teacher: the full-precision model, None unless "teacher" is needed.
        Raises MethodError when a loss is not finite.
        """
        ...
