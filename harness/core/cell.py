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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast

from annotated_types import Ge

from harness.core import plugins
from harness.core.errors import ConfigError
from harness.core.json_values import Settings as Settings
from harness.core.json_values import digest as digest
from harness.core.json_values import freeze as freeze
from harness.core.json_values import from_json as from_json
from harness.core.json_values import to_json as to_json
from harness.core.sparsity import read_sparsity

ScaleType = Literal["float16", "bfloat16", "float32", "float8_e4m3", "double_quantized", "e8m0"]
T = TypeVar("T")
PLACES = ("source", "include", "data_root", "revisions")  # see Evaluation.settings
BASE_WEIGHT = "base_weight"  # a statistic of another model, not of calibration data
OF_THE_FINE_TUNE = ("base", "base_digest")  # fields of a Model that name where it comes from


@dataclass(frozen=True)
class Part:
    """A plugin with its settings: the reduction, transform, rounding or tuning of a method.

    version, needs, stochastic and activation_aware are facts of the plugin's class, copied here by `make_part`
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


def make_part(kind: str, name: str, settings: Mapping[str, Any]) -> Part:
    """A part with these settings, which are complete, and with the facts of its plugin's source.

    kind: reduction, transform, rounding or tuning.
    A plugin that states `wraps = True` runs another plugin of its kind: its settings `base` and `base_settings` name that one and
    its settings. The needs of the part, and whether it is stochastic or depends on the activation scheme, are the union with those
    of the base. The version of the base is added to the settings as `base_version`, because keys must change with it.
    A plugin leaves out a statistic that its literal `unneeded` names, where all settings named there have the values given there.
    Raises ConfigError for an unknown plugin, and for a base that has a base of its own.
    """
    facts = plugins.facts(kind, name)
    own = dict(settings)
    needs = set(facts.get("needs", ()))
    for statistic, values in facts.get("unneeded", {}).items():
        if all(own.get(setting) == value for setting, value in values.items()):
            needs.discard(statistic)
    stochastic = facts.get("stochastic", False)
    activation_aware = facts.get("activation_aware", False)
    if facts.get("wraps", False):
        if plugins.facts(kind, own["base"]).get("wraps", False):
            raise ConfigError(
                f"{kind} {name}: base {own['base']} is itself a {kind} around another; name one without a base"
            )
        base = make_part(kind, own["base"], dict(own["base_settings"]))
        own["base_version"] = base.version
        needs |= set(base.needs)
        stochastic, activation_aware = (
            stochastic or base.stochastic,
            activation_aware or base.activation_aware,
        )
    return Part(
        name=name,
        settings=freeze(own),
        version=facts.get("version", 1),
        needs=tuple(sorted(needs)),
        stochastic=stochastic,
        activation_aware=activation_aware,
    )


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
    """A named recipe over four slots. All slots empty is the full-precision baseline, `none`.

    A reduction makes a smaller model first; the other three, `parts`, quantize that one, or the model itself.
    overrides: linears with a rounding of their own, each named by one override at most.
    """

    name: str
    transform: Part | None = None
    rounding: Part | None = None
    tuning: Part | None = None
    reduction: Part | None = None
    overrides: tuple[RoundingOverride, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """What turns the model, or the reduced one, into a checkpoint: the slots, then the other roundings of overrides."""
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
        return self.reduction is None and not self.parts

    @property
    def quantizes(self) -> bool:
        """Some part changes matrices in place. Without one the checkpoint is the model itself, or the reduced one."""
        return bool(self.parts)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that a pass gathers for the parts."""
        return tuple(sorted({need for part in self.parts for need in part.needs}))

    @property
    def needs_calibration(self) -> bool:
        """Some part that quantizes reads calibration data; the base of a fine-tune is none."""
        return bool(set(self.needs) - {BASE_WEIGHT})

    @property
    def needs_base(self) -> bool:
        """Some part compares the model with the base that it was fine-tuned from."""
        return BASE_WEIGHT in self.needs

    @property
    def all_needs(self) -> tuple[str, ...]:
        """`needs`, and those of the reduction."""
        own = self.reduction.needs if self.reduction is not None else ()
        return tuple(sorted({*self.needs, *own}))

    @property
    def uses_calibration(self) -> bool:
        """The cell reads calibration data, to quantize or for its reduction."""
        return bool(set(self.all_needs) - {BASE_WEIGHT})

    @property
    def reads_inputs(self) -> bool:
        """Some part wants to know of the blocks' inputs; gradients, and what a transform learns, are there before the walk."""
        return bool(set(self.needs) - {"tokens", "squared_gradient", BASE_WEIGHT})


@dataclass(frozen=True)
class Model:
    """A causal language model: a folder, a hub id, or the embedded demo.

    digest identifies the weights: a hash of the folder's files or the resolved commit of a hub id.
    dtype is the floating type in which the model is loaded, calibrated and evaluated.
    generation identifies a folder's generation_config.json (end tokens, penalties), which only texts that it writes depend on.
    base is where the model lies that this one was fine-tuned from ("" where that is not stated), base_digest its weights; only
    methods that store the difference of the two depend on them.
    """

    name: str
    source: str
    revision: str | None = None
    digest: str = ""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    generation: str = ""
    base: str = ""
    base_digest: str = ""


def base_of(model: Model) -> Model | None:
    """The model that a fine-tune came from, read in the fine-tune's dtype; None where none is named."""
    if not model.base:
        return None
    return Model(model.base, model.base, digest=model.base_digest, dtype=model.dtype)


@dataclass(frozen=True)
class WeightScheme:
    """How one weight matrix is stored.

    format      int, or a name of numerics/number_formats.py (nf4, fp8_e4m3, mxfp4, nvfp4, …); dense, sign, or delta: a budget
                of bits per weight that a method spends on the difference of a fine-tune and its base as it likes
    bits        2..8 for integers; what a format fixes (nf4: 4) must agree with it; 0.25..4 for delta
    group_size  input channels that share one scale; -1: one scale per output channel
    symmetric   no zero point; says nothing for formats other than int, which have none
    scale_dtype float16, bfloat16 or float32: the type in which scales (and float zero points) are stored and used;
                float8_e4m3: E4M3 numbers times one float32 per matrix; e8m0: powers of two, of MX formats;
                double_quantized: 8-bit codes in blocks of 256, of nf4 and fp4 (QLoRA)
    zero_point  of integer grids that are not symmetric: integer, one of the codes; or float, exact to scale_dtype
    sparsity    of methods that prune: a share between 0 and 1 ("0.5"), or "n:m", n kept of every m inputs; "": dense
    signed_scales  of symmetric integer grids: the entry of largest magnitude, with its sign, meets the lowest code, so that about
                half of the scales are negative (llama.cpp, AutoRound)
    """

    format: str = "int"
    bits: Annotated[float, Ge(0.25)] = 4
    group_size: int = -1
    symmetric: bool = False
    scale_dtype: ScaleType = "float16"
    zero_point: Literal["integer", "float"] = "integer"
    sparsity: str = ""
    signed_scales: bool = False

    def contradictions(self) -> list[str]:
        """Limits that no single field can state: each as "field value: reason"; empty if there are none."""
        found = []
        if self.group_size == 0 or self.group_size < -1:
            found.append(
                f"group_size {self.group_size}: neither -1 (per output channel) nor positive"
            )
        if self.format == "int" and not 1 <= self.bits <= 8:
            found.append(f"bits {self.bits}: integers have 1 to 8 bits")
        if self.format == "delta" and not 0.25 <= self.bits <= 4:
            found.append(f"bits {self.bits}: a delta has 0.25 to 4 bits per weight")
        if self.sparsity:
            try:
                read_sparsity(self.sparsity)
            except ValueError as error:
                found.append(f'sparsity "{self.sparsity}": {error}')
        if self.signed_scales and (self.format != "int" or not self.symmetric):
            found.append(
                "signed_scales true: they belong to symmetric integer grids; set symmetric"
            )
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
    """How keys and values are rounded: keys per channel over group_size tokens, values per token (KIVI), or to 8-bit floats.

    format       int; fp8_e4m3 or fp8_e5m2 have 8 bits and no groups, so bits, group_size and both axes are left as they are
    granularity  of fp8 scales: tensor (one for the keys and one for the values of a block), head (one per key-value head) or
                 token_head (one per token and head)
    scales       of fp8: static (largest magnitudes of the calibration windows), one (1: larger values saturate), or dynamic
                 (token_head only)
    queries      of fp8: queries are rounded too, with a scale of their own
    """

    bits: Annotated[int, Ge(1)] = 4
    group_size: Annotated[int, Ge(1)] = 32
    residual: int = 32  # most recent tokens kept in full precision
    key_axis: str = "channel"
    value_axis: str = "token"
    hadamard: bool = False  # queries and keys of each head times a Hadamard matrix before keys are rounded (QuaRot)
    format: Literal["int", "fp8_e4m3", "fp8_e5m2"] = "int"
    granularity: Literal["group", "tensor", "head", "token_head"] = "group"
    scales: Literal["dynamic", "static", "one"] = "dynamic"
    queries: bool = False

    @property
    def width(self) -> int:
        """Bits of one code, without scales."""
        return self.bits if self.format == "int" else 8

    @property
    def text(self) -> str:
        """What labels call it: "KV4", "KVfp8", "KVfp8_e5m2"."""
        return f"KV{self.bits if self.format == 'int' else self.format.removesuffix('_e4m3')}"


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
    return _remembered(cell, "_quantize_key", lambda: _quantize_key(cell))


def _remembered(owner: Any, name: str, make: Callable[[], T]) -> T:
    """make(), computed once for an object that never changes: a plan of 10,000 cells asks for 240,000 keys."""
    known = vars(owner)
    if name not in known:
        known[name] = make()
    return cast(T, known[name])


def _quantize_key(cell: Cell) -> str:
    method = cell.method
    identity: dict[str, Any] = {
        "model": _identity(
            cell.model,
            drop=(
                *("name", "source", "revision", "trust_remote_code", "generation"),
                *OF_THE_FINE_TUNE,
            ),
        ),
        "parts": parts_identity(method),
        "slots": [part is not None for part in (method.transform, method.rounding, method.tuning)],
    }
    if method.overrides:
        identity["roundings"] = [
            [method.parts.index(o.rounding), list(o.linears), list(o.blocks)]
            for o in method.overrides
        ]
    if method.reduction is not None:
        identity["reduction"] = reduction_key(cell)
    if method.quantizes:
        identity["weight"], identity["overrides"] = stored_scheme(cell)
    if method.needs_calibration:
        identity["calibration"] = _identity(cell.calibration, drop=("name", "source"))
        identity["inputs"] = cell.inputs
    if method.needs_base:
        identity["base"] = cell.model.base_digest
    if any(part.stochastic for part in method.parts):
        identity["seed"] = cell.seed
    if any(part.activation_aware for part in method.parts):
        identity["execution"] = _execution(cell.scheme)
    return digest(identity)


def holds_all_widths(method: Method) -> bool:
    """Whether a method's checkpoint holds several widths at once, and the bits of a scheme only say which of them is read.

    So says a literal `holds_all_widths` of the rounding's class: the setting, a number, that is not 0 where it does. A tuning
    starts from one width.
    """
    rounding = method.rounding
    if rounding is None or method.tuning is not None:
        return False
    facts = plugins.find("rounding").get(rounding.name)
    setting = "" if facts is None else facts.get("holds_all_widths", "")
    return bool(setting) and bool(dict(rounding.settings).get(setting))


def stored_scheme(cell: Cell) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the weight scheme and its overrides say of the checkpoint; without bits where it holds all widths."""
    weight = weight_identity(cell.scheme.weight)
    overrides = [_identity(o, drop=("activation",)) for o in cell.scheme.overrides if o.weight]
    if holds_all_widths(cell.method):
        del weight["bits"]
        overrides = [{**o, "weight": _without_bits(o["weight"])} for o in overrides]
    return weight, [override for override in overrides if override["weight"]]


def _without_bits(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "bits"}


def parts_identity(method: Method) -> list[dict[str, Any]]:
    """Name, version and settings of each part of a method: what of them changes numbers.

    Settings that came after keys existed are left out while they have their default: a literal `settings_added_later` of the
    plugin's class, {name: default}, read from its source; of the settings of a part's base alike.
    """
    found = []
    slots = [kind for kind in ("transform", "rounding", "tuning") if getattr(method, kind)]
    kinds = [*slots, *("rounding" for _ in method.parts[len(slots) :])]  # those of overrides
    for kind, part in zip(kinds, method.parts, strict=True):
        identity = _identity(part, drop=("needs", "stochastic", "activation_aware"))
        settings = _without_added_later(kind, part.name, identity["settings"])
        if "base_version" in settings:
            own = _without_added_later(kind, settings["base"], dict(settings["base_settings"]))
            settings["base_settings"] = own
        found.append({**identity, "settings": settings})
    return found


def _without_added_later(kind: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    facts = plugins.find(kind).get(name)
    added: Mapping[str, Any] = {} if facts is None else facts.get("settings_added_later", {})
    return {
        setting: value
        for setting, value in settings.items()
        if setting not in added or value != added[setting]
    }


def weight_identity(weight: WeightScheme) -> dict[str, Any]:
    """The fields of a weight scheme, without those that came after keys existed while they have their default."""
    younger, defaults = ("zero_point", "signed_scales", "sparsity"), WeightScheme()
    own: dict[str, Any] = to_json(weight)
    return {
        name: value
        for name, value in own.items()
        if name not in younger or value != getattr(defaults, name)
    }


def reduction_key(cell: Cell) -> str:
    """Identity of the smaller model that the cell's reduction makes; 64 hexadecimal digits. The cell must have a reduction."""
    part = cell.method.reduction
    assert part is not None, f"{cell.title} has no reduction"
    identity: dict[str, Any] = {
        "model": {"digest": cell.model.digest, "dtype": cell.model.dtype},
        "reduction": _identity(part, drop=("needs", "stochastic", "activation_aware")),
    }
    if part.needs:
        identity["calibration"] = _identity(cell.calibration, drop=("name", "source"))
    if part.stochastic:
        identity["seed"] = cell.seed
    return digest(identity)


def untuned(cell: Cell) -> Cell:
    """The cell whose checkpoint a tuned cell starts from: the same method without its tuning."""
    return dataclasses.replace(cell, method=dataclasses.replace(cell.method, tuning=None))


def cell_key(cell: Cell) -> str:
    """Identity of a cell: its checkpoint, how activations and KV cache are executed, and which width is read where the checkpoint
    holds several; 64 hexadecimal digits."""
    return _remembered(cell, "_cell_key", lambda: _cell_key(cell))


def _cell_key(cell: Cell) -> str:
    identity: dict[str, Any] = {
        "checkpoint": quantize_key(cell),
        "execution": _execution(cell.scheme),
    }
    if has_static_scales(cell.scheme):
        identity["calibration"] = _identity(cell.calibration, drop=("name", "source"))
    if holds_all_widths(cell.method):
        identity["widths"] = [
            cell.scheme.weight.bits,
            [to_json(o) for o in cell.scheme.overrides if o.weight],
        ]
    return digest(identity)


def has_static_scales(scheme: Scheme) -> bool:
    """Some activations, or the KV cache, have scales fixed from calibration data, which a cell then needs whatever its method."""
    if scheme.kv is not None and scheme.kv.scales == "static":
        return True
    if scheme.activation is None:
        return False
    return not scheme.activation.dynamic or any(
        dict(o.activation).get("dynamic") is False for o in scheme.overrides
    )


def score_key(cell: Cell, evaluation: Evaluation) -> str:
    """Identity of one evaluation of one cell; 64 hexadecimal digits. Where data lies is left out once its digest is known."""
    identity = {**_identity(evaluation, drop=("name", "generates"))}
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
    """The full-precision cell that this cell is compared with: same model, nothing reduced, nothing quantized."""
    return dataclasses.replace(
        cell,
        method=Method("none"),
        scheme=Scheme("full"),
        calibration=None,
        inputs="quantized",
        seed=0,
        variant="",
    )


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


# fields of a KV scheme that are younger than the keys, which leave them out at their defaults
YOUNGER_KV_FIELDS = ("format", "granularity", "scales", "queries")


def _kv_identity(kv: KVScheme | None) -> Any:
    """The residual's rule is 2 since a token attends before the cache is rounded; without a residual nothing changed."""
    if kv is None:
        return None
    defaults = KVScheme()
    drop = tuple(f for f in YOUNGER_KV_FIELDS if getattr(kv, f) == getattr(defaults, f))
    identity = _identity(kv, drop)
    return identity if kv.residual == 0 else {**identity, "residual_rule": 2}


def _identity(value: Any, drop: tuple[str, ...] = ()) -> Any:
    """The fields of a part of a cell as JSON, without the dropped ones. The same object every time: nobody changes it."""
    if value is None:
        return None
    known = _remembered(value, "_identities", dict[tuple[str, ...], dict[str, Any]])
    if drop not in known:
        known[drop] = {name: item for name, item in to_json(value).items() if name not in drop}
    return known[drop]
