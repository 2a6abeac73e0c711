"""Which safetensors files of a folder hold a model's weights, and what their headers say of each tensor.

The files are chosen as transformers chooses them: model.safetensors, else the shards that model.safetensors.index.json names. Any
other *.safetensors file beside them (an older checkpoint, a consolidated copy, an adapter) is ignored. A name is looked up in the
headers, never in the index, which serves to find the shards alone. Headers take about 0.1 ms a file; no weights are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer file of Git LFS begins
HEADER_LIMIT = 100_000_000  # bytes; the format allows no larger header
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a header describes it. dtype: in the format's own names ("F32", "BF16", "I8", …); bytes: its size."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    files     that count, sorted by name
    tensors   of these files, by name
    ignored   names of other *.safetensors files of the folder
    faults    every reason why the weights cannot be read, each with its file and a remedy
    absent    whether files are missing, as they are while a download is not complete
    """

    files: tuple[Path, ...] = ()
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    absent: bool = False


def weight_files(folder: Path) -> WeightFiles:
    """The weight files of a folder. Raises ModelError with every fault at once."""
    found = look_at_weights(folder)
    if found.faults:
        raise ModelError("; ".join(found.faults))
    return found


def look_at_weights(folder: Path) -> WeightFiles:
    """The weight files of a folder with all faults, raising nothing."""
    present = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
    if SINGLE in present:
        names, faults = [SINGLE], list[str]()
    elif (folder / INDEX).exists():
        names, faults = _shards(folder / INDEX)
    else:
        return WeightFiles(ignored=tuple(present), faults=(_nothing(folder, present),), absent=True)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        faults.append(
            f"{folder}: weight files are missing: {', '.join(missing)}, which {INDEX} names; download the model again"
        )
    tensors: dict[str, StoredTensor] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name in missing:
            continue
        try:
            header = read_header(folder / name)
        except ModelError as error:
            faults.append(str(error))
            continue
        for tensor, stored in header.items():
            if tensor in tensors:
                twice.setdefault((tensors[tensor].file.name, name), []).append(tensor)
            tensors[tensor] = stored
    faults += [
        f"{folder}: {first} and {second} both hold {summary(held)}; remove it from one of them"
        for (first, second), held in twice.items()
    ]
    ignored = tuple(name for name in present if name not in names)
    files = tuple(folder / name for name in names if name not in missing)
    return WeightFiles(files, tensors, ignored, tuple(faults), bool(missing))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, from its header.

    Raises ModelError for a file that is a pointer of Git LFS, truncated, or not in the safetensors format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(POINTER))
            if start == POINTER:
                raise ModelError(pointer_fault(path))
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > HEADER_LIMIT:
                raise ModelError(
                    f"{path}: is not a readable safetensors file; download it again, or convert it with save_pretrained of "
                    "transformers"
                )
            if 8 + length > size:
                raise ModelError(
                    f"{path}: is truncated within its header, not a readable safetensors file ({size} bytes); download it again"
                )
            file.seek(8)
            content = json.loads(file.read(length))
        entries = {name: entry for name, entry in content.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size:
            what = "is truncated" if size < end else "is longer than its header says"
            raise ModelError(
                f"{path}: {what}: {size} bytes where the header describes {end}; download it again"
            )
        with safe_open(path, framework="np"):  # the library's own check of the whole header
            pass
        return {
            name: StoredTensor(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        }
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelError(
            f"{path}: is not a readable safetensors file: {error}; download it again"
        ) from error


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS in place of the file itself."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def pointer_fault(path: Path) -> str:
    """What to do about a pointer file."""
    return (
        f"{path}: is a pointer of Git LFS, not the file itself, so no readable safetensors file or JSON; "
        f"fetch it with: git -C {path.parent} lfs pull"
    )


def summary(names: Iterable[str], most: int = 6) -> str:
    """Names of tensors with block and expert numbers gathered: "model.layers.0-3.self_attn.q_proj.bias, lm_head.weight".

    most: patterns that are written out; the rest is counted.
    """
    patterns: dict[tuple[str, ...], list[list[int]]] = {}
    for name in names:
        parts = re.split(r"(?<=\.)(\d+)(?=\.)", name)  # text, number, text, …
        patterns.setdefault(tuple(parts[::2]), []).append([int(part) for part in parts[1::2]])
    texts = []
    for pattern, found in patterns.items():
        numbers = [_ranges(column) for column in zip(*found, strict=True)]
        texts.append("".join(a + b for a, b in zip(pattern, [*numbers, ""], strict=True)))
    rest = f" and {len(texts) - most} more kinds" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def _ranges(numbers: Iterable[int]) -> str:
    """ "0-3,7" of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _shards(index: Path) -> tuple[list[str], list[str]]:
    """The shards that an index names, sorted, and what is wrong with it."""
    advice = "download it again"
    if is_pointer(index):
        return [], [pointer_fault(index)]
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"{index}: is not an index of weight files: {error}; {advice}"]
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        what = (
            "weight_map is no mapping"
            if isinstance(content, dict)
            else f"holds a JSON {_kind(content)} where an object with weight_map belongs"
        )
        return [], [f"{index}: is not an index of weight files: {what}; {advice}"]
    # Somebody else wrote this file: a name with a folder in it could point anywhere on this machine.
    foreign = sorted({str(file) for file in listed.values() if not _is_own(file)})
    faults = []
    if foreign:
        faults.append(
            f"{index}: names what is no safetensors file of this folder: {', '.join(foreign[:3])}; refused"
        )
    if not listed:
        faults.append(f"{index}: its weight_map names no file; {advice}")
    if not isinstance(content.get("metadata"), dict):
        faults.append(
            f'{index}: lacks the object "metadata", without which transformers reads no index; add "metadata": {{}}'
        )
    return sorted({file for file in listed.values() if _is_own(file)}), faults


def _kind(value: Any) -> str:
    """The name of a value's kind in JSON."""
    kinds = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _is_own(file: object) -> bool:
    """Whether an index names a safetensors file that lies in its own folder."""
    return isinstance(file, str) and Path(file).name == file and file.endswith(SUFFIX)


def _nothing(folder: Path, present: list[str]) -> str:
    """Why a folder without model.safetensors and without an index cannot be read."""
    shards = [name for name in present if _SHARD.search(name)]
    if shards:
        count = int(_SHARD.search(shards[0])[1])  # type: ignore[index]
        gone = f", and {count - len(shards)} of {count} shards" if len(shards) < count else ""
        return f"{folder}: weight files are missing: {INDEX}{gone}; download the model again"
    if present:
        return (
            f"{folder}: no {SINGLE} and no {INDEX}, which are what transformers reads; {', '.join(present[:3])} "
            f"{'is' if len(present) == 1 else 'are'} ignored. Rename the file of the model's weights to {SINGLE}"
        )
    pickles = [path.name for kind in PICKLES for path in sorted(folder.glob(kind))]
    if pickles:
        return (
            f"{folder}: only pickled weights ({', '.join(pickles[:3])}), which can run code when read; "
            "convert them to safetensors (transformers: save_pretrained)"
        )
    return f"{folder}: no safetensors file; is this a model folder? Download the model again"
