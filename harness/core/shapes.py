"""The shapes of a model: its linears, the pairs between which scales move, heads, experts."""

from __future__ import annotations

from dataclasses import dataclass


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
    fused: bool = False  # shares its parameter, and so its input at run time, with other matrices


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
    kind: str  # "norm" or "linear"
    region: str = ""
    repeats: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Shapes:
    """What a plan knows of a model from its config.json alone."""

    family: str
    blocks: int
    linears: tuple[LinearShape, ...]  # of one block, in order of execution
    pairs: tuple[ScalePair, ...]
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int  # of the whole model
    tied_head: bool = False
    rotations: bool = False  # residual-stream rotations leave the function unchanged (RMSNorm only)
    # parameters of embeddings, final norm and head, where rotations are allowed
    ends: tuple[str, str, str] | None = None
    # linears that make queries and keys, with nothing but rotary positions (halves of a head rotated against each other)
    # between them and their product
    query_key: tuple[str, str] | None = None
    experts: int = 0
    notes: tuple[str, ...] = ()
