"""A cell: one frozen point of a grid, and the keys that identify what it produces.

Nothing here imports a plugin, nor torch: cells travel between processes as JSON
(`to_json`, `from_json`) and are compared by key. The annotations of fields state their limits (`Literal`, `Ge`); they are
checked where values come from people, in config/typed.py, and not again where a cell is read back.

Two keys, each the SHA-256 of everything that changes numbers and of nothing else:

    quantize_key   the checkpoint: model, method, weight scheme, and calibration, inputs and seed where the method uses them
    score_key      a score: the checkpoint, how activations and KV cache are executed, the evaluator with settings and data

`cell_key` names the row of a table and the MLflow run: a checkpoint with its execution scheme.
Library versions, cards, commits and batch sizes are provenance; they live in the record, never in a key.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge

from harness.core import plugins
from harness.core.errors import ConfigError

ScaleType = Literal["float16", "bfloat16", "float32", "float8_e4m3", "double_quantized", "e8m0"]
Settings = tuple[tuple[str, Any], ...]  # sorted (name, JSON value) pairs; lists become tuples
PLACES = ("source", "include", "data_root", "revisions")  # see Evaluation.settings


def freeze(settings: dict[str, Any]) -> Settings:
    """Sorted, hashable form of a settings mapping whose values are JSON values."""
    return tuple((name, _freeze_value(value)) for name, value in sorted(settings.items()))


def _freeze_value(value: Any) -> Any:
    if isinstance(value, dict):
        return freeze(value)
    if isinstance(value, list | tuple):
        return tuple(_freeze_value(item) for item in value)
    return value


@dataclass(frozen=True)
class Part:
    """A plugin with its settings: the transform, rounding or tuning of a method.

    version, needs, stochastic and activation_aware are facts of the plugin's class, copied here by `config`
    so that keys can be computed without importing it.
    """

    name: str
    settings: Settings = ()
    version: int = 1
    needs: tuple[str, ...] = ()  # statistics of the calibration data; empty: data-free
    stochastic: bool = False  # draws from the cell's seed
    activation_aware: bool = False  # its codes depend on the activation and KV scheme

    def __getitem__(self, setting: str) -> Any:
        return dict(self.settings)[setting]


@dataclass(frozen=True)
class RoundingOverride:
    """Another rounding for linears of some blocks, by their short names ("q_proj"), as a bit budget chose it."""

    rounding: Part
    linears: tuple[str, ...]
    blocks: tuple[int, ...]

    def applies(self, block: int, linear: str) -> bool:
        return block in self.blocks and linear.rsplit(".", 1)[-1] in self.linears


@dataclass(frozen=True)
class Method:
    """A named recipe over three slots. All slots empty is the full-precision baseline, `none`.

    overrides: linears with a rounding of their own, each named by one override at most.
    """

    name: str
    transform: Part | None = None
    rounding: Part | None = None
    tuning: Part | None = None
    overrides: tuple[RoundingOverride, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every distinct part: those of the slots, then the roundings of overrides."""
        slots = (self.transform, self.rounding, self.tuning)
        found = [part for part in slots if part is not None]
        for override in self.overrides:
            if override.rounding not in found:
                found.append(override.rounding)
        return tuple(found)

    def rounding_for(self, block: int, linear: str) -> Part | None:
        """The rounding of one linear ("self_attn.q_proj" or "q_proj") of one block."""
        return next(
            (each.rounding for each in self.overrides if each.applies(block, linear)), self.rounding
        )

    @property
    def is_baseline(self) -> bool:
        return not self.parts

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(sorted({need for part in self.parts for need in part.needs}))

    @property
    def reads_inputs(self) -> bool:
        """Some part wants to know of the blocks' inputs; gradients, and what a transform learns, are there before the walk."""
        return bool(set(self.needs) - {"tokens", "squared_gradient"})


@dataclass(frozen=True)
class Model:
    """A causal language model: a folder, a hub id, or the embedded demo.

    digest identifies the weights: a hash of the folder's files or the resolved commit of a hub id.
    dtype is the floating type in which the model is loaded, calibrated and evaluated.
    generation identifies a folder's generation_config.json (end tokens, penalties), which only texts that it writes depend on.
    """

    name: str
    source: str
    revision: str | None = None
    digest: str = ""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    generation: str = ""


@dataclass(frozen=True)
class WeightScheme:
    """How one weight matrix is stored.

    format      int, or a name of numerics/number_formats.py (nf4, fp8_e4m3, mxfp4, nvfp4, …)
    bits        2..8 for integers; what a format fixes (nf4: 4) must agree with it
    group_size  input channels that share one scale; -1: one scale per output channel
    symmetric   no zero point; says nothing for formats other than int, which have none
    scale_dtype float16, bfloat16 or float32: the type in which scales (and float zero points) are stored and used;
                float8_e4m3: E4M3 numbers times one float32 per matrix; e8m0: powers of two, of MX formats;
                double_quantized: 8-bit codes in blocks of 256, of nf4 and fp4 (QLoRA)
    zero_point  of integer grids that are not symmetric: integer, one of the codes; or float, exact to scale_dtype
    """

    format: str = "int"
    bits: Annotated[float, Ge(1)] = 4
    group_size: int = -1
    symmetric: bool = False
    scale_dtype: ScaleType = "float16"
    zero_point: Literal["integer", "float"] = "integer"

    def contradictions(self) -> list[str]:
        """Limits that no single field can state: each as "field value: reason"; empty if there are none."""
        found = []
        if self.group_size == 0 or self.group_size < -1:
            found.append(
                f"group_size {self.group_size}: neither -1 (per output channel) nor positive"
            )
        if self.format == "int" and not 1 <= self.bits <= 8:
            found.append(f"bits {self.bits}: integers have 1 to 8 bits")
        return found


@dataclass(frozen=True)
class ActivationScheme:
    """How the inputs of the quantized linears are rounded at run time.

    granularity        token, tensor or group
    outlier_threshold  channels of a sequence that reach it stay as they are (LLM.int8()); 0: none do
    """

    format: str = "int"
    bits: Annotated[int, Ge(2)] = 8
    granularity: Literal["token", "tensor", "group"] = "token"
    group_size: int = -1
    symmetric: bool = True
    dynamic: bool = True
    grid: str = "smoothquant"
    outlier_threshold: float = 0.0


@dataclass(frozen=True)
class KVScheme:
    """How keys and values are rounded: keys per channel over group_size tokens, values per token (KIVI)."""

    bits: Annotated[int, Ge(1)] = 4
    group_size: Annotated[int, Ge(1)] = 32
    residual: int = 32  # most recent tokens kept in full precision
    key_axis: str = "channel"
    value_axis: str = "token"
    hadamard: bool = False  # queries and keys of each head times a Hadamard matrix before keys are rounded (QuaRot)


@dataclass(frozen=True)
class Override:
    """Fields of the schemes that differ for named layers. blocks None: every block; linears are short names, e.g. "q_proj"."""

    linears: tuple[str, ...]
    blocks: tuple[int, ...] | None = None
    weight: Settings = ()
    activation: Settings = ()

    def applies(self, block: int, linear: str) -> bool:
        return (self.blocks is None or block in self.blocks) and linear.rsplit(".", 1)[
            -1
        ] in self.linears


@dataclass(frozen=True)
class Scheme:
    """The number format of a cell. activation or kv None: kept in the model's dtype."""

    name: str
    weight: WeightScheme = WeightScheme()
    activation: ActivationScheme | None = None
    kv: KVScheme | None = None
    overrides: tuple[Override, ...] = ()

    def weight_for(self, block: int, linear: str) -> WeightScheme:
        """The weight scheme of one linear ("self_attn.q_proj" or "q_proj") of one block, overrides applied in order."""
        scheme = self.weight
        for override in self.overrides:
            if override.applies(block, linear):
                scheme = dataclasses.replace(scheme, **dict(override.weight))
        return scheme

    def activation_for(self, block: int, linear: str) -> ActivationScheme | None:
        """The activation scheme of one linear's input, overrides applied in order; None where inputs stay as they are."""
        scheme = self.activation
        for override in self.overrides:
            if scheme is not None and override.applies(block, linear):
                scheme = dataclasses.replace(scheme, **dict(override.activation))
        return scheme


@dataclass(frozen=True)
class Calibration:
    """Token windows drawn from a corpus.

    packing  window: random windows of the joined text (GPTQ); document: a random window of a long enough document (C4);
             join: short documents concatenated and cut (AWQ)
    samples windows of length tokens; source and split say where the text lies, digest which text it is.
    """

    name: str
    source: str
    split: str = "train"
    packing: Literal["window", "document", "join"] = "window"
    samples: Annotated[int, Ge(1)] = 128
    length: Annotated[int, Ge(2)] = 2048
    seed: int = 0
    separator: str = "\n\n"
    digest: str = ""


@dataclass(frozen=True)
class Evaluation:
    """One scorer with its settings. data_digest identifies the data it reads; limit marks a smoke run on the first items.

    Settings called as in PLACES say where data lies, for every evaluator: `config` resolves them to `data_digest`, and keys hash
    the digest instead.

    generates: the model writes text in it, so that its scores depend on the model's generation config.
    """

    name: str
    evaluator: str
    settings: Settings = ()
    version: int = 1
    data_digest: str = ""
    limit: int | None = None
    generates: bool = False

    def __getitem__(self, setting: str) -> Any:
        return dict(self.settings)[setting]


@dataclass(frozen=True)
class Cell:
    """model × method × scheme, with what it is calibrated on and what it is scored by.

    inputs  what a block is calibrated on: "quantized" (outputs of the already rounded blocks before it, as published)
            or "full_precision"
    seed    of the method's own randomness; the draw of the calibration windows has its own seed
    variant what tells it apart from cells of its sweep that are called the same: "seed 1"; a name, never part of a key
    """

    model: Model
    method: Method
    scheme: Scheme
    calibration: Calibration | None = None
    inputs: str = "quantized"
    seed: int = 0
    evaluations: tuple[Evaluation, ...] = field(default=(), compare=False)
    variant: str = field(default="", compare=False)

    @property
    def title(self) -> str:
        """What a person calls the cell: "demo · gptq · w4g32", "demo · gptq · w4g32 · seed 1"."""
        return " · ".join(
            filter(None, (self.model.name, self.method.name, self.scheme.name, self.variant))
        )


def quantize_key(cell: Cell) -> str:
    """Identity of the cell's checkpoint; 64 hexadecimal digits. Equal keys mean equal bytes."""
    method = cell.method
    identity: dict[str, Any] = {
        "model": _identity(
            cell.model, drop=("name", "source", "revision", "trust_remote_code", "generation")
        ),
        "parts": [
            _identity(part, drop=("needs", "stochastic", "activation_aware"))
            for part in method.parts
        ],
        "slots": [part is not None for part in (method.transform, method.rounding, method.tuning)],
    }
    if method.overrides:
        identity["roundings"] = [
            [method.parts.index(o.rounding), list(o.linears), list(o.blocks)]
            for o in method.overrides
        ]
    if not method.is_baseline:
        own = cell.scheme.weight
        identity["weight"] = _identity(
            own, drop=("zero_point",) if own.zero_point == "integer" else ()
        )  # younger than the keys
        identity["overrides"] = [
            _identity(o, drop=("activation",)) for o in cell.scheme.overrides if o.weight
        ]
    if method.needs:
        identity["calibration"] = _identity(cell.calibration, drop=("name", "source"))
        identity["inputs"] = cell.inputs
    if any(part.stochastic for part in method.parts):
        identity["seed"] = cell.seed
    if any(part.activation_aware for part in method.parts):
        identity["execution"] = _execution(cell.scheme)
    return digest(identity)


def untuned(cell: Cell) -> Cell:
    """The cell whose checkpoint a tuned cell starts from: the same method without its tuning."""
    return dataclasses.replace(cell, method=dataclasses.replace(cell.method, tuning=None))


def cell_key(cell: Cell) -> str:
    """Identity of a cell: its checkpoint and how activations and KV cache are executed; 64 hexadecimal digits."""
    identity = {"checkpoint": quantize_key(cell), "execution": _execution(cell.scheme)}
    if has_static_activations(cell.scheme):
        identity["calibration"] = _identity(cell.calibration, drop=("name", "source"))
    return digest(identity)


def has_static_activations(scheme: Scheme) -> bool:
    """Some activations have scales fixed from calibration data, which a cell then needs whatever its method."""
    if scheme.activation is None:
        return False
    return not scheme.activation.dynamic or any(
        dict(o.activation).get("dynamic") is False for o in scheme.overrides
    )


def score_key(cell: Cell, evaluation: Evaluation) -> str:
    """Identity of one evaluation of one cell; 64 hexadecimal digits. Where data lies is left out once its digest is known."""
    identity = _identity(evaluation, drop=("name", "generates"))
    if evaluation.generates and cell.model.generation:
        identity["generation"] = cell.model.generation
    dropped = {
        name for name in _added_later(evaluation.evaluator) if not identity["settings"].get(name)
    } | set(PLACES if evaluation.data_digest else ())
    identity["settings"] = {
        name: value for name, value in identity["settings"].items() if name not in dropped
    }
    return digest({"cell": cell_key(cell), "evaluation": identity})


def _added_later(evaluator: str) -> tuple[str, ...]:
    """Settings that the evaluator got after scores existed: a key leaves them out while they are off.

    A literal `settings_added_later` of the plugin's class, read from its source, so that records of any age have one key.
    """
    facts = plugins.find("evaluator").get(evaluator)
    return () if facts is None else tuple(facts.get("settings_added_later", ()))


def baseline_of(cell: Cell) -> Cell:
    """The full-precision cell that this cell is compared with: same model, nothing quantized."""
    return dataclasses.replace(
        cell,
        method=Method("none"),
        scheme=Scheme("full"),
        calibration=None,
        inputs="quantized",
        seed=0,
        variant="",
    )


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, as 64 hexadecimal digits.

    Raises ConfigError for NaN and infinity, which JSON lacks: what changes numbers must be one itself.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        found = ", ".join(f"{place}={number}" for place, number in _non_finite(value))
        raise ConfigError(
            f"{found or error}: a finite number is expected; change it where it was set (a YAML file or an override), "
            "or leave it out"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def _non_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Where in a JSON value NaN and infinities are."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _non_finite(item, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        pair = len(value) == 2 and isinstance(value[0], str)  # a setting with its value
        for number, item in enumerate(value):
            yield from _non_finite(item, f"{place}.{value[0] if pair else number}".lstrip("."))


def _execution(scheme: Scheme) -> dict[str, Any]:
    return {
        "activation": _activation_identity(scheme),
        "kv": _kv_identity(scheme.kv),
        "overrides": [_identity(o, drop=("weight",)) for o in scheme.overrides if o.activation],
    }


def _activation_identity(scheme: Scheme) -> Any:
    """The outliers' rule is 2 since codes beside outliers are computed in float32; without outliers nothing changed."""
    own = scheme.activation
    if own is None:
        return None
    changed = any(
        each.outlier_threshold > 0 and each.symmetric and each.grid == "smoothquant"
        for each in (
            own,
            *(dataclasses.replace(own, **dict(o.activation)) for o in scheme.overrides),
        )
    )
    return {**_identity(own), "outlier_rule": 2} if changed else _identity(own)


def _kv_identity(kv: KVScheme | None) -> Any:
    """The residual's rule is 2 since a token attends before the cache is rounded; without a residual nothing changed."""
    return (
        _identity(kv) if kv is None or kv.residual == 0 else {**_identity(kv), "residual_rule": 2}
    )


def _identity(value: Any, drop: tuple[str, ...] = ()) -> Any:
    if value is None:
        return None
    return {name: item for name, item in to_json(value).items() if name not in drop}


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    # 0.1 ms each time, and a sweep computes tens of thousands of keys
    return typing.get_type_hints(kind)


def to_json(value: Any) -> Any:
    """A cell, or any part of one, as JSON values; settings become objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        return {
            f.name: _thaw(getattr(value, f.name))
            if hints[f.name] == Settings
            else to_json(getattr(value, f.name))
            for f in dataclasses.fields(value)
        }
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def _thaw(settings: Settings) -> dict[str, Any]:
    return {name: _thaw_value(value) for name, value in settings}


def _thaw_value(value: Any) -> Any:
    if isinstance(value, tuple):
        is_mapping = bool(value) and all(
            isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value
        )
        return _thaw(value) if is_mapping else [_thaw_value(item) for item in value]
    return value


T = TypeVar("T")


def from_json(kind: type[T], data: Any) -> T:
    """The inverse of `to_json` for a dataclass of this module: from_json(Cell, to_json(cell)) == cell."""
    return typing.cast(T, _build(kind, data))


def _build(kind: Any, data: Any) -> Any:
    if kind == Settings:
        return freeze(data)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
        return _build(inner, data)
    if origin is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in data)
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(type, kind))
        return typing.cast(type, kind)(
            **{name: _build(hints[name], item) for name, item in data.items()}
        )
    return data
