"""The weight files of a model folder, read tensor by tensor: by their own names, or by the names of a model's parameters.

A file is opened for the requested tensors and closed again, so that its pages never count as the process's memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from harness.core.errors import ModelError
from harness.data.safetensors_headers import INDEX, weight_files
from harness.quantization.models import stored
from harness.quantization.models.protocols import tied

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class WeightReader:
    """names(), read(name, dtype, device) by the names in the files. Raises ModelError for a folder without readable safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self._file_of = {name: each.file for name, each in self.files.tensors.items()}

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
        return {
            name: 8 * stored.bytes // max(math.prod(stored.shape), 1)
            for name, stored in self.files.tensors.items()
        }


class ModelWeights:
    """The parameters and stored buffers of a model by its own names, read from the weight files of its folder.

    What transformers would load is what is read: its rules for names, its choice of files, its treatment of tied heads. Raises
    ModelError with every fault at once where the files do not fit the model (names, shapes, dtypes).
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.reader = WeightReader(folder)
        self.stored = stored.require(model, self.reader.files)
        self._tied = tied(model)

    def holds(self, name: str) -> bool:
        """Whether the files hold this parameter under its own name; a tied head may be held as the embeddings alone."""
        return name in self.stored.parts

    def read(self, name: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """A parameter or buffer of the model, a copy. Floating tensors are cast to dtype, others keep theirs.

        Of tied parameters of which the files hold one, that one is read for all.
        """
        held = next((each for each in self._same(name) if each in self.stored.parts), None)
        if held is None:
            raise ModelError(f"{self.reader.folder}: no weight file holds {name}")
        return self.stored.read(held, lambda part: self.reader.read(part, dtype, device))

    def untied(self, dtype: torch.dtype) -> set[str]:
        """Tied parameters that the files nevertheless hold with numbers of their own: transformers does not tie these.

        dtype: in which they are compared, that of the model.
        """
        return {
            name
            for name, of in self._tied.items()
            if self.holds(name)
            and self.holds(of)
            and not torch.equal(self.read(name, dtype), self.read(of, dtype))
        }

    def stored_bits(self) -> dict[str, int]:
        """Bits per number of each parameter as the files store it; those put together of several tensors are left out."""
        widths = self.reader.stored_bits()
        return {
            name: widths[parts.all()[0]]
            for name, parts in self.stored.parts.items()
            if parts.converter is None
        }

    def _same(self, name: str) -> list[str]:
        """The names under which a parameter may be held: its own, then those it is tied to."""
        source = self._tied.get(name, name)
        others = [target for target, of in self._tied.items() if of == source]
        return list(dict.fromkeys([name, source, *others]))


__all__ = ["DTYPES", "INDEX", "ModelWeights", "WeightReader"]
