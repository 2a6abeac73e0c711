"""Every check of a cell before it runs, done once per distinct question.

Answers that follow from files and code alone are kept between processes (`data.kept`), so that a plan that was made before
imports neither torch nor transformers: the shapes of a model, and what methods, formats and schemes say of them. Refusals by
an evaluation are asked again every time, because a person repairs them outside of what a question holds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from os.path import isabs
from pathlib import Path
from typing import Any

from harness.core import plugins
from harness.core.cell import (
    Calibration,
    Cell,
    Evaluation,
    Model,
    Part,
    Scheme,
    base_of,
    from_json,
    has_static_scales,
    to_json,
)
from harness.core.errors import HarnessError
from harness.core.shapes import Shapes
from harness.core.sweep import Runtime
from harness.core.text import texts_in
from harness.core.units import bytes_of, counted, size
from harness.data import folder_check, hub, kept, model_folders, texts
from harness.data.kept import Book
from harness.planning import resources
from harness.planning.resources import (
    DTYPE_BYTES,
    MEMORY_SHARE,
    T,
    gpu_fraction,
    measures_device,
    uses_gpu,
)


class Checker:
    """Checks the parts of cells, each distinct question once: 1,000 cells are a few models, methods and schemes."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._answers: dict[Hashable, Any] = {}
        self._books: dict[Model, Book] = {}

    def reasons(self, cell: Cell) -> list[str]:
        found = list(self._once(("model", cell.model), lambda: self._model_reasons(cell.model)))
        if cell.method.needs_base:
            question = (
                "base",
                cell.method.rounding,
                cell.model,
                cell.method.name,
                cell.method.transform,
                cell.method.tuning,
                cell.method.reduction,
            )
            found += self._once(question, lambda: self._base_reasons(cell))
        if cell.method.uses_calibration or has_static_scales(cell.scheme):
            found += self._once(
                (
                    "calibration",
                    cell.calibration,
                    cell.method.name,
                    cell.method.all_needs,
                    cell.scheme.name if cell.calibration is None else "",  # named by the refusal
                ),
                lambda: self._calibration_reasons(cell),
            )
        if cell.calibration is not None:
            found += self._once(
                ("lengths", cell.calibration, cell.method.tuning, cell.model),
                lambda: self._length_reasons(cell),
            )
        method, scheme, model = cell.method, cell.scheme, cell.model
        for slot, part in _slots(cell):
            before = (method.reduction, method.transform)
            # with overrides, the part rounds what the other roundings leave to it
            rest = method.rounding if method.overrides else method.rounding is None
            rounded = (rest, *method.overrides)
            found += self._asked(
                model,
                ("part", slot, part, *before, rounded, scheme),
                functools.partial(self._part_reasons, slot, part, cell),
            )
        if self.runtime.export and not method.is_baseline:
            found += self._asked(
                model,
                ("export", self.runtime.export, scheme, method),
                lambda: self._export_reasons(cell),
            )
        if scheme.activation is not None or scheme.kv is not None:
            found += self._asked(
                model,
                ("execution", method.reduction, scheme),
                lambda: self._execution_reasons(cell),
            )
        for evaluation in cell.evaluations:
            found += self._once(
                ("evaluation", evaluation, model),
                functools.partial(self._evaluation_reasons, evaluation, model),
            )
        return list(dict.fromkeys(found))

    def warnings(self, cell: Cell) -> list[str]:
        """What the parts of an accepted cell's method warn of; the optional method `warnings(cell, shapes)` of a plugin."""
        found: list[str] = []
        for slot, part in _slots(cell):
            found += self._asked(
                cell.model,
                ("warnings", slot, part, cell.scheme, cell.calibration, cell.inputs),
                functools.partial(self._part_warnings, slot, part, cell),
            )
        return found

    def _part_warnings(self, slot: str, part: Part, cell: Cell) -> list[str]:
        shapes = self.shapes(cell.model)
        plugin = plugins.build(slot, part.name, to_json(part)["settings"])
        if shapes is None or not hasattr(plugin, "warnings"):
            return []
        return [f"{slot} {part.name}: {each}" for each in plugin.warnings(cell, shapes)]

    def shapes(self, model: Model) -> Shapes | None:
        """Shapes of a model, or None where its config cannot be read (which is a refusal of its own)."""
        return self._once(("shapes", model), lambda: self._shapes(model))[0]

    def reduced_shapes(self, cell: Cell) -> Shapes | None:
        """Shapes of the model that a cell quantizes: its own, or the one that its reduction makes.

        None where the config cannot be read, or the reduction is refused: both are refusals of their own.
        """
        part = cell.method.reduction
        if part is None:
            return self.shapes(cell.model)
        return self._once(("reduced", cell.model, part), lambda: self._reduced(cell.model, part))[0]

    def _reduced(self, model: Model, part: Part) -> tuple[Shapes | None, list[str]]:
        """Shapes of what a reduction makes of a model, or the reasons why it cannot."""
        from harness.quantization import models

        shapes = self.shapes(model)
        try:
            reduction = plugins.build("reduction", part.name, to_json(part)["settings"])
            if shapes is None:
                return None, []
            folder = model_folders.config_folder(model)
            config = models.config_by_block(models.read_config(folder))
            if reasons := reduction.check(shapes, config):
                return None, [f"reduction {part.name}: {reason}" for reason in reasons]
            smaller = reduction.config(config)
            return models.family_of(smaller).shapes(smaller), []
        except HarnessError as error:
            return None, [f"reduction {part.name}: {error}"]

    def devices(self, model: Model) -> int | None:
        """GPUs over which a model is spread: each holds its part and one block more. None where no number is enough.

        1 without GPUs on this machine, and on a cluster at an address unless `cluster.gpu_memory` gives the size of its GPUs.
        """
        return self._once(("devices", model), lambda: self._devices(model))

    def needs_full_gpu(self, model: Model) -> bool:
        """Whether one GPU holds a model, and a task's fraction of one does not."""
        shapes, free = self.shapes(model), self.gpu_bytes()
        if (
            shapes is None
            or free is None
            or self.devices(model) != 1
            or model.dtype not in DTYPE_BYTES
        ):
            return False
        return DTYPE_BYTES[model.dtype] * shapes.parameters > free * MEMORY_SHARE * gpu_fraction(
            self.runtime
        )

    def _devices(self, model: Model) -> int | None:
        shapes, free = self.shapes(model), self.gpu_bytes()
        if shapes is None or free is None or model.dtype not in DTYPE_BYTES:
            return 1
        need, block = (
            DTYPE_BYTES[model.dtype] * number
            for number in (
                shapes.parameters,
                sum(linear.out_features * linear.in_features for linear in shapes.linears),
            )
        )
        if need <= free * MEMORY_SHARE:
            return 1
        fits = (
            count
            for count in range(2, shapes.blocks + 1)
            if need / count + block <= free * MEMORY_SHARE
        )
        return next(fits, None)

    def _gpus(self) -> int:
        return resources.count_gpus() if uses_gpu(self.runtime) else 0

    def gpu_bytes(self) -> int | None:
        """Bytes free on one GPU; None where there is none, and on a cluster at an address without `cluster.gpu_memory`."""
        return self._once("GPU", self._gpu_bytes)

    def _gpu_bytes(self) -> int | None:
        cluster = self.runtime.cluster
        if cluster.address:
            return (
                bytes_of(cluster.gpu_memory, "cluster.gpu_memory") if cluster.gpu_memory else None
            )
        return resources.free_memory(self.runtime)[0] if uses_gpu(self.runtime) else None

    def save(self) -> None:
        """Keep the answers for the next process."""
        for book in self._books.values():
            book.save()

    def _kept(
        self,
        model: Model,
        question: Any,
        ask: Callable[[], list[str]],
        keeps: Callable[[Any], bool] = lambda answer: True,
    ) -> Any:
        """An answer about a model, from an earlier process where neither its files nor the code have changed.

        question, and what ask() returns: JSON values. Where the model cannot be found nothing is kept.
        """
        book = self._books.get(model)
        if book is None:
            try:
                folder = model_folders.config_folder(model)
            except HarnessError:
                return ask()
            stamp = kept.stamp_of([folder])
            book = self._books[model] = Book([str(folder), to_json(model)], stamp)
        return book.ask(question, ask, keeps)

    def _asked(
        self, model: Model, question: tuple[Hashable, ...], ask: Callable[[], list[str]]
    ) -> list[str]:
        """Reasons that follow from values and the model's files: asked once, and kept."""
        return self._once(
            (*question, model), lambda: self._kept(model, [to_json(each) for each in question], ask)
        )

    def _once(self, question: Hashable, ask: Callable[[], T]) -> T:
        if question not in self._answers:
            self._answers[question] = ask()
        return self._answers[question]

    def _shapes(self, model: Model) -> tuple[Shapes | None, list[str]]:
        shapes, faults, _ = self._examined(model)
        return None if shapes is None else from_json(Shapes, shapes), faults

    def _examined(self, model: Model) -> tuple[Any, list[str], list[str]]:
        """(shapes as JSON or None, faults, notes) of a model, from its config and the headers of its files."""

        def look() -> Any:
            from harness.quantization import models

            try:
                folder = model_folders.config_folder(model)
                if is_partial:
                    return [to_json(models.shapes(folder)), [], []]
            except HarnessError as error:
                return [None, [str(error)], []]
            found = models.examine(folder)
            return [to_json(found.shapes), list(found.faults), list(found.notes)]

        is_partial = bool(self._once(("unchecked", model), lambda: model_folders.unchecked(model)))
        return self._once(
            ("examined", model), lambda: self._kept(model, ["examined", is_partial], look)
        )

    def notes(self, model: Model) -> tuple[str, ...]:
        """What a user should know of a model before it runs: what of its files is not used, what a plan could not check."""
        reason = self._once(("unchecked", model), lambda: model_folders.unchecked(model))
        if reason or self.shapes(model) is None:
            return (reason,) if reason else ()
        return tuple(self._examined(model)[2])

    def _model_reasons(self, model: Model) -> list[str]:
        shapes, reasons = self._once(("shapes", model), lambda: self._shapes(model))
        if shapes is None:
            return reasons
        if model.dtype not in DTYPE_BYTES:
            reasons = [
                *reasons,
                f'model "{model.name}": dtype "{model.dtype}" is none of {", ".join(DTYPE_BYTES)}',
            ]
        free, where = resources.free_memory(self.runtime)
        need = shapes.parameters * DTYPE_BYTES.get(model.dtype, 4)
        devices = self.devices(model)
        if (
            free is not None
            and need > free * MEMORY_SHARE
            and (devices is None or devices > self._gpus())
        ):
            takes = f'model "{model.name}" takes {size(need)} as {model.dtype} to evaluate'
            if uses_gpu(self.runtime):
                number = f"{devices} GPUs" if devices else "no number of GPUs is enough"
                takes, where = (
                    f"{takes}: {number}",
                    f"this machine has {counted(self._gpus(), 'GPU')}, of which the GPU with least free memory",
                )
            reasons = [*reasons, f"{takes}; {where} has {size(free)} free"]
        return reasons

    def _base_reasons(self, cell: Cell) -> list[str]:
        """Why no difference from the model's base can be taken."""
        from harness.quantization import models

        model, base, reasons = cell.model, base_of(cell.model), []
        if cell.method.transform is not None:
            reasons.append(
                f"method {cell.method.name}: a difference is taken of the model as it is, and transform "
                f"{cell.method.transform.name} changes it; use no transform"
            )
        rounding, tuning = cell.method.rounding, cell.method.tuning
        if cell.method.reduction is not None:
            reasons.append(
                f"method {cell.method.name}: a difference is taken of the model as it is, and reduction "
                f"{cell.method.reduction.name} changes its shape; use no reduction"
            )
        if rounding is not None and plugins.facts("rounding", rounding.name).get("wraps", False):
            reasons.append(
                f"rounding {rounding.name}: a difference is stored as its own rounding makes it, and not corrected; use "
                f"rounding={rounding['base']} alone"
            )
        if tuning is not None:
            known = plugins.find("tuning")
            able = [name for name, facts in known.items() if facts.get("trains_differences", False)]
            if tuning.name not in able:
                reasons.append(
                    f"tuning {tuning.name} does not train a difference from a base; use {' or '.join(able)}, or none"
                )
        if base is None:
            reasons.append(
                f"method {cell.method.name} stores the difference from the model that {model.name} was fine-tuned from, and it "
                "names none; set model.base=<name>, or `base:` in its YAML"
            )
            return reasons
        if self.shapes(model) is None:
            return reasons
        found, theirs = self._once(("shapes", base), lambda: self._shapes(base))
        if found is None:
            return [*reasons, *(f"base of {model.name}: {reason}" for reason in theirs)]
        folders = (model_folders.config_folder(model), model_folders.config_folder(base))
        return reasons + [
            f"base of {model.name}: {reason}" for reason in (*theirs, *models.differences(*folders))
        ]

    def _calibration_reasons(self, cell: Cell) -> list[str]:
        if cell.calibration is None:
            who = f'method "{cell.method.name}"'
            needs = ", ".join(cell.method.all_needs)
            if not cell.method.uses_calibration:
                who, needs = f'scheme "{cell.scheme.name}"', "static scales"
            return [f"{who} needs calibration data ({needs}); set `calibration:`"]
        calibration = cell.calibration
        reasons = []
        if calibration.samples < 1 or calibration.length < 2:
            windows = f"{calibration.samples} windows of {calibration.length} tokens"
            reasons.append(f"calibration {calibration.name}: {windows} are empty")
        missing = texts.missing_text(calibration.source, calibration.split)
        size = None if missing else texts.plain_bytes(calibration.source, calibration.split)
        if size is not None and size < calibration.length:
            reasons.append(
                f"calibration {calibration.name}: the text {calibration.source} has {size} bytes, too few for one window of "
                f"{calibration.length} tokens; set a smaller calibration.length= or use more text"
            )
        return [*reasons, *(f"calibration {calibration.name}: {reason}" for reason in missing)]

    def _length_reasons(self, cell: Cell) -> list[str]:
        """Why the model cannot read texts as long as calibration and tuning make them."""
        calibration, context = cell.calibration, self.context_length(cell.model)
        if calibration is None or context is None:
            return []
        model, reasons = cell.model.name, []
        if calibration.length > context:
            reasons.append(
                f"calibration {calibration.name}: windows of {calibration.length} tokens, but {model} was made for at most "
                f"{context}; calibration.length={context} is the longest"
            )
        tuning = cell.method.tuning
        settings = dict(tuning.settings) if tuning is not None else {}
        parts = [settings.get(name) for name in ("prompt_length", "answer_length")]
        if tuning is not None and all(isinstance(part, int) for part in parts):
            longest = sum(part for part in parts if isinstance(part, int))
            if longest > context:
                reasons.append(
                    f"tuning {tuning.name}: texts of up to {parts[0]} + {parts[1]} tokens, but {model} was made for at most "
                    f"{context}; lower tuning.prompt_length or tuning.answer_length"
                )
        reasons += _training_reasons(tuning, calibration)
        return reasons

    def context_length(self, model: Model) -> int | None:
        """Positions that a model was made for; None where its config does not say or cannot be read."""

        def read() -> int | None:
            try:
                return folder_check.context_length(
                    folder_check.read_config(model_folders.config_folder(model))
                )
            except HarnessError:
                return None  # a refusal of its own

        return self._once(("context", model), read)

    def _part_reasons(self, slot: str, part: Part, cell: Cell) -> list[str]:
        if slot == "tuning" and cell.method.rounding is None:
            return [
                f"tuning {part.name}: a tuning trains rounded weights, and the method has no rounding; choose a rounding"
            ]
        if slot == "reduction":
            self.reduced_shapes(cell)
            found: list[str] = self._answers[("reduced", cell.model, part)][1]
            return found
        try:
            plugin = plugins.build(slot, part.name, to_json(part)["settings"])
        except HarnessError as error:
            return [str(error)]
        shapes = self.reduced_shapes(cell)
        if shapes is None:
            return []
        reasons = list(
            dict.fromkeys(
                f"{slot} {part.name}: {reason}"
                for scheme in _schemes_of(slot, part, cell, shapes)
                for reason in plugin.check(scheme, shapes)
            )
        )
        for scheme in _schemes_of(slot, part, cell, shapes):
            reasons += _sparsity_reasons(slot, part, scheme, shapes)
        if (
            slot == "rounding"
            and "squared_gradient" in part.needs
            and cell.method.transform is not None
        ):
            reasons.append(
                f"rounding {part.name}: squared gradients belong to the original weights of the model, which transform "
                f"{cell.method.transform.name} changes; use no transform"
            )
        transform = cell.method.transform
        if (
            slot == "rounding"
            and transform is not None
            and transform.name in plugins.find("transform")
        ):
            from harness.quantization.methods.protocols import other_basis

            rotates = hasattr(plugins.load("transform", transform.name), "rewrite_ends")
            if rotates and (reason := other_basis(part.needs)):
                reasons.append(f"rounding {part.name} after transform {transform.name}: {reason}")
        fused = [linear.name for linear in shapes.linears if linear.fused]
        if slot == "tuning" and fused:
            reasons.append(
                f"tuning {part.name}: trains whole linear layers; in this model {', '.join(fused)} are parts of fused layers"
            )
        return reasons

    def _export_reasons(self, cell: Cell) -> list[str]:
        from harness.quantization import export

        shapes, name = self.reduced_shapes(cell), self.runtime.export
        try:
            return (
                []
                if shapes is None
                else [f"export {name}: {reason}" for reason in export.refusals(cell, shapes, name)]
            )
        except HarnessError as error:
            return [str(error)]

    def _execution_reasons(self, cell: Cell) -> list[str]:
        """Why activations or the KV cache cannot be quantized as the scheme says."""
        from harness.quantization.inference import activations, kv_cache

        shapes = self.reduced_shapes(cell)
        if shapes is None:
            return []
        cache = kv_cache.check(cell.scheme.kv, shapes) if cell.scheme.kv is not None else []
        return activations.check(cell.scheme, shapes) + cache

    def _evaluation_reasons(self, evaluation: Evaluation, model: Model) -> list[str]:
        def ask() -> list[str]:
            try:
                evaluator = plugins.build(
                    "evaluator", evaluation.evaluator, to_json(evaluation)["settings"]
                )
                return list(evaluator.check(evaluation, model))
            except HarnessError as error:
                return [str(error)]

        # What it reads are the model, its own files (by digest and stamp), and the hub's caches.
        question = ["evaluation", to_json(evaluation), *_read_by(evaluation)]
        reasons = self._kept(model, question, ask, keeps=lambda answer: not answer)
        if self.devices(model) != 1 and measures_device(evaluation):
            reasons = [*reasons, "it measures one GPU, and the model takes several"]
        override = f" evaluations.{evaluation.name}.length="
        return [
            f"evaluation {evaluation.name}: {reason.replace(' length=', override)}"
            for reason in reasons
        ]


def _read_by(evaluation: Evaluation) -> list[Any]:
    """Stamps of the files that an evaluation names, and of the caches in which data sets of the hub lie."""
    named = [Path(text) for text in texts_in(to_json(evaluation)["settings"]) if isabs(text)]
    return [kept.stamp_of(named).text, hub.caches_stamp()]


def _training_reasons(tuning: Part | None, calibration: Calibration) -> list[str]:
    """Why the calibration's windows are too few or too short for the steps of a tuning that uses each piece of them once."""
    settings = dict(tuning.settings) if tuning is not None else {}
    if tuning is None or not settings.keys() >= {"steps", "batch", "length"}:
        return []
    length, wanted = settings["length"], settings["steps"] * settings["batch"]
    if length > calibration.length:
        return [
            f"tuning {tuning.name}: sequences of {length} tokens, but windows of calibration {calibration.name} have "
            f"{calibration.length}; lower tuning.length or raise calibration.length"
        ]
    pieces = calibration.samples * (calibration.length // length)
    if pieces >= wanted:
        return []
    samples = -(-wanted // (calibration.length // length))
    return [
        f"tuning {tuning.name}: {settings['steps']} steps of {settings['batch']} sequences use {wanted} pieces of {length} tokens, "
        f"and calibration {calibration.name} has {pieces}; set calibration.samples={samples} or more, or lower tuning.steps"
    ]


def _sparsity_reasons(slot: str, part: Part, scheme: Scheme, shapes: Shapes) -> list[str]:
    """Why a part of a method cannot follow a scheme that states a sparsity."""
    from harness.quantization.methods.checks import check_sparsity

    facts = plugins.facts(slot, part.name)
    if slot == "rounding":
        return check_sparsity(part.name, bool(facts.get("prunes", False)), scheme, shapes)
    states = any(dict(override.weight).get("sparsity") for override in scheme.overrides) or bool(
        scheme.weight.sparsity
    )
    if slot == "tuning" and states and not facts.get("keeps_zeros", False):
        keeping = [
            name for name, each in plugins.find("tuning").items() if each.get("keeps_zeros", False)
        ]
        return [
            f"tuning {part.name}: this tuning would fill the zeros of pruned matrices; use one whose adapters lie beside "
            f"the matrices ({', '.join(keeping)})"
        ]
    return []


def _slots(cell: Cell) -> Iterable[tuple[str, Part]]:
    method = cell.method
    return [
        (s, p)
        for s, p in (
            ("reduction", method.reduction),
            ("transform", method.transform),
            ("rounding", method.rounding),
            ("tuning", method.tuning),
            *(("rounding", part) for part in dict.fromkeys(o.rounding for o in method.overrides)),
        )
        if p
    ]


def _schemes_of(slot: str, part: Part, cell: Cell, shapes: Shapes) -> list[Scheme]:
    """The schemes that a part must be able to round: those of its own matrices where roundings differ between them."""
    if slot != "rounding" or not cell.method.overrides:
        return [cell.scheme]
    weights = dict.fromkeys(
        cell.scheme.weight_for(block, linear.name)
        for block in range(shapes.blocks)
        for linear in shapes.linears
        if cell.method.rounding_for(block, linear.name) == part
    )
    return [dataclasses.replace(cell.scheme, weight=weight, overrides=()) for weight in weights]
