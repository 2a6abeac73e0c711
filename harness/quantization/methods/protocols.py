"""The contract of a method: what it receives and what it returns.

A method file (`harness/quantization/methods/<name>.py`, one paper each) defines one or more of the classes `Transform`, `Rounding`,
`Tuning`. Each has a nested frozen dataclass `Settings` whose fields and defaults equal those of `conf/<part>/<name>.yaml`
(conf/transform, conf/rounding, conf/tuning), takes it as its only constructor argument, and states its facts as literals, which
`harness.core.plugins` reads without importing the file:

    class Rounding:
        version = 1                     # raised when its numbers change; part of every key
        needs = ("hessian",)            # statistics it reads: names of STATISTICS; () is data-free
        stochastic = False              # True: draws from `rng`
        activation_aware = False        # True: its codes depend on the activation or KV scheme

A method may import `harness.core`, `harness.quantization.numerics`, this module, and the tools that methods share: `checks` (which
schemes a method accepts), `evidence` (factors and sensitivities), `folding` (scales and rotations). It imports no other method.

Shapes in one notation: weight [out, in], hessian [in, in], inputs [tokens, in], scale [out, groups].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Generator as Generating
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Generator, Tensor, nn

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
    "tokens": "the calibration windows themselves (training of the whole model)",
    "documents": "the calibration's texts, tokenized, each with what of it is a prompt (training after rounding)",
    "teacher": "the full-precision model, to learn from (training after rounding)",
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
    trains them all, and what they have `stored` is the cell's checkpoint. Needs "tokens" or "documents" and, to be taught,
    "teacher". Weights are trained, activations and cache are not rounded meanwhile.
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
