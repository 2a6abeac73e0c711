"""The weight files of a model folder: one or many safetensors files, read tensor by tensor.

A file is opened for the requested tensors and closed again, so that its pages never count as the process's memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.core.errors import ModelError

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _is_own(file: object) -> bool:
    """Whether an index names a safetensors file that lies in its own folder."""
    return isinstance(file, str) and Path(file).name == file and file.endswith(SUFFIX)


class WeightReader:
    """names(), read(name, dtype, device). Raises ModelError for a folder without readable safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._find(folder)

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def read(self, name: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """One tensor, a copy in memory of its own. Floating tensors are cast to dtype, others keep theirs."""
        return self.read_many([name], dtype, device)[name]

    def read_many(
        self, names: Iterable[str], dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Several tensors; each file is opened once."""
        wanted = list(names)
        unknown = [name for name in wanted if name not in self._file_of]
        if unknown:
            raise ModelError(f"{self.folder}: no weight file holds {', '.join(unknown)}")
        found: dict[str, Tensor] = {}
        for path in sorted({self._file_of[name] for name in wanted}):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in wanted:
                        if self._file_of[name] == path:
                            tensor = file.get_tensor(name)
                            target = dtype if tensor.is_floating_point() else tensor.dtype
                            found[name] = tensor.to(device=device, dtype=target, copy=True)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read: {error}") from error
        return {name: found[name] for name in wanted}

    def stored_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in set(self._file_of.values()))

    def stored_bits(self) -> dict[str, int]:
        """Bits per number of each tensor as the files store it, from their headers."""
        widths: dict[str, int] = {}
        for path in sorted(set(self._file_of.values())):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    count = 1
                    for size in entry["shape"]:
                        count *= size
                    start, end = entry["data_offsets"]
                    widths[name] = 8 * (end - start) // max(count, 1)
        return widths

    @staticmethod
    def _find(folder: Path) -> dict[str, Path]:
        index = folder / INDEX
        if index.exists():
            try:
                listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise ModelError(f"{index}: is not an index of weight files: {error}") from error
            if not isinstance(listed, dict):
                raise ModelError(
                    f"{index}: is not an index of weight files: weight_map is no mapping"
                )
            # Somebody else wrote this file: a name with a folder in it could point anywhere on this machine.
            foreign = sorted({str(file) for file in listed.values() if not _is_own(file)})
            if foreign:
                raise ModelError(
                    f"{index}: names what is no safetensors file of this folder: {', '.join(foreign[:3])}; refused"
                )
            missing = sorted({file for file in listed.values() if not (folder / file).exists()})
            if missing:
                raise ModelError(
                    f"{folder}: weight files are missing: {', '.join(missing)}; download the model again"
                )
            return {name: folder / file for name, file in listed.items()}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = [
                path.name
                for kind in ("*.bin", "*.pt", "*.pth")
                for path in sorted(folder.glob(kind))
            ]
            if pickles:
                raise ModelError(
                    f"{folder}: only pickled weights ({', '.join(pickles[:3])}), which can run code when read; "
                    "convert them to safetensors (transformers: save_pretrained)"
                )
            raise ModelError(f"{folder}: no safetensors file; is this a model folder?")
        found: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    found.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: is not a readable safetensors file: {error}") from error
        return found
