"""L0 target shape (after Sheared LLaMA, arXiv 2310.06694), no continued training: masks and weights trained to a target shape.

Hard-concrete masks (arXiv 1712.01312) over blocks, MLP channels, heads and channels of the residual stream are trained together
with every weight; a pair of Lagrange multipliers per kind, ascended, brings the expected share of closed masks to that of the
target. Then exactly as many masks as the target asks for are closed, the others folded into the weights, and rows and columns cut.

    training   z = clip(1.2 σ((log u - log(1 - u) + log α) / β) - 0.1, 0, 1), u uniform, β = 2/3
    open       p = 1 - σ(β log(x / (1 - x)) - log α), x = 0.1 / 1.2, the probability that z is not 0
    at last    z = σ(0.8 log α / β), the lowest closed
    loss       next-token cross-entropy + Σ over kinds of the mean over blocks of λ₁ (t̂ - t) + λ₂ (t̂ - t)², t̂ = 1 - mean p

Where a mask acts: heads on the values' rows (attention's weights sum to 1), MLP channels on up's rows, blocks on the outputs of
attention and MLP, the stream on embeddings, outputs of o and down, and norms, whose mean square is over open channels.

Differences from the authors' code (princeton-nlp/LLM-Shearing @ b87218b, MIT): the stream's mask is folded once (theirs also
multiplies the head, though their forward does not); grouped queries have one mask per key-value head; one text, no loading by
domains; of tied embeddings the mask acts once for both ends; no continued training, which theirs has 50 billion tokens of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Generator as Generating
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Cell
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.protocols import ModelReader, Survey, TrainableModel
from harness.quantization.methods.reducing import (
    DOWN,
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    NORMS,
    OUTPUT,
    QKV,
    Cut,
    TargetShape,
    sizes,
)
from harness.quantization.numerics.training import batches

TEMPERATURE = 2 / 3  # β
LOWEST, HIGHEST = -0.1, 1.1  # of the stretched distribution
SHARPNESS = 0.8  # of the masks at last
EDGE = 1e-6  # of uniform numbers and probabilities
LIMIT = math.log(100)  # of |log α|
START, SPREAD = 5.0, 0.01  # of log α
LAST_RATE = 0.1  # the share of every rate at which its cosine ends
BETAS, EPS = (0.9, 0.95), 1e-8
TOLERANCE = 0.02  # of the expected share of closed masks, at last
STRETCHES = 20  # of the steps, for which mean losses are reported
COPIES = 6  # float32: weights, gradients, two moments; masked weights and their gradients
UP = "mlp.up_proj"


def sampled(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Masks in [0, 1] as training draws them. uniform: numbers in (0, 1) of the same shape."""
    noise = uniform.log() - (1 - uniform).log()
    stretched = torch.sigmoid((noise + log_alpha) / TEMPERATURE) * (HIGHEST - LOWEST) + LOWEST
    return stretched.clamp(0, 1)


def open_share(log_alpha: Tensor) -> Tensor:
    """p, the probability that a mask that training draws is not 0, kept off 0 and 1."""
    share = -LOWEST / (HIGHEST - LOWEST)
    logit = math.log(share / (1 - share)) * TEMPERATURE
    return 1 - torch.sigmoid(logit - log_alpha).clamp(EDGE, 1 - EDGE)


def closed_share(log_alpha: Tensor) -> Tensor:
    """t̂, the expected share of closed masks along the last dimension: [blocks, n] -> [blocks], [n] -> []."""
    return 1 - open_share(log_alpha).mean(-1)


def settled(log_alpha: Tensor, keep: int) -> Tensor:
    """Masks after training: of the last dimension the `keep` largest stay, below 1, all others are 0; of equal ones the first."""
    masks = torch.sigmoid(log_alpha / TEMPERATURE * SHARPNESS)
    order = (-masks).argsort(dim=-1, stable=True)
    return masks.scatter(-1, order[..., keep:], 0.0)


def lagrangian(closed: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """The mean of λ₁ (t̂ - t) + λ₂ (t̂ - t)². closed: t̂, [blocks] or []; multipliers [2]: λ₁, λ₂."""
    distance = closed - target
    return (multipliers[0] * distance + multipliers[1] * distance.square()).mean()


def rate_share(step: int, steps: int, warmup: int) -> float:
    """Of every rate, at a step counted from 0: linear from 0 over the warm-up, then a cosine to LAST_RATE."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def fold(
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    shapes: Shapes,
    name_of: Callable[[int, str], str],
    stretch: bool,
) -> dict[str, Tensor]:
    """The model's tensors times its masks, differentiable in both; those that no mask touches are left out.

    masks    by kind, those there are: "blocks" [blocks], "intermediate" [blocks, n], "kv_heads" [blocks, heads], "hidden" [hidden]
    stretch  for a model that keeps its shape: what enters the stream is multiplied by √(hidden / open channels) and norms are
             divided by it, so that their mean square, with its ε, is that over open channels. Without it: for one that is cut.
    """
    made: dict[str, Tensor] = {}

    def scale(name: str, factor: Tensor | float) -> None:
        if name in tensors:
            value = tensors[name]
            by_row = isinstance(factor, Tensor) and factor.ndim == 1 and value.ndim == 2
            made[name] = value * (factor[:, None] if by_row else factor)  # type: ignore[index]

    stream: Tensor | float = masks.get("hidden", 1.0)
    wider = 1.0
    if stretch and isinstance(stream, Tensor):
        wider = math.sqrt(stream.numel() / max(1, int(stream.detach().count_nonzero())))
    for index in range(shapes.blocks):
        rows: dict[str, Tensor | float] = dict.fromkeys(NORMS, stream / wider)
        written = stream * wider
        if "blocks" in masks:
            written = written * masks["blocks"][index]
        rows |= {OUTPUT: written, DOWN: written}
        if "kv_heads" in masks:
            rows[QKV[2]] = masks["kv_heads"][index].repeat_interleave(shapes.head_dim)
        if "intermediate" in masks:
            rows[UP] = masks["intermediate"][index]
        for owner, factor in rows.items():
            for leaf in ("weight", "bias"):
                scale(name_of(index, f"{owner}.{leaf}"), factor)
    if isinstance(stream, Tensor):
        made[EMBEDDINGS] = tensors[EMBEDDINGS] * (stream * wider)
        # a tied head is the embeddings, and has their mask already
        made[FINAL_NORM] = tensors[FINAL_NORM] * (
            stream / wider if HEAD in tensors else 1 / wider**2
        )
    return made


class Reduction:
    """Trains weights and masks together, and cuts what the masks close."""

    version = 1
    needs = ("tokens",)
    stochastic = True

    @dataclass(frozen=True)
    class Settings:
        """
        blocks, intermediate, kv_heads, hidden   numbers that are kept, each with masks; 0: all, without. Query heads follow
        steps             of training, above 0
        batch             windows per step, at most all there are
        rate              of the weights
        mask_rate         of log α
        multiplier_rate   of the multipliers, which ascend
        sparsity_warmup   share of the steps over which the target grows from nothing to the whole, [0, 1]
        rate_warmup       share of the steps over which all rates grow from 0, [0, 1)
        clip              the largest norm of the gradient of everything together
        most_parameters   a larger model is refused
        """

        blocks: int = 0
        intermediate: int = 0
        kv_heads: int = 0
        hidden: int = 0
        steps: int = 400
        batch: int = 8
        rate: float = 1e-4
        mask_rate: float = 1.0
        multiplier_rate: float = 1.0
        sparsity_warmup: float = 0.2
        rate_warmup: float = 0.1
        clip: float = 1.0
        most_parameters: float = 2e8

        def __post_init__(self) -> None:
            TargetShape(self.blocks, self.intermediate, self.kv_heads, self.hidden)
            for name in ("steps", "batch", "mask_rate", "multiplier_rate", "clip"):
                if not getattr(self, name) > 0:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
            if not self.rate >= 0:
                raise ValueError(f"rate is {self.rate}; it must not be negative")
            if not (0 <= self.sparsity_warmup <= 1 and 0 <= self.rate_warmup < 1):
                raise ValueError(
                    "sparsity_warmup and rate_warmup are shares of the steps, "
                    f"not {self.sparsity_warmup} and {self.rate_warmup}"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._target = TargetShape(
            settings.blocks, settings.intermediate, settings.kv_heads, settings.hidden
        )
        self._trained: dict[str, Tensor] = {}  # by name in the model: masks folded in, not cut

    def check(self, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
        """Llama and models of its structure, small enough to train, with targets that are below what they have."""
        reasons, settings = self._target.check(shapes, config), self.settings
        if shapes.parameters > settings.most_parameters:
            reasons.append(
                f"this trains every weight of {shapes.parameters:.3g}, in {_memory(shapes):.1f} GB beside activations, on "
                f"{settings.steps * settings.batch} windows (the authors' run: 0.42e9 tokens before further training); raise "
                f"reduction.most_parameters ({settings.most_parameters:.3g}) for a machine that can"
            )
        return reasons

    def warnings(self, cell: Cell, shapes: Shapes) -> list[str]:
        """What training costs."""
        if cell.calibration is None:
            return []
        batch = min(self.settings.batch, cell.calibration.samples)
        tokens = self.settings.steps * batch * cell.calibration.length
        return [
            f"trains all {shapes.parameters:.3g} weights, in {_memory(shapes):.2g} GB beside activations, on {tokens:.2g} tokens "
            f"of {cell.calibration.samples * cell.calibration.length:.2g} different ones"
        ]

    def config(
        self, config: Mapping[str, Any], choice: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The config with the target shape."""
        return self._target.config(config, choice["blocks"] if choice is not None else None)

    def choose(
        self, model: Survey, rng: Generator
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """What is kept: "blocks", "channels" and "kv_heads" by block, "hidden"; besides how training went.

        "closed": the expected share of closed masks by kind; "losses": means of the cross-entropy over equal stretches.
        Raises MethodError where a loss is not finite, and where masks did not reach the target.
        """
        shapes, have = model.shapes, sizes(model.shapes, model.config)
        keep = {kind: getattr(self._target, kind) for kind in have if getattr(self._target, kind)}
        dimensions = {
            "blocks": (shapes.blocks,),
            "intermediate": (shapes.blocks, have["intermediate"]),
            "kv_heads": (shapes.blocks, shapes.kv_heads),
            "hidden": (shapes.hidden_size,),
        }
        trained = model.trainable()
        device = trained.windows.device
        log_alphas = {
            kind: nn.Parameter(
                (START + SPREAD * torch.randn(dimensions[kind], generator=rng)).to(device)
            )
            for kind in keep
        }
        targets = {kind: 1 - keep[kind] / have[kind] for kind in keep}
        losses = yield from self._train(model, trained, log_alphas, targets, rng)
        with torch.no_grad():
            closed = {
                kind: float(closed_share(_bounded(each)).mean())
                for kind, each in log_alphas.items()
            }
            masks = {kind: settled(_bounded(each), keep[kind]) for kind, each in log_alphas.items()}
            if any(abs(closed[kind] - targets[kind]) >= TOLERANCE for kind in keep):
                found = ", ".join(f"{k} {closed[k]:.3f} of {targets[k]:.3f}" for k in keep)
                raise MethodError(
                    f"masks did not reach the target: expected shares that are closed: {found}; raise reduction.steps or "
                    "reduction.mask_rate"
                )
            whole = dict(trained.tensors)
            folded = fold(whole, masks, shapes, model.name, stretch=False)
            self._trained = {
                name: tensor.detach().cpu() for name, tensor in (whole | folded).items()
            }

        def kept(kind: str, index: int | None = None) -> list[int]:
            if kind not in masks:
                return list(range(have[kind]))
            row = masks[kind] if index is None else masks[kind][index]
            found: list[int] = row.nonzero()[:, 0].tolist()
            return found

        return {
            "blocks": kept("blocks"),
            "channels": {str(i): kept("intermediate", i) for i in range(shapes.blocks)},
            "kv_heads": {str(i): kept("kv_heads", i) for i in range(shapes.blocks)},
            "hidden": kept("hidden"),
            "closed": closed,
            "losses": losses,
        }

    def tensors(
        self, choice: Mapping[str, Any], model: ModelReader
    ) -> Iterator[tuple[str, Tensor]]:
        """Every trained tensor with its masks folded in, and the rows and columns that are kept."""
        ends = Cut(choice["hidden"], (), (), model.shapes)
        for name, tensor in model.ends().items():
            yield name, ends.end(name, self._trained.get(name, tensor))
        for number, index in enumerate(choice["blocks"]):
            channels, heads = choice["channels"][str(index)], choice["kv_heads"][str(index)]
            kept = Cut(choice["hidden"], channels, heads, model.shapes)
            for name, tensor in model.block(index).items():
                made = self._trained.get(model.name(index, name), tensor)
                yield model.name(number, name), kept.of(name, made)

    def _train(
        self,
        model: Survey,
        trained: TrainableModel,
        log_alphas: Mapping[str, nn.Parameter],
        targets: Mapping[str, float],
        rng: Generator,
    ) -> Generating[tuple[int, int], None, list[float]]:
        """Train weights, log α and multipliers in place. Yields (step, steps); returns the mean losses of stretches."""
        settings, device = self.settings, trained.windows.device
        multipliers = {kind: nn.Parameter(torch.zeros(2, device=device)) for kind in targets}
        weights = list(trained.tensors.values())
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": settings.rate},
            {"params": list(log_alphas.values()), "lr": settings.mask_rate},
            {
                "params": list(multipliers.values()),
                "lr": settings.multiplier_rate,
                "maximize": True,
            },
        ]
        rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0)
        everything = [*weights, *log_alphas.values(), *multipliers.values()]
        samples, steps = len(trained.windows), settings.steps
        drawn = batches(samples, min(settings.batch, samples), rng)
        stretch, recent, losses = math.ceil(steps / STRETCHES), list[Tensor](), list[float]()
        for step in range(steps):
            share = rate_share(step, steps, round(settings.rate_warmup * steps))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            grown = min(1.0, step / max(1, round(settings.sparsity_warmup * steps)))
            tokens = trained.windows[next(drawn)]
            with torch.enable_grad():
                masks, penalty = {}, torch.zeros((), device=device)
                for kind, log_alpha in log_alphas.items():
                    _bounded(log_alpha)
                    uniform = torch.rand(log_alpha.shape, generator=rng).clamp(EDGE, 1 - EDGE)
                    masks[kind] = sampled(log_alpha, uniform.to(device))
                    distance = lagrangian(
                        closed_share(log_alpha), grown * targets[kind], multipliers[kind]
                    )
                    penalty = penalty + distance
                folded = fold(trained.tensors, masks, model.shapes, model.name, stretch=True)
                logits = trained.logits(tokens, {**trained.tensors, **folded})[:, :-1]
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device)
                )
                optimizer.zero_grad(set_to_none=True)
                (loss + penalty).backward()
            nn.utils.clip_grad_norm_(everything, settings.clip)
            optimizer.step()
            recent.append(loss.detach())
            if len(recent) == stretch or step == steps - 1:
                losses.append(float(torch.stack(recent).mean()))
                recent = []
                if not math.isfinite(losses[-1]):
                    raise MethodError(
                        f"the loss of step {step + 1} is {losses[-1]}; lower reduction.rate or reduction.mask_rate"
                    )
            yield step + 1, steps
        return losses


def _bounded(log_alpha: Tensor) -> Tensor:
    """log α, moved in place into the range that the authors' code allows."""
    with torch.no_grad():
        return log_alpha.clamp_(-LIMIT, LIMIT)


def _memory(shapes: Shapes) -> float:
    """GB of training without activations."""
    return COPIES * 4 * shapes.parameters / 1e9
