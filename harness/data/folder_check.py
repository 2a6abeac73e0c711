"""One look at a model folder, before anything is started: config.json, weight files, tokenizer.

Everything that the folder says of itself is read here once, for plan, pass and evaluation alike: `read_config` is the one reader of
config.json, `look` returns all faults together. Loads without torch, reads no weights. What needs the architecture (names and
shapes of all tensors) is compared in `harness.quantization.models`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import ModelError
from harness.core.units import counted, size
from harness.data.safetensors_headers import WeightFiles, is_pointer, look_at_weights, pointer_fault

CONFIG = "config.json"
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of headers whose numbers are weights as they stand
# Any of these, or the two files of a byte-pair vocabulary, lets transformers build a tokenizer.
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.txt", "*.tiktoken", "tekken.json")
PAIRED_VOCABULARY = ("vocab.json", "merges.txt")
# Tokenizers of bytes or code points have no vocabulary.
WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
# Read with the tokenizer, each a JSON object.
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
LIMITS = {  # key of config.json -> largest value that is taken for meant
    "num_hidden_layers": 10_000,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**28,
}
_QUANTIZED = {  # quant_method -> how a copy in full precision is written, where that is possible
    "bitsandbytes": "load it with transformers, call model.dequantize() and save_pretrained()",
    "compressed-tensors": "load it with transformers and CompressedTensorsConfig(run_compressed=False), then save_pretrained()",
    "fp8": "load it with transformers and FineGrainedFP8Config(dequantize=True), then save_pretrained()",
    "mxfp4": "load it with transformers and Mxfp4Config(dequantize=True), then save_pretrained()",
}


@dataclass(frozen=True)
class FolderLook:
    """What one look at a model folder found.

    config   the content of config.json; None where it cannot be used
    weights  the weight files with their headers
    faults   every reason why the model cannot be used, each with file and remedy
    facts    (subject, what was found), for people
    """

    config: Mapping[str, Any] | None
    weights: WeightFiles
    faults: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def look(folder: Path) -> FolderLook:
    """All that a folder's files say without the architecture. Raises nothing."""
    faults: list[str] = []
    facts: list[tuple[str, str]] = []
    config: dict[str, Any] | None = None
    try:
        config = read_config(folder)
        facts.append((CONFIG, _described(config)))
    except ModelError as error:
        faults.append(str(error))
    weights = look_at_weights(folder)
    faults += weights.faults
    if weights.files:
        dtypes = sorted({tensor.dtype for tensor in weights.tensors.values()})
        total = sum(tensor.bytes for tensor in weights.tensors.values())
        facts.append(
            (
                "weights",
                f"{counted(len(weights.files), 'file')}, {counted(len(weights.tensors), 'tensor')} of {', '.join(dtypes)}, "
                f"{size(total)}",
            )
        )
    if weights.ignored:
        facts.append(("ignored", f"{', '.join(weights.ignored)}: not read, as by transformers"))
    if (folder / "adapter_config.json").is_file():
        faults.append(
            f"{folder / 'adapter_config.json'}: the folder holds an adapter, which transformers would apply and the harness does "
            "not; merge it (peft: merge_and_unload, then save_pretrained) or remove its files"
        )
    tokenizer, wrong = _tokenizer(folder)
    faults += wrong
    if tokenizer:
        facts.append(("tokenizer", tokenizer))
    return FolderLook(config, weights, tuple(faults), tuple(facts))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises ModelError where it is missing, no JSON object, or holds values that no model can have, and for a checkpoint that is
    stored quantized: its numbers are codes, which must never be taken for weights.
    """
    path = folder / CONFIG
    if is_pointer(path):
        raise ModelError(pointer_fault(path))
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: cannot be read as a model's config: {error}; download it again"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path}: cannot be read as a model's config: it holds {json.dumps(content)[:60]} where a JSON object belongs; "
            "download it again"
        )
    faults = [*_value_faults(content), *_quantization_faults(content)]
    if faults:
        raise ModelError("; ".join(f"{path}: {fault}" for fault in faults))
    return content


def is_complete(folder: Path) -> bool:
    """Whether weights and tokenizer are all here, as they are not in a snapshot of the hub that is only begun."""
    return not look_at_weights(folder).absent and bool(_tokenizer(folder)[0])


def context_length(config: Mapping[str, Any]) -> int | None:
    """Positions that a model was made for, from its config; None where that does not say."""
    inner = config.get("text_config")
    both = {**config, **(inner if isinstance(inner, dict) else {})}
    for name in CONTEXT_KEYS:
        if isinstance(both.get(name), int):
            return int(both[name])
    return None


def _described(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or ["no architecture named"]
    parts = [f"{config.get('model_type')} ({', '.join(named)})"]
    inner: Mapping[str, Any] = config.get("text_config") or config
    if "num_hidden_layers" in inner:
        parts.append(f"{inner['num_hidden_layers']} blocks")
    length = context_length(config)
    return ", ".join([*parts, f"{length} positions"] if length else parts)


def _value_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Values that cannot be meant, with their keys."""
    for key, value in _leaves("", config):
        if isinstance(value, float) and math.isnan(value):
            yield f"{key} is NaN; write the number that the model was trained with"
    kind, named = config.get("model_type"), config.get("architectures")
    if kind is not None and not isinstance(kind, str):
        yield f"model_type is {json.dumps(kind)}, no name; write the model's type, such as llama"
    if named is not None and not (
        isinstance(named, list) and all(isinstance(each, str) for each in named)
    ):
        yield f"architectures is {json.dumps(named)}, no list of names; write one such as LlamaForCausalLM"
    inner = config.get("text_config")
    if inner is not None and not isinstance(inner, dict):
        yield f"text_config is {json.dumps(inner)[:60]}, no object; download the file again"
    parts: dict[str, Any] = {"": config, "text_config.": inner}
    for where, part in parts.items():
        for key, most in LIMITS.items() if isinstance(part, dict) else ():
            value = part.get(key)
            numbers = value if isinstance(value, list) else [value]  # a list: one number per block
            if value is None or all(type(n) is int and 1 <= n <= most for n in numbers):
                continue
            yield f"{where}{key} is {json.dumps(value)[:60]}; a whole number from 1 to {most} belongs there"
    weights = config.get("transformers_weights")
    if weights is not None:
        yield (
            f"transformers_weights names {json.dumps(weights)[:60]} as the weights, which the harness does not follow; rename the "
            "file to model.safetensors and remove the key"
        )


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{prefix}[{index}]", inner)
    else:
        yield prefix, value


def _quantization_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """A checkpoint that is stored in a quantized form, by what its config says of it."""
    places: list[tuple[str, Any]] = [("", config)]
    places += [(f"{key}.", part) for key, part in config.items() if key.endswith("_config")]
    for where, part in places:
        for key in ("quantization_config", "compression_config"):
            if not isinstance(part, dict) or part.get(key) is None:
                continue
            settings = part[key]
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            if key == "compression_config":
                method = method or "compressed-tensors"
            method = method or "a form that it does not name"
            way = _QUANTIZED.get(str(method).replace("_", "-"))
            advice = f", or write one: {way}" if way else ""
            yield (
                f"{where}{key} says that the weights are stored quantized ({method}): they are codes, not the model's weights. "
                f"Name the full-precision model behind it{advice}"
            )


def _tokenizer(folder: Path) -> tuple[str, list[str]]:
    """The file that the tokenizer is built from, and what is wrong with it and the files beside it."""
    found = sorted(path for pattern in TOKENIZERS for path in folder.glob(pattern))
    if all((folder / name).is_file() for name in PAIRED_VOCABULARY):
        found += [folder / name for name in PAIRED_VOCABULARY]
    beside = [folder / name for name in BESIDE if (folder / name).is_file()]
    faults = [pointer_fault(path) for path in [*found, *beside] if is_pointer(path)]
    for path in [*found, *beside]:
        if path.suffix == ".json" and not is_pointer(path):
            faults += _json_fault(path)
    if not found and not faults and _needs_no_vocabulary(folder / "tokenizer_config.json"):
        found = [folder / "tokenizer_config.json"]
    if not found:
        faults.append(
            f"{folder}: no tokenizer (none of {', '.join(TOKENIZERS)}, {' with '.join(PAIRED_VOCABULARY)}); copy the tokenizer's "
            "files of the same model into it"
        )
    return ", ".join(path.name for path in found), faults


def _needs_no_vocabulary(settings: Path) -> bool:
    """Whether a tokenizer_config.json, without faults, names a tokenizer of bytes or one that brings its own code."""
    if not settings.is_file():
        return False
    content = json.loads(settings.read_text(encoding="utf-8"))
    return content.get("tokenizer_class") in WITHOUT_VOCABULARY or bool(content.get("auto_map"))


def _json_fault(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{path}: is no readable JSON: {error}; download it again"]
    if not isinstance(content, dict):
        return [
            f"{path}: holds {json.dumps(content)[:60]} where a JSON object belongs; download it again"
        ]
    return []
