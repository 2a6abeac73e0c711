"""Every check of a cell before it runs, done once per distinct question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

from harness.core import plugins
from harness.core.cell import Cell, Evaluation, Model, Part, to_json
from harness.core.errors import HarnessError
from harness.core.sweep import Runtime
from harness.core.units import bytes_of, counted, size
from harness.data import folder_check, model_folders, texts
from harness.planning import resources
from harness.planning.resources import (
    DTYPE_BYTES,
    MEMORY_SHARE,
    T,
    gpu_fraction,
    measures_device,
    uses_gpu,
)

if TYPE_CHECKING:
    from harness.core.shapes import Shapes


class Checker:
    """Checks the parts of cells, each distinct question once: 1,000 cells are a few models, methods and schemes."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._answers: dict[Hashable, Any] = {}

    def reasons(self, cell: Cell) -> list[str]:
        found = list(self._once(("model", cell.model), lambda: self._model_reasons(cell.model)))
        if cell.method.needs:
            found += self._once(
                ("calibration", cell.calibration, cell.method.needs),
                lambda: self._calibration_reasons(cell),
            )
        if cell.calibration is not None:
            found += self._once(
                ("lengths", cell.calibration, cell.method.tuning, cell.model),
                lambda: self._length_reasons(cell),
            )
        for slot, part in _slots(cell):
            question = ("part", slot, part, cell.method.transform, cell.scheme, cell.model)
            found += self._once(question, functools.partial(self._part_reasons, slot, part, cell))
        if self.runtime.export and not cell.method.is_baseline:
            found += self._once(
                ("export", cell.scheme, cell.method, cell.model), lambda: self._export_reasons(cell)
            )
        if cell.scheme.activation is not None or cell.scheme.kv is not None:
            found += self._once(
                ("execution", cell.scheme, cell.model), lambda: self._execution_reasons(cell)
            )
        for evaluation in cell.evaluations:
            ask = functools.partial(self._evaluation_reasons, evaluation, cell.model)
            found += self._once(("evaluation", evaluation, cell.model), ask)
        return list(dict.fromkeys(found))

    def shapes(self, model: Model) -> Shapes | None:
        """Shapes of a model, or None where its config cannot be read (which is a refusal of its own)."""
        return self._once(("shapes", model), lambda: self._shapes(model))[0]

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

    def _once(self, question: Hashable, ask: Callable[[], T]) -> T:
        if question not in self._answers:
            self._answers[question] = ask()
        return self._answers[question]

    def _shapes(self, model: Model) -> tuple[Shapes | None, list[str]]:
        from harness.quantization import models

        try:
            folder = model_folders.config_folder(model)
            if self._once(("unchecked", model), lambda: model_folders.unchecked(model)):
                return models.shapes(folder), []
        except HarnessError as error:
            return None, [str(error)]
        found = models.examine(folder)
        return found.shapes, list(found.faults)

    def notes(self, model: Model) -> tuple[str, ...]:
        """What a user should know of a model before it runs: what of its files is not used, what a plan could not check."""
        from harness.quantization import models

        reason = self._once(("unchecked", model), lambda: model_folders.unchecked(model))
        if reason or self.shapes(model) is None:
            return (reason,) if reason else ()
        return models.examine(model_folders.config_folder(model)).notes

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

    def _calibration_reasons(self, cell: Cell) -> list[str]:
        needs = ", ".join(cell.method.needs)
        if cell.calibration is None:
            return [
                f'method "{cell.method.name}" needs calibration data ({needs}); set `calibration:`'
            ]
        calibration = cell.calibration
        reasons = []
        if calibration.samples < 1 or calibration.length < 2:
            windows = f"{calibration.samples} windows of {calibration.length} tokens"
            reasons.append(f"calibration {calibration.name}: {windows} are empty")
        missing = texts.missing_text(calibration.source, calibration.split)
        return [*reasons, *(f"calibration {calibration.name}: {reason}" for reason in missing)]

    def _length_reasons(self, cell: Cell) -> list[str]:
        """Why the model cannot read texts as long as calibration and tuning make them."""
        calibration, context = cell.calibration, self._context_length(cell.model)
        if calibration is None or context is None:
            return []
        model, reasons = cell.model.name, []
        if calibration.length > context:
            reasons.append(
                f"calibration {calibration.name}: windows of {calibration.length} tokens, but {model} was made for at most "
                f"{context}; set calibration.length to {context} or less"
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
        return reasons

    def _context_length(self, model: Model) -> int | None:
        """Positions that a model was made for; None where its config does not say or cannot be read."""
        try:
            return folder_check.context_length(
                folder_check.read_config(model_folders.config_folder(model))
            )
        except HarnessError:
            return None  # a refusal of its own

    def _part_reasons(self, slot: str, part: Part, cell: Cell) -> list[str]:
        if slot == "tuning" and cell.method.rounding is None:
            return [
                f"tuning {part.name}: a tuning trains rounded weights, and the method has no rounding; choose a rounding"
            ]
        try:
            plugin = plugins.build(slot, part.name, to_json(part)["settings"])
        except HarnessError as error:
            return [str(error)]
        shapes = self.shapes(cell.model)
        if shapes is None:
            return []
        reasons = [f"{slot} {part.name}: {reason}" for reason in plugin.check(cell.scheme, shapes)]
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

        shapes, name = self.shapes(cell.model), self.runtime.export
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

        shapes = self.shapes(cell.model)
        if shapes is None:
            return []
        cache = kv_cache.check(cell.scheme.kv, shapes) if cell.scheme.kv is not None else []
        return activations.check(cell.scheme, shapes) + cache

    def _evaluation_reasons(self, evaluation: Evaluation, model: Model) -> list[str]:
        try:
            evaluator = plugins.build(
                "evaluator", evaluation.evaluator, to_json(evaluation)["settings"]
            )
            reasons = evaluator.check(evaluation, model)
        except HarnessError as error:
            return [f"evaluation {evaluation.name}: {error}"]
        if self.devices(model) != 1 and measures_device(evaluation):
            reasons = [*reasons, "it measures one GPU, and the model takes several"]
        return [f"evaluation {evaluation.name}: {reason}" for reason in reasons]


def _slots(cell: Cell) -> Iterable[tuple[str, Part]]:
    method = cell.method
    return [
        (s, p)
        for s, p in (
            ("transform", method.transform),
            ("rounding", method.rounding),
            ("tuning", method.tuning),
        )
        if p
    ]
