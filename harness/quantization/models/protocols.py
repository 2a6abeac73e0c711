"""The contract of a model family for passes and for quantized models that run, with what most decoder-only families share.

A family file (`harness/quantization/models/<name>.py`) defines `class Family(DecoderFamily)`:
`architectures` as a literal, then whatever is particular to it. Fused projections, transposed
weights and fused experts are absorbed here and nowhere else:

    locations      the quantizable matrices of a block, each [out, in], wherever the module keeps them
    watch          the input of every group of locations while the block runs
    pairs          where a diagonal scale can be folded
    ends           modules before and after the blocks

Tensors are found in the files by the rules of transformers (`stored.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from harness.core.errors import ModelError
from harness.core.shapes import LinearShape, ScalePair, Shapes

Receive = Callable[[str, Tensor], None]  # (group, inputs [..., in])
# (a location's name, inputs [..., in]) -> the inputs that the matrix multiplies instead
Replace = Callable[[str, Tensor], Tensor]


ReceiveExpert = Callable[[int, Tensor, Tensor], None]  # see `DecoderFamily.watch_experts`


@dataclass(frozen=True)
class WeightLocation:
    """One quantizable matrix of a block: a parameter, or the part of one.

    name        within the block, "self_attn.q_proj": what schemes, records and checkpoints call it
    group       locations with the same input have the same group
    parameter   of the block, "self_attn.qkv_proj.weight"
    rows        the rows of a fused weight that are this matrix; None: all
    expert      index into a 3-D parameter [experts, …, …]; None: the parameter is a matrix
    transposed  the parameter holds [in, out] (Conv1D)
    bias        the parameter added to this matrix's outputs, None where there is none
    stage       groups that run side by side, as those of experts do, have one stage; None: the group is a stage of its own
    """

    name: str
    group: str
    parameter: str
    rows: tuple[int, int] | None = None
    expert: int | None = None
    transposed: bool = False
    bias: str | None = None
    stage: str | None = None

    @property
    def is_whole(self) -> bool:
        """The matrix is the parameter itself."""
        return self.rows is None and self.expert is None and not self.transposed

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix [out, in] in the parameter's memory: writing to it writes to the parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        matrix = matrix.T if self.transposed else matrix
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]


class DecoderFamily:
    """A decoder-only model of transformers: embeddings, a list of blocks of one class, a final norm and a head."""

    architectures: ClassVar[tuple[str, ...]] = ()
    blocks_name: str = "model.layers"
    before: tuple[str, ...] = ("model.embed_tokens",)  # modules that make the first block's input
    # modules that make logits of the last block's output
    after: tuple[str, ...] = ("model.norm", "lm_head")
    returns_tuple: bool = False  # a block's output comes first in a tuple
    # the class of transformers that builds the model from its config
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    rotations: ClassVar[bool] = False
    fused_experts: ClassVar[bool] = False
    # modules of a block whose parameters have one entry per expert in their first dimension
    by_expert: ClassVar[tuple[str, ...]] = ()

    # --- what a family file defines ----------------------------------------------------------------------------------------------

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        """The quantizable matrices of block `index`, in order of execution."""
        raise ModelError(f"{type(self).__module__} names no quantizable matrices")

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        """Where a scale on an input can be folded; () where nowhere."""
        return ()

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        """The linears of queries and keys where a scale on one can be undone in the other; None where a norm stands between."""
        return None

    def kv_heads(self, config: PretrainedConfig) -> int:
        """Heads of keys and values."""
        text = config.get_text_config()
        return getattr(text, "num_key_value_heads", None) or text.num_attention_heads

    def notes(self, config: PretrainedConfig) -> tuple[str, ...]:
        """Notes about this model that a plan shows to the user."""
        return ()

    # --- what most families share ---------------------------------------------------------------------------------------------

    def config(self, data: Mapping[str, Any]) -> PretrainedConfig:
        """The transformers config of a config.json. Raises ModelError when transformers does not accept it."""
        kind, names = (
            data.get("model_type"),
            ", ".join(data.get("architectures") or ["no architecture named"]),
        )
        if kind not in CONFIG_MAPPING:
            if "auto_map" in data:
                raise ModelError(
                    f"{names}: this model brings code of its own, which is not run here and which transformers lacks; "
                    "choose a model of an architecture that transformers has"
                )
            raise ModelError(
                f'{names}: transformers {transformers.__version__} knows no model_type "{kind}"; a newer one may'
            )
        try:
            return CONFIG_MAPPING[kind].from_dict(dict(data))
        except Exception as error:  # validation differs by class and raises many types
            said = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"transformers does not accept this config.json ({names}): {said}; compare it with the one that the model was "
                "published with"
            ) from error

    def skeleton(self, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The model with every parameter on the meta device and every buffer computed, in eval mode; costs no memory."""
        with torch.device("meta"):
            model = self.auto_class.from_config(copy.deepcopy(config), dtype=dtype)
        model.requires_grad_(False)
        # a vision tower computes the buffers of its own modules
        owners: dict[str, PreTrainedModel] = {}
        for name, module in model.named_modules():
            owners[name] = (
                module if isinstance(module, PreTrainedModel) else owners[name.rpartition(".")[0]]
            )
            self._compute_buffers(owners[name], module)
        return model.eval()

    def block_prefix(self, index: int) -> str:
        """The prefix of the names of block `index`'s parameters: "model.layers.3."."""
        return f"{self.blocks_name}.{index}."

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        found = model.get_submodule(self.blocks_name)
        assert isinstance(found, nn.ModuleList), self.blocks_name
        return found

    def output(self, result: Any) -> Tensor:
        """The hidden state [1, length, hidden] in what a block returned."""
        return result[0] if isinstance(result, tuple) else result

    @contextmanager
    def watch(
        self, block: nn.Module, locations: Sequence[WeightLocation], receive: Receive
    ) -> Iterator[None]:
        """While the context is open, receive(group, inputs) is called for each group of `locations` whenever the block runs.

        Here the input is the first argument of the module that owns the parameter of the group's first location.
        """
        first = {location.group: location for location in reversed(locations)}
        handles = []
        for group, location in first.items():
            module = block.get_submodule(location.parameter.rpartition(".")[0])

            def hook(_module: nn.Module, args: tuple[Any, ...], group: str = group) -> None:
                receive(group, args[0])

            handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watch_experts(self, block: nn.Module, receive: ReceiveExpert) -> Iterator[None]:
        """While the context is open, receive(expert, gates [tokens], outputs [tokens, hidden]) is called for every expert that
        tokens are sent to whenever the block runs; never for a block without experts. Outputs are before their gates."""
        yield

    def replace_inputs(
        self, block: nn.Module, owner: str, members: Sequence[WeightLocation], replace: Replace
    ) -> Callable[[], None]:
        """From now on the matrices `members`, all that the module `owner` holds, multiply replace(name, input) in place of their
        input; matrices with one input get one call, with the name of the first. Returns a function that undoes it.
        """
        if len({location.group for location in members}) > 1:
            raise ModelError(
                f"{type(self).__module__} does not say how inputs inside {owner} can be reached one by one"
            )

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (replace(members[0].name, args[0]), *args[1:])

        return block.get_submodule(owner).register_forward_pre_hook(hook).remove

    def shapes(self, data: Mapping[str, Any]) -> Shapes:
        """The shapes of a model from its config.json, for plans; reads no weights (0.2 s for 80 blocks)."""
        config = self.config(data)
        model = self.skeleton(config, torch.float32)
        count = len(self.blocks(model))
        linears: dict[LinearShape, None] = {}
        # blocks may differ (dense first blocks of a mixture); the union counts
        for index in range(count):
            parameters = dict(self.blocks(model)[index].named_parameters())
            locations = self.locations(config, index)
            missing = sorted({location.parameter for location in locations} - parameters.keys())
            if missing:
                raise ModelError(
                    f"block {index} of {type(model).__name__} has no parameter {', '.join(missing[:3])}"
                )
            for location in locations:
                out_features, in_features = location.view(parameters[location.parameter]).shape
                expert, biased = location.expert is not None, location.bias is not None
                linears[
                    LinearShape(
                        location.name,
                        out_features,
                        in_features,
                        location.group,
                        biased,
                        expert,
                        fused=not location.is_whole,
                    )
                ] = None
        text = config.get_text_config()
        heads = text.num_attention_heads
        return Shapes(
            family=type(self).__module__.rpartition(".")[2],
            blocks=count,
            linears=tuple(linears),
            pairs=self.pairs(config),
            hidden_size=text.hidden_size,
            heads=heads,
            kv_heads=self.kv_heads(config),
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            parameters=sum(p.numel() for p in model.parameters()),
            tied_head=bool(tied(model)),
            rotations=self.rotations,
            ends=(f"{self.before[0]}.weight", f"{self.after[0]}.weight", f"{self.after[-1]}.weight")
            if self.rotations
            else None,
            query_key=self.query_key(config),
            experts=max(
                getattr(text, key, None) or 0
                for key in ("num_local_experts", "num_experts", "n_routed_experts")
            ),
            notes=self.notes(config),
        )

    def _compute_buffers(self, model: PreTrainedModel, module: nn.Module) -> None:
        """Rotary frequencies and the like are in no file: the model class computes them, once they have memory."""
        waiting = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not waiting:
            return
        for name in waiting:
            buffer = module.get_buffer(name)
            module._buffers[name] = torch.full_like(
                buffer, -1 if not buffer.is_floating_point() else float("nan"), device="cpu"
            )
        model._init_weights(module)  # parameters are on meta: only the buffers take values
        left = [
            name
            for name in waiting
            if module.get_buffer(name).is_floating_point()
            and bool(module.get_buffer(name).isnan().any())
        ]
        if left:
            raise ModelError(
                f"{type(module).__name__}: transformers does not say how to compute the buffers {', '.join(left)}"
            )


def tied(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are other parameters: {"lm_head.weight": "model.embed_tokens.weight"}; empty for an untied head."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer `name`; a parameter that the module lacks (a bias) is added."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name` of a model."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    found = (
        module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)
    )
    assert found is not None, name
    return found.data
