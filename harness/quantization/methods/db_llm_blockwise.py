"""DB-LLM's quantizer with scales trained block by block: not the paper's training, which is db_llm's tuning.

The weight form of DB-LLM (arXiv 2402.11960), w' = a1 b1 + a2 b2 per group, in the loop of OmniQuant (arXiv 2308.13137): per decoder
block, min over all a1, a2 of ||F(W, X) - F(W', X')||², X the block's inputs in the full-precision model and X' its inputs behind
the quantized blocks. It costs a small part of a distillation of the whole model and sees only one block at a time. A variant of
this project's own; the open points of the quantizer are db_llm's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from harness.core.cell import Scheme
from harness.core.shapes import Shapes
from harness.quantization.methods.blockwise import block_loss
from harness.quantization.methods.checks import check_uniform, require_finite
from harness.quantization.methods.protocols import BlockView
from harness.quantization.numerics.dual_binary import LEVELS, TrainedScales, initial_step
from harness.quantization.numerics.training import train
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding:
    """Dual binarization with scales trained to keep each block's output."""

    version = 1
    needs = ("reference",)
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        epochs              passes over the calibration sequences per block; 0: untrained
        rate                learning rate of the logarithms of the scales' growth
        range_search        start from the step of least squared error
        through_thresholds  scales also feel the codes that they move (straight-through)
        """

        epochs: int = 20
        rate: float = 0.0003
        range_search: bool = True
        through_thresholds: bool = False

        def __post_init__(self) -> None:
            if self.epochs < 0:
                raise ValueError(f"epochs is {self.epochs}; it must be 0 or more")
            if not self.rate > 0:
                raise ValueError(f"rate is {self.rate}; it must be above 0")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """2 bits, in groups that divide every layer."""
        return check_uniform(scheme, shapes, bits=(2,), never_symmetric=LEVELS)

    def round_block(
        self, block: BlockView, scheme: Scheme, rng: Generator
    ) -> dict[str, QuantizedWeight]:
        """Quantize the block's linears. Peak memory: the block in float32 four times, and one sequence's activations."""
        trained: dict[str, TrainedScales] = {}
        for shape in block.shapes.linears:
            weight = block.linear(shape.name).weight.detach().float()
            require_finite(weight, shape.name)
            size = scheme.weight_for(block.index, shape.name).group_size
            groups = weight.reshape(weight.shape[0], -1, weight.shape[1] if size == -1 else size)
            step = initial_step(groups, self.settings.range_search)[..., 0]
            trained[shape.name] = TrainedScales(
                weight, 2 * step, -step, self.settings.through_thresholds
            )

        def loss_of(sample: int) -> Tensor:
            weights = {name: scales.weight() for name, scales in trained.items()}
            return block_loss(block, sample, weights)

        groups_of = [
            {"params": [scales.growth for scales in trained.values()], "lr": self.settings.rate}
        ]
        losses = train(
            loss_of, len(block.inputs()), groups_of, self.settings.epochs, f"block {block.index}"
        )
        if losses:
            block.notes["db_llm_blockwise"] = {"loss": losses}
        return {
            name: scales.stored(scheme.weight_for(block.index, name).scale_dtype)
            for name, scales in trained.items()
        }
