"""A finished cell as a folder that other libraries load: config.json, safetensors in shards, tokenizer files.

What a layout (`harness/quantization/formats/<name>.py`) cannot express exactly is refused, with all reasons, before anything is
written. Tensors go out block by block; norms, biases, embeddings and heads as the transform left them, in the model's dtype.
The folder is written under a temporary name and then renamed. Peak memory: a shard and a block. A layout of adapters
(`formats/peft.py`) writes only the adapters, not the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness.core import plugins
from harness.core.cell import (
    Cell,
    cell_key,
    make_part,
    quantize_key,
    reduction_key,
    to_json,
    untuned,
)
from harness.core.errors import ConfigError, PlanError, StoreError, unknown_name
from harness.core.text import short_list
from harness.data import hub, model_folders
from harness.storage.atomic_write import share
from harness.storage.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from harness.core.shapes import Shapes
    from harness.quantization.formats.native import BlockContent
    from harness.quantization.formats.protocols import AdapterLayout, Description, Layout
    from harness.quantization.models.protocols import DecoderFamily, WeightLocation
    from harness.quantization.numerics.weights import QuantizedWeight


SHARD_BYTES = 4 * 2**30
PLAIN = "transformers"  # the layout of ordinary model folders
NO_SPARSE_ENGINE = (
    "no engine takes pruned matrices with rounded survivors any more (vLLM removed Sparse24 in pull request 36799; marlin_24 is "
    "deprecated); survivors that are not rounded (w16s50, w16s2of4) are ordinary weights with zeros: use -f transformers"
)
COPIED = (  # files of the model's folder
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
)


def layouts() -> list[str]:
    """Names of the layouts."""
    files = (Path(__file__).parent / "formats").glob("*.py")
    return sorted(
        path.stem
        for path in files
        if re.search(
            r"^class Layout\b(?!\(Protocol)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    )


def layout_of(name: str) -> Layout | AdapterLayout:
    """Raises ConfigError for an unknown name, or when the layout's library is not installed."""
    if name not in layouts():
        raise ConfigError(unknown_name("export format", name, layouts()))
    try:
        return cast(
            "Layout | AdapterLayout",
            importlib.import_module(f"harness.quantization.formats.{name}").Layout(),
        )
    except ImportError as error:
        raise ConfigError(
            f'export format "{name}" needs a library that cannot be imported here: {error}'
        ) from error


def _groups_follow_activations(cell: Cell) -> bool:
    """Whether groups of channels are formed in the order of activations, as the rounding's `reordered_groups` states.

    That literal maps settings to whether they are on when groups are reordered.
    """
    rounding = cell.method.rounding
    if rounding is None or cell.scheme.weight.group_size == -1:
        return False
    states = plugins.facts("rounding", rounding.name).get("reordered_groups", {})
    settings = dict(rounding.settings)
    return bool(states) and all(bool(settings.get(key)) == on for key, on in states.items())


def refusals(cell: Cell, shapes: Shapes, name: str) -> list[str]:
    """Why the cell's checkpoint cannot be exported, as far as its scheme and the model's shapes tell; reads no weights."""
    layout = layout_of(name)
    if cell.method.is_baseline:
        return ["nothing is quantized; use the model's own folder"]
    if not cell.method.quantizes:
        return (
            [] if name == PLAIN else [f"nothing is quantized; use -f {PLAIN}, an ordinary folder"]
        )
    reasons: dict[str, None] = {}
    if cell.scheme.kv is not None:
        reasons["the scheme rounds the KV cache, which is not part of a checkpoint"] = None
    if cell.method.needs_base:
        reasons |= dict.fromkeys(_difference_refusals(cell, name))
    if any(linear.expert for linear in shapes.linears):
        reasons["experts in one fused parameter have no linears of their own to store"] = None
    for block in range(shapes.blocks):
        for linear in shapes.linears:
            weight, activation = (
                cell.scheme.weight_for(block, linear.name),
                cell.scheme.activation_for(block, linear.name),
            )
            if not cell.method.needs_base:
                reasons |= dict.fromkeys(layout.scheme_reasons(weight, activation))
            if weight.sparsity and weight.format != "dense":
                reasons[NO_SPARSE_ENGINE] = None
    if (
        hasattr(layout, "write_adapters")
        and not cell.method.needs_base
        and (reason := _without_adapters(cell))
    ):
        reasons[reason] = None
    if not getattr(layout, "stores_group_order", True) and _groups_follow_activations(cell):
        reasons[
            "groups in the order of activations (act_order) are no longer supported; use static_groups=true"
        ] = None
    return list(reasons)


def base_alone(cell: Cell) -> Cell | None:
    """The cell with the base of a rounding around another in its place, where the base rounds the same matrices to the same codes.

    None for other roundings, for those whose base rounds something else (a literal `keeps_base = True` of the plugin's class says
    that it does not), and where the base read inputs behind blocks that the other one had changed.
    """
    rounding = cell.method.rounding
    if rounding is None or "base_version" not in dict(rounding.settings):
        return None
    if not plugins.facts("rounding", rounding.name).get("keeps_base", False):
        return None
    settings = dict(to_json(rounding)["settings"]["base_settings"])
    base = make_part("rounding", rounding["base"], settings)
    if base.needs and cell.inputs != "full_precision":
        return None
    base = dataclasses.replace(base, version=rounding["base_version"])
    method = dataclasses.replace(cell.method, name=base.name, rounding=base, tuning=None)
    return dataclasses.replace(cell, method=method)


def _without_adapters(cell: Cell) -> str:
    """Why no adapter of the cell can be written for matrices that another cell has; "" where one can."""
    if cell.method.tuning is not None or base_alone(cell) is not None:
        return ""
    rounding = cell.method.rounding
    facts = {} if rounding is None else plugins.facts("rounding", rounding.name).literals
    if not facts.get("wraps", False):
        return "nothing was tuned, so there is no adapter; a layout of quantized weights is what it needs"
    if not facts.get("keeps_base", False):
        return "the base rounds what the low-rank part leaves of a matrix, so no other checkpoint has the weights for this adapter"
    return (
        "the base was calibrated behind corrected blocks, so no other checkpoint has the weights for this adapter; "
        "use inputs=full_precision, or a base that needs no data"
    )


def _difference_refusals(cell: Cell, name: str) -> list[str]:
    """Why a fine-tune that is stored as a difference from its base cannot be exported."""
    rounding = cell.method.rounding
    assert rounding is not None, "differences are made by roundings"
    found = []
    if cell.scheme.activation is not None:
        found.append("the scheme rounds activations, which are no part of a difference")
    if name == "peft":
        reason = plugins.facts("rounding", rounding.name).get("no_adapter", "")
        found += [f"{reason}; use transformers"] if reason else []
    elif name != "transformers":
        found.append(
            "the checkpoint is a difference from a base, and engines that read this format hold no base beside a quantized matrix; "
            "use transformers, or peft for low ranks"
        )
    return found


@dataclass(frozen=True)
class Exported:
    """The result of an export. bytes: size of the weight files."""

    folder: Path
    format: str
    files: int
    bytes: int
    text: str


def export(
    store: Store, key: str, name: str, output: Path, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Write the cell of a key (or its first digits) to the folder `output`, which must not exist or be empty.

    Raises PlanError with every reason when the layout cannot express the checkpoint, StoreError when the cell is not quantized yet.
    """
    found = store.find(key)
    cell = store.cell(found)
    if cell is None:
        raise ConfigError(f"cell {key} has no readable cell.json; run its sweep again")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: is not an empty folder; name another")
    with _source(cell, store) as source:
        return _export(cell, store, name, output, source, shard_bytes)


@contextlib.contextmanager
def _source(cell: Cell, store: Store) -> Iterator[Path]:
    """The folder of the cell's model, or of the smaller one that its reduction made."""
    if cell.method.reduction is None:
        yield model_folders.model_folder(cell.model)
        return
    key = reduction_key(cell)
    if store.reduction(key) is None:
        raise StoreError(f"{cell.title}: its reduced model is not in {store.place}; run its sweep")
    with store.reading_reduced(key) as folder:
        yield folder


def _export(
    cell: Cell, store: Store, name: str, output: Path, source: Path, shard_bytes: int
) -> Exported:
    """Write a cell whose unquantized model lies in `source`."""
    import torch

    from harness.quantization.formats.protocols import AdapterLayout
    from harness.quantization.formats.weight_files import DTYPES
    from harness.quantization.models import family_of, read_config, shapes

    layout, data = layout_of(name), read_config(source)
    family = family_of(data)
    _refuse(cell, name, refusals(cell, shapes(source), name))
    if store.manifest(quantize_key(cell)) is None:
        raise StoreError(f"{cell.title}: is not quantized yet; run its sweep first")
    if not cell.method.quantizes:
        return _copy_reduced(cell, name, source, output)

    if isinstance(layout, AdapterLayout) and cell.method.needs_base:
        return _export_difference(cell, layout, source, store, name, output)
    if isinstance(layout, AdapterLayout):
        base = cell.model.source if hub.is_hub_id(cell.model.source) else str(source)
        return _export_adapters(
            cell, layout, family, family.config(data), store, name, output, base
        )
    dtype = DTYPES[cell.model.dtype]
    with torch.no_grad(), store.reading(quantize_key(cell)) as checkpoint:
        writing = _Writing(cell, layout, family, family.config(data), dtype, source, checkpoint)
        described, reasons = writing.survey()
        _refuse(cell, name, reasons + layout.model_reasons(described))
        settings = layout.quantization_config(described, writing.other_linears(described), dtype)
        with _written_aside(output) as aside:
            total, files = write_shards(aside, writing.tensors(), shard_bytes)
            config = {**data, "dtype": cell.model.dtype}
            if settings:
                config["quantization_config"] = settings
            config.pop("torch_dtype", None)
            if writing.unties_head:
                config["tie_word_embeddings"] = False
            write_json(aside / "config.json", config)
            for file, content in layout.files(settings).items():
                write_json(aside / file, content)
            for pattern in COPIED:
                for path in source.glob(pattern):
                    if path.is_file():
                        shutil.copyfile(path, aside / path.name)
    text = (
        f"{output}: {cell.title} ({cell_key(cell)[:12]}) as {name}, {files} weight file{'s' * (files > 1)}, {total / 1e6:,.1f} MB; "
        f"dtype {cell.model.dtype}"
    )
    return Exported(output, name, files, total, text)


def _copy_reduced(cell: Cell, name: str, source: Path, output: Path) -> Exported:
    """A reduced model that is not quantized: its folder, which is one of an ordinary model already."""
    with _written_aside(output) as aside:
        for path in source.iterdir():
            shutil.copyfile(path, aside / path.name)
        weights = [path.stat().st_size for path in aside.glob("*.safetensors")]
    text = (
        f"{output}: {cell.title} ({cell_key(cell)[:12]}) as {name}, {len(weights)} weight file{'s' * (len(weights) > 1)}, "
        f"{sum(weights) / 1e6:,.1f} MB; dtype {cell.model.dtype}"
    )
    return Exported(output, name, len(weights), sum(weights), text)


@contextlib.contextmanager
def _written_aside(output: Path) -> Iterator[Path]:
    """A temporary folder next to `output`, renamed to `output` when all is written."""
    aside = output.with_name(f".{output.name}.{os.getpid()}.aside")
    try:
        aside.mkdir(parents=True)
        yield aside
        share(aside)
        if output.exists():
            output.rmdir()
        aside.rename(output)
    except OSError as error:
        raise StoreError(f"{output}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _export_adapters(
    cell: Cell,
    layout: AdapterLayout,
    family: DecoderFamily,
    config: Any,
    store: Store,
    name: str,
    output: Path,
    source: str,
) -> Exported:
    """Export the adapters that a tuning or a rounding left. source: the unquantized model, a hub id or a folder."""
    from harness.quantization.formats.native import Checkpoint
    from harness.quantization.numerics.adapters import AdaptedWeight
    from harness.quantization.numerics.inputs import NAMES

    checkpoint = Checkpoint.open(store.checkpoint_folder(quantize_key(cell)))
    adapters: dict[str, AdaptedWeight] = {}
    reasons: dict[str, None] = {}
    for index in range(checkpoint.manifest["blocks"]):
        content = checkpoint.block(index)
        places = {
            location.name: location.parameter.rpartition(".")[0]
            for location in family.locations(config, index)
        }
        for linear, weight in content.weights.items():
            if isinstance(weight, AdaptedWeight):
                adapters[family.block_prefix(index) + places[linear]] = weight
        if any(key.rpartition(".")[2] in NAMES for key in content.dense):
            reasons["inputs that are transformed at run time"] = None
    if not adapters:
        reasons["it has no adapters: its tuning is merged into the stored weights"] = None
    _refuse(cell, name, list(reasons))
    tuning, beneath = cell.method.tuning, base_alone(cell)
    if tuning is not None:
        beneath = untuned(cell)
    assert beneath is not None, "refused"
    dropout = dict(tuning.settings).get("dropout", 0.0) if tuning is not None else 0.0
    with _written_aside(output) as aside:
        layout.write_adapters(aside, adapters, source, dropout)
        total = sum(path.stat().st_size for path in aside.glob("*.safetensors"))
    key, base = cell_key(cell)[:12], quantize_key(beneath)[:12]
    text = f"{output}: adapters of {cell.title} ({key}) as {name}, {total / 1e6:,.1f} MB; for the weights of checkpoint {base}"
    return Exported(output, name, 1, total, text)


def _export_difference(
    cell: Cell, layout: AdapterLayout, folder: Path, store: Store, name: str, output: Path
) -> Exported:
    """Export a difference of low rank as adapters of the base: exact, with every other tensor that differs beside them."""
    import torch

    from harness.quantization.formats.base_model import BaseModel
    from harness.quantization.formats.native import Checkpoint
    from harness.quantization.formats.weight_files import ModelWeights
    from harness.quantization.models import read_config
    from harness.quantization.numerics.deltas import DeltaWeight, LowRankWeight

    checkpoint = Checkpoint.open(store.checkpoint_folder(quantize_key(cell)))
    base = BaseModel.stated(cell, checkpoint.manifest)
    assert base is not None, "a cell of differences"
    reasons: dict[str, None] = {}
    changes: dict[str, LowRankWeight] = {}  # by module name
    matrices: set[str] = set()  # parameters
    for index in range(checkpoint.manifest["blocks"]):
        weights, prefix = checkpoint.block(index).weights, base.family.block_prefix(index)
        for location in base.locations(index):
            weight = weights[location.name]
            matrices.add(prefix + location.parameter)
            if not location.is_whole:
                reasons["matrices that share a parameter with others, which an adapter cannot"] = (
                    None
                )
            elif not isinstance(weight, DeltaWeight) or not isinstance(
                weight.change, LowRankWeight
            ):
                reasons["the difference is of full rank; use transformers"] = None
            else:
                changes[prefix + location.parameter.rpartition(".")[0]] = weight.change
    model = base.family.skeleton(base.family.config(read_config(folder)), base.dtype)
    own, saved = ModelWeights(folder, model), {}
    for parameter in (n for n, _ in model.named_parameters() if n not in matrices):
        ours, theirs = own.read(parameter, base.dtype, "cpu"), base.tensor(parameter)
        if theirs is None or theirs.shape != ours.shape:
            reasons[
                f"{parameter} has another shape than in the base, and PEFT cannot resize; use transformers"
            ] = None
        elif not torch.equal(ours, theirs):
            if parameter.rpartition(".")[0] in changes:
                reasons[
                    f"{parameter} differs from the base's, and an adapter holds no bias; use transformers"
                ] = None
            saved[parameter] = ours
    _refuse(cell, name, list(reasons))
    source = base.model.source
    with _written_aside(output) as aside:
        layout.write_differences(
            aside,
            changes,
            source if hub.is_hub_id(source) else str(base.weights.reader.folder),
            saved,
        )
        total = sum(path.stat().st_size for path in aside.glob("*.safetensors"))
    key, delta = cell_key(cell)[:12], checkpoint.manifest["delta"]
    text = (
        f"{output}: {cell.title} ({key}) as {name}, {total / 1e6:,.1f} MB, where the checkpoint takes "
        f"{(delta['bytes'] + delta['ends_bytes']) / 1e6:,.1f} MB; for the base {source}"
    )
    return Exported(output, name, 1, total, text)


def _refuse(cell: Cell, name: str, reasons: Sequence[str]) -> None:
    if reasons:
        listed = "\n".join(f"  {reason}" for reason in dict.fromkeys(reasons))
        raise PlanError(
            f"{cell.title}: cannot be exported as {name}; nothing was written\n{listed}"
        )


class _Writing:
    """One checkpoint on its way to a folder."""

    def __init__(
        self,
        cell: Cell,
        layout: Layout,
        family: Any,
        config: Any,
        dtype: Any,
        source: Path,
        checkpoint: Path,
    ) -> None:
        from harness.quantization.formats.base_model import BaseModel
        from harness.quantization.formats.native import Checkpoint

        self.cell, self.layout, self.family, self.config, self.dtype = (
            cell,
            layout,
            family,
            config,
            dtype,
        )
        self.checkpoint = Checkpoint.open(checkpoint)
        self.base = BaseModel.stated(cell, self.checkpoint.manifest)
        self.model = family.skeleton(config, dtype)
        self.blocks = family.blocks(self.model)
        from harness.quantization.formats.weight_files import ModelWeights
        from harness.quantization.models.protocols import tied

        self.weights = ModelWeights(source, self.model)
        own = self.weights.untied(dtype)
        self.tied = {name: of for name, of in tied(self.model).items() if name not in own}
        self.ends = self.checkpoint.ends()
        self.unties_head = bool(own) or any(name in self.ends for name in self.tied)

    def survey(self) -> tuple[dict[str, Description | None], list[str]]:
        """The layout's description of every linear, by module name, and reasons why some cannot be stored."""
        described: dict[str, Description | None] = {}
        found: dict[str, list[str]] = {}
        for index in range(len(self.blocks)):
            content = self._content(index)
            for name in content.dense:
                if name.rpartition(".")[2] in ("input_scale", "input_hadamard"):
                    found.setdefault("inputs that are transformed at run time", []).append(
                        f"block {index} {name}"
                    )
            for owner, members in self._owners(index).items():
                weight, reason = self._joined(index, owner, members, content.weights)
                reasons = (
                    [reason] if weight is None else self.layout.weight_reasons(weight, self.dtype)
                )
                for each in reasons:
                    found.setdefault(each, []).append(f"block {index} {owner}")
                if weight is not None and not reasons:
                    activation = self.cell.scheme.activation_for(index, members[0].name)
                    described[self.family.block_prefix(index) + owner] = self.layout.describe(
                        weight, activation
                    )
        return described, [f"{reason}: {short_list(where, 3)}" for reason, where in found.items()]

    def other_linears(self, described: Mapping[str, Description | None]) -> list[str]:
        from torch import nn

        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name not in described
        ]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the folder, by its name in the model."""
        inside = f"{self.family.blocks_name}."
        for name in self.model.state_dict():
            if name.startswith(inside):
                continue
            if name in self.ends:
                yield name, self.ends[name].to(self.dtype)
            elif name not in self.tied:
                yield name, self.weights.read(name, self.dtype, "cpu")
        for index, block in enumerate(self.blocks):
            content, prefix = self._content(index), self.family.block_prefix(index)
            owners = self._owners(index)
            stored = {location.parameter for members in owners.values() for location in members}
            for name in block.state_dict():
                if name not in stored:
                    tensor = content.dense.get(name)
                    tensor = (
                        self.weights.read(prefix + name, self.dtype, "cpu")
                        if tensor is None
                        else tensor
                    )
                    yield (
                        prefix + name,
                        tensor.to(self.dtype) if tensor.is_floating_point() else tensor,
                    )
            # a bias that the model lacked
            for name in sorted(content.dense.keys() - block.state_dict().keys()):
                yield prefix + name, content.dense[name].to(self.dtype)
            for owner, members in owners.items():
                weight, reason = self._joined(index, owner, members, content.weights)
                assert weight is not None, reason
                activation = self.cell.scheme.activation_for(index, members[0].name)
                for part, tensor in self.layout.pack_linear(weight, activation, self.dtype).items():
                    yield f"{prefix}{owner}.{part}", tensor

    def _content(self, index: int) -> BlockContent:
        from harness.quantization.formats.base_model import on_base

        return on_base(self.checkpoint.block(index), self.base, index)

    def _owners(self, index: int) -> dict[str, list[WeightLocation]]:
        owners: dict[str, list[WeightLocation]] = {}
        for location in self.family.locations(self.config, index):
            owners.setdefault(location.parameter.rpartition(".")[0], []).append(location)
        return owners

    def _joined(
        self,
        index: int,
        owner: str,
        members: Sequence[WeightLocation],
        weights: Mapping[str, QuantizedWeight],
    ) -> tuple[QuantizedWeight | None, str]:
        """The matrix of one module; its parts, where it is fused, below each other. None with the reason where there is no such."""
        from torch import nn

        module = self.blocks[index].get_submodule(owner)
        if not isinstance(module, nn.Linear) or any(
            location.expert is not None or location.transposed for location in members
        ):
            return None, "matrices that are no linear modules"
        if len(members) == 1 and members[0].is_whole:
            return weights[members[0].name], ""
        ordered = sorted(members, key=lambda location: location.rows or (0, 0))
        edges = [edge for location in ordered for edge in (location.rows or (0, 0))]
        if edges[1:-1:2] != edges[2::2] or (edges[0], edges[-1]) != (0, module.out_features):
            return None, "parts of a fused matrix that do not lie below each other"
        whole = _below_each_other([weights[location.name] for location in ordered])
        return whole, "parts of a fused matrix with different grids"


def _below_each_other(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Matrices of one input as one matrix; None where their layouts differ."""
    import torch

    from harness.quantization.numerics.deltas import DeltaWeight
    from harness.quantization.numerics.pruned_weights import is_unrounded
    from harness.quantization.numerics.weights import DenseWeight, ElementWeight, UniformWeight

    if all(isinstance(part, DeltaWeight) or is_unrounded(part) for part in parts):
        return DenseWeight(torch.cat([part.dequantize() for part in parts]))
    first = parts[0]
    rows = ("codes", "scale", "zero")
    if not isinstance(first, UniformWeight | ElementWeight) or any(
        type(part) is not type(first) for part in parts
    ):
        return None
    joined: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(first)):
        values = [getattr(part, name) for part in parts]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if tensors and len(tensors) < len(values):
            return None
        if not tensors and any(value != values[0] for value in values):
            return None
        if tensors and name in rows:
            if len({tensor.shape[1] for tensor in tensors}) > 1:
                return None
            joined[name] = torch.cat(tensors)
        elif tensors and not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            return None
    return dataclasses.replace(first, **joined)


def write_shards(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> tuple[int, int]:
    """Write safetensors of about shard_bytes each, and their index where there are several; bytes and files."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        save_file(waiting, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()
        size = 0

    for name, tensor in tensors:
        part = tensor.detach().cpu().contiguous()
        count = part.numel() * part.element_size()
        if waiting and size + count > shard_bytes:
            flush()
        waiting[name] = part
        size, total = size + count, total + count
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
    else:
        index: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            (folder / f"shard-{number}.safetensors").rename(folder / file)
            index |= dict.fromkeys(names, file)
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")), len(shards)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON value with sorted names, one per line."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
