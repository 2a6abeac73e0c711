"""The harness's own checkpoint: exactly what each method stores, block by block.

    fingerprint.json            what the checkpoint is of; written first, and compared when a pass resumes
    seconds.json                time spent so far, so that a resumed pass reports all of it; no part of the checkpoint
    block-00000.safetensors     the packed tensors of one block: "<linear>:<part>", and "dense:<name>" for what a transform changed
    block-00000.json            kind, shape and meta of each linear, size and SHA-256 of the file above, the block's report
    ends.safetensors, .json     changed tensors outside the blocks, where there are any
    learned.safetensors, .json  tensors that a transform learned from the whole model before its blocks were rewritten, if any
    manifest.json               written last: a folder with it is complete

Every file is written under a temporary name and renamed; a block is finished once its .json exists. Reading
verifies size and SHA-256 of tensors, and of the .json of blocks where the manifest has them (since 2026-11-23).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harness.core import plugins
from harness.core.errors import StoreError
from harness.quantization.numerics.weights import QuantizedWeight

log = logging.getLogger(__name__)

VERSION = 1
NUMERICS = Path(__file__).parents[1] / "numerics"
DENSE = "dense:"


@dataclass(frozen=True)
class BlockContent:
    """One block read back. dense: other parameters of the block that the transform changed, by their name within it."""

    weights: dict[str, QuantizedWeight]
    dense: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class CheckpointWriter:
    """Writes a checkpoint, or goes on with one that was interrupted.

    Raises StoreError when the folder holds a checkpoint with another fingerprint, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        changed: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """changed: called with every file that was written or removed, in that order, so that a remote store mirrors the folder."""
        self.folder, self._changed = folder, changed
        self.fingerprint = json.loads(json.dumps(fingerprint))
        path = folder / "fingerprint.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be made: {error}") from error
        if path.exists():
            held = _read_json(path)
            if held != self.fingerprint:
                names = sorted(
                    k
                    for k in held.keys() | self.fingerprint.keys()
                    if held.get(k) != self.fingerprint.get(k)
                )
                differences = "; ".join(
                    f"{k}: {held.get(k)!r} in the folder, {self.fingerprint.get(k)!r} expected"
                    for k in names
                )
                raise StoreError(
                    f"{folder}: holds another checkpoint ({differences}); use another folder, or delete this one"
                )
        else:
            self._write(path, _json(self.fingerprint))

    def finished_blocks(self) -> int:
        """How many blocks, counted from the first, are complete in the folder."""
        count = 0
        while (self.folder / f"{_block(count)}.json").exists():
            count += 1
        return count

    def write_block(
        self,
        index: int,
        weights: Mapping[str, QuantizedWeight],
        dense: Mapping[str, Tensor],
        report: Mapping[str, Any],
    ) -> None:
        """Store one block. dense: changed parameters besides the quantized matrices; report: JSON values, the same on every run."""
        tensors: dict[str, Tensor] = {DENSE + name: tensor for name, tensor in dense.items()}
        entries: dict[str, Any] = {}
        for name, weight in weights.items():
            parts, meta = weight.pack()
            size = sum(part.numel() * part.element_size() for part in parts.values())
            tensors |= {f"{name}:{part}": tensor for part, tensor in parts.items()}
            entries[name] = {
                "kind": weight.kind,
                "defined_in": _home(weight),
                "shape": list(weight.shape),
                "bytes": size,
                "meta": meta,
            }
            if weight.widths:
                entries[name]["widths"] = {
                    str(bits): weight.at(bits).stored_bytes for bits in weight.widths
                }
            if weight.contained:
                entries[name]["contains"] = [
                    [inner.kind, _home(inner)] for inner in weight.contained
                ]
        self._store(_block(index), tensors, {"linears": entries, "report": dict(report)})

    def read_block(self, index: int, device: str | torch.device = "cpu") -> BlockContent:
        """A finished block, verified, its tensors on the device."""
        return _read_block(self.folder, index, device)

    def write_ends(self, dense: Mapping[str, Tensor]) -> None:
        """Store changed tensors outside the blocks, by their names in the model."""
        self._store("ends", dict(dense), {})

    def write_learned(self, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors that the transform learned from the whole model, for a pass that resumes."""
        self._store("learned", dict(tensors), {})

    def learned(self) -> dict[str, Tensor] | None:
        """The tensors that the transform of an earlier pass learned, verified; None where there are none."""
        path = self.folder / "learned.json"
        return (
            _read_tensors(path.with_suffix(".safetensors"), _read_json(path)["file"])
            if path.exists()
            else None
        )

    def seconds(self) -> float:
        """Time that earlier passes spent on this checkpoint."""
        path = self.folder / "seconds.json"
        return float(_read_json(path)) if path.exists() else 0.0

    def write_seconds(self, seconds: float) -> None:
        """Remember the time spent so far, for a pass that resumes."""
        self._write(self.folder / "seconds.json", _json(seconds))

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a checkpoint that is complete already; a damaged one counts as missing, as for the store."""
        path = self.folder / "manifest.json"
        try:
            return dict(_read_json(path)) if path.exists() else None
        except (StoreError, TypeError, ValueError):
            log.warning("%s is damaged, and written again", path)
            return None

    def finish(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Write manifest.json and return it.

        report: JSON values for the manifest; of them `parameters` (of the whole model) and `unquantized_bits` (bits that the
        parameters outside the quantized matrices take as the model stores them) give the sizes; `original_parameters` are those
        of the model before a reduction, where there was one. `delta`: of differences from a base, the bytes of the tensors outside
        the matrices that differ from it, and of the whole fine-tune.
        """
        texts = [
            _read(self.folder / f"{_block(index)}.json") for index in range(self.finished_blocks())
        ]
        blocks = [
            _parsed(text, self.folder / f"{_block(index)}.json") for index, text in enumerate(texts)
        ]
        linears = [
            {"block": i, "linear": name, **e}
            for i, block in enumerate(blocks)
            for name, e in block["linears"].items()
        ]
        quantized_bytes = sum(entry["bytes"] for entry in linears)
        quantized_weights = sum(entry["shape"][0] * entry["shape"][1] for entry in linears)
        total_bits = 8 * quantized_bytes + report["unquantized_bits"]
        files = {f"{_block(i)}.safetensors": block["file"] for i, block in enumerate(blocks)}
        files |= {f"{_block(i)}.json": _identity(text) for i, text in enumerate(texts)}
        for stem in ("ends", "learned"):
            if (self.folder / f"{stem}.json").exists():
                files[f"{stem}.safetensors"] = _read_json(self.folder / f"{stem}.json")["file"]
        manifest = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "blocks": len(blocks),
            "linears": [
                {
                    key: entry[key]
                    for key in ("block", "linear", "kind", "shape", "bytes", "widths")
                    if key in entry
                }
                for entry in linears
            ],
            "files": files,
            "bits_per_weight": (8 * quantized_bytes / quantized_weights)
            if linears
            else total_bits / report["parameters"],
            "bits_per_weight_total": total_bits / report["parameters"],
            **(
                {"bits_per_original_weight": total_bits / report["original_parameters"]}
                if "original_parameters" in report
                else {}
            ),
            "stored_bytes": -(-total_bits // 8),
            "layer_errors": [
                {"block": i, "linear": name, **errors}
                for i, block in enumerate(blocks)
                for name, errors in block["report"].get("linears", {}).items()
            ],
            "notes": {
                str(i): block["report"]["notes"]
                for i, block in enumerate(blocks)
                if block["report"].get("notes")
            },
            **report,
        }
        if "delta" in report:
            ends, whole = report["delta"]["ends_bytes"], report["delta"]["fine_tune_bytes"]
            manifest["delta"] = {
                **report["delta"],
                "bytes": quantized_bytes,
                "ratio": whole / max(1, quantized_bytes + ends),
            }
        self._write(self.folder / "manifest.json", _json(manifest))
        (self.folder / "seconds.json").unlink(missing_ok=True)
        self._changed(self.folder / "seconds.json")
        return manifest

    def _store(self, stem: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        self._write(self.folder / f"{stem}.safetensors", data)
        description["file"] = _identity(data)
        self._write(self.folder / f"{stem}.json", _json(description))

    def _write(self, path: Path, data: bytes) -> None:
        _write(path, data)
        self._changed(path)


class Checkpoint:
    """A complete checkpoint. manifest: sizes, kinds, errors and provenance; block(i) and ends() read tensors."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises StoreError when the checkpoint is incomplete, or written by a newer harness."""
        path = folder / "manifest.json"
        if not path.exists():
            raise StoreError(
                f"{folder}: has no manifest.json, so the checkpoint is not complete; run the sweep again to finish it"
            )
        manifest = _read_json(path)
        if manifest.get("version") != VERSION:
            raise StoreError(
                f"{path}: version {manifest.get('version')!r} of the format; this harness reads version {VERSION}"
            )
        return cls(folder, manifest)

    def block(self, index: int, device: str | torch.device = "cpu") -> BlockContent:
        """One block, verified against the manifest, its tensors on the device."""
        return _read_block(self.folder, index, device, self.manifest["files"])

    def ends(self) -> dict[str, Tensor]:
        """Changed tensors outside the blocks; empty when there are none."""
        entry = self.manifest["files"].get("ends.safetensors")
        return {} if entry is None else _read_tensors(self.folder / "ends.safetensors", entry)


def _read_block(
    folder: Path,
    index: int,
    device: str | torch.device = "cpu",
    files: Mapping[str, Any] | None = None,
) -> BlockContent:
    """files: of the manifest; None while there is none."""
    path, known = folder / f"{_block(index)}.json", files or {}
    description = _parsed(_read(path, known.get(path.name)), path)
    tensors_path = path.with_suffix(".safetensors")
    stored = _read_tensors(
        tensors_path, description["file"] if files is None else files[tensors_path.name]
    )
    # layouts dequantize where a pass would
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    weights: dict[str, QuantizedWeight] = {}
    for name, linear in description["linears"].items():
        parts = {
            key.removeprefix(f"{name}:"): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}:")
        }
        for kind, defined_in in linear.get("contains", ()):
            _kind(kind, defined_in, folder)
        weights[name] = _kind(linear["kind"], linear["defined_in"], folder).unpack(
            parts, linear["meta"]
        )
    dense = {
        key.removeprefix(DENSE): tensor for key, tensor in tensors.items() if key.startswith(DENSE)
    }
    return BlockContent(weights, dense, description["report"])


def _home(weight: QuantizedWeight) -> str:
    """The name of the file that defines a layout."""
    return type(weight).__module__.rpartition(".")[2]


def _kind(kind: str, defined_in: str, folder: Path) -> type[QuantizedWeight]:
    """The class of a layout; one of a method, or of numerics that several methods share, is registered by importing its file."""
    if kind not in QuantizedWeight.kinds:
        if defined_in in {path.stem for path in NUMERICS.glob("*.py")}:
            importlib.import_module(f"harness.quantization.numerics.{defined_in}")
        for part in ("rounding", "transform", "tuning"):
            if defined_in in plugins.find(part):
                plugins.load(part, defined_in)
    if kind not in QuantizedWeight.kinds:
        raise StoreError(
            f'{folder}: the layout "{kind}" is defined in "{defined_in}", which is not installed here'
        )
    return QuantizedWeight.kinds[kind]


def _read_tensors(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    data = _read(path, entry)
    try:
        return load(data)
    except SafetensorError as error:
        raise StoreError(f"{path}: is not a safetensors file: {error}") from error


def _block(index: int) -> str:
    return f"block-{index:05}"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _identity(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read(path: Path, entry: Mapping[str, Any] | None = None) -> bytes:
    """A file, of the size and SHA-256 of its entry where there is one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read: {error}; delete {path.parent} and run the sweep again"
        ) from error
    if entry is not None and _identity(data) != {
        "bytes": entry["bytes"],
        "sha256": entry["sha256"],
    }:
        raise StoreError(
            f"{path}: is damaged ({len(data)} bytes, {entry['bytes']} written; or another SHA-256); "
            f"delete {path.parent} and run the sweep again"
        )
    return data


def _parsed(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise StoreError(
            f"{path}: is damaged: {error}; delete {path.parent} and run the sweep again"
        ) from error


def _read_json(path: Path) -> Any:
    return _parsed(_read(path), path)


def _write(path: Path, data: bytes) -> None:
    """Write to a neighbour and rename; a kill leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StoreError(f"{path}: cannot be written: {error}") from error


__all__ = ["BlockContent", "Checkpoint", "CheckpointWriter"]
