"""From YAML and overrides to a checked sweep: the one module that knows Hydra.

    sweeps/<name>.yaml + overrides  ->  axes of every grid  ->  each axis value composed once  ->  their product  ->  frozen cells

A sweep of a thousand cells has some forty distinct axis values. Hydra composes config.yaml and every value whose YAML has a
`defaults` list (60 to 140 ms each); a value without one is its file. The product is taken here. Everything is typed by the
dataclasses it ends in (`harness.cell`, `harness.sweep`), settings of plugins by their own YAML and source.
All that is wrong with a sweep is said in one ConfigError: file, key, value and the nearest name that exists.
The language of a sweep file and of overrides is described in docs/sweeps.md.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.config.axes import AXES, EDITABLE, GROUPS, INPUTS, RUNTIME, SLOTS
from harness.config.context import T, data_set_commits
from harness.config.evaluations import evaluation_entry, parts_of, task_digest
from harness.config.locations import config_files, config_roots
from harness.config.overrides import Edits, parse_overrides
from harness.config.rules import in_words, matches
from harness.config.schemes import FORMAT_NAME, SCHEME_NAME, checked_override, scheme_by_name
from harness.config.sweep_file import Grid, SweepFile, is_axis, read_sweep_file, sweep_path
from harness.config.tables import place_of_term
from harness.config.typed import (
    Problems,
    checked_settings,
    hints_of,
    set_nested,
    settings_of,
    typed,
    types_of,
)
from harness.config.yaml_files import compose, compose_with_hydra, read_yaml
from harness.core import plugins
from harness.core.cell import (
    Calibration,
    Cell,
    Evaluation,
    Method,
    Model,
    Part,
    Scheme,
    baseline_of,
    cell_key,
    freeze,
    has_static_activations,
)
from harness.core.errors import ConfigError, unknown_name
from harness.core.labels import with_variants
from harness.core.package import published_folders
from harness.core.sweep import Column, Finding, First, Runtime, Skip, Sweep, Table
from harness.core.units import bytes_of
from harness.data import hub, model_folders, task_files, texts
from harness.data.bundle import Bundle
from harness.data.task_files import TaskFile
from harness.storage.places import place_of

Point = dict[
    str, tuple[Any, bool]
]  # of a grid: axis -> its value, and whether the axis has several


# --- what others call ----------------------------------------------------------------------------------------------------------


def load_sweep(name: str | None, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a file (a name below sweeps/ or a path) with overrides applied; None: the grid that the overrides state.

    Reads configs, plugin facts, and what digests need (model folders, corpora); starts nothing and writes nothing but a cache
    of digests. Raises ConfigError with everything that is wrong.
    """
    problems = Problems()
    file = SweepFile() if name is None else read_sweep_file(sweep_path(name), problems)
    edits = parse_overrides(overrides, problems)
    problems.check()
    return _Resolver(file, edits, problems).sweep(tuple(overrides))


def load_runtime(overrides: Sequence[str] = ()) -> Runtime:
    """Where and how things run, without a sweep: conf/config.yaml with overrides of runs, cluster, tracking, … applied."""
    problems = Problems()
    edits = parse_overrides(overrides, problems)
    if (
        edits.axes
        or edits.evaluations is not None
        or edits.more_evaluations
        or edits.evaluation_settings
    ):
        problems.add(f"only {', '.join(RUNTIME)} can be overridden here")
    problems.check()
    runtime = _Resolver(SweepFile(), edits, problems).runtime
    problems.check()
    return typing.cast(Runtime, runtime)


# --- from axes to cells --------------------------------------------------------------------------------------------------------


class _Resolver:
    """Resolves every axis value once, then makes the cells. Keeps what is wrong in `problems` until the end."""

    def __init__(self, file: SweepFile, edits: Edits, problems: Problems) -> None:
        self.file, self.edits, self.problems = file, edits, problems
        self.base = file.path.parent if file.path is not None else None
        self.known: dict[Any, Any] = {}
        self.composed: dict[tuple[str, str], dict[str, Any]] = {}
        self.used_settings: set[str] = set()
        self.asked: set[str] = set()  # names of evaluations, those that failed included
        self.runtime = self._runtime()
        self.bundle: Bundle | None = None
        if self.runtime is not None and self.runtime.data_root is not None:
            with problems.collect():
                self.bundle = Bundle.open(self.runtime.data_root)

    def sweep(self, overrides: tuple[str, ...]) -> Sweep:
        evaluations = self._evaluations()
        points = [point for grid in self.file.grids for point in self._points(grid)]
        cells, skips = self._cells(points, evaluations)
        self._check_settings_used(points)
        self._check_rules()
        tables = self._tables(evaluations)
        named = {str(point["model"][0]) for point in points if "model" in point}
        self._check_models(tables, named | {cell.model.name for cell in cells})
        findings = self._findings(tables)
        self.problems.check()
        file = self.file
        name = file.path.stem if file.path is not None else "grid"
        return Sweep(
            name=name,
            title=file.title or self._ad_hoc_title(cells),
            description=file.description,
            cells=cells,
            skips=skips,
            tables=tables,
            runtime=typing.cast(Runtime, self.runtime),
            path=file.path,
            overrides=overrides,
            findings=findings,
            first=self._first(cells),
        )

    def _once(self, key: Any, make: Callable[[], T]) -> T | None:
        """make() the first time; None if it failed, and its errors are among the problems."""
        if key not in self.known:
            self.known[key] = None
            with self.problems.collect():
                self.known[key] = make()
        return typing.cast(T | None, self.known[key])

    def _compose(self, group: str, name: str, where: str = "") -> dict[str, Any]:
        """`compose`, once per name; a copy that may be edited."""
        if (group, name) not in self.composed:
            self.composed[group, name] = compose(group, name, where)
        return copy.deepcopy(self.composed[group, name])

    # the grid

    def _points(self, grid: Grid) -> Iterator[Point]:
        """Every point of a grid: axis -> (value, whether the axis has several)."""
        edits = dict(self.edits.axes)
        dropped = set(edits)
        if "method" in edits or "rounding" in edits:
            dropped |= {"method", *SLOTS}
        axes = {
            key: edits.get(key, values)
            for key, values in grid.axes.items()
            if key in edits or key not in dropped
        }
        zips = [
            {key: values for key, values in paired.items() if key not in dropped}
            for paired in grid.zips
        ]
        axes.update({key: values for key, values in edits.items() if key not in axes})
        steps: list[list[Point]] = []
        for paired in filter(None, zips):
            rows = zip(*paired.values(), strict=True)
            steps.append(
                [
                    {key: (value, True) for key, value in zip(paired, row, strict=True)}
                    for row in rows
                ]
            )
        steps.extend(
            [{key: (value, len(values) > 1)} for value in values] for key, values in axes.items()
        )
        for combination in itertools.product(*steps):
            yield {key: value for step in combination for key, value in step.items()}

    def _cells(
        self, points: list[Point], evaluations: tuple[Evaluation, ...]
    ) -> tuple[tuple[Cell, ...], tuple[Skip, ...]]:
        cells: dict[tuple[str, str], Cell] = {}
        skipped: dict[str, dict[str, None]] = {}
        for point in points:
            cell = self._cell(point)
            if cell is None:
                continue
            cell = dataclasses.replace(cell, evaluations=evaluations)
            reason = self._skipped(cell)
            if reason is not None:
                skipped.setdefault(reason, {}).setdefault(cell.title)
                continue
            baseline = (
                self.edits.baseline if self.edits.baseline is not None else self.file.baseline
            )
            for made in (baseline_of(cell), cell) if baseline else (cell,):
                cells.setdefault((cell_key(made), made.title), made)
        if not cells and not self.problems.found:
            self.problems.add(
                f"{self.file.where}: every cell is skipped"
                if skipped
                else f"{self.file.where}: there are no cells"
            )
        return with_variants(cells.values()), tuple(
            Skip(tuple(titles), reason) for reason, titles in skipped.items()
        )

    def _cell(self, point: Point) -> Cell | None:
        missing = [axis for axis in ("model",) if axis not in point]
        if not {"method", "rounding"} & set(point):
            missing.append("method")
        for axis in missing:
            self.problems.add(
                f"{self.file.where}: no {axis}; add {axis}=<name> (known: {', '.join(config_files(axis))})"
            )
        if missing:
            return None
        fields = {
            head: tuple(
                (key.partition(".")[2], value, several)
                for key, (value, several) in point.items()
                if key.startswith(f"{head}.")
            )
            for head in EDITABLE
        }
        seed, inputs = (
            point.get("seed", (0, False))[0],
            point["inputs"][0] if "inputs" in point else self._method_inputs(point),
        )
        if type(seed) is not int or seed < 0:
            self.problems.add(
                f"{self.file.where}: seed: a whole number from 0 is expected, not {seed!r}"
            )
        if inputs not in INPUTS:
            self.problems.add(unknown_name("inputs", str(inputs), INPUTS, self.file.where))
        model = self._resolve("model", point, fields, self._model)
        method = self._method(point, fields)
        if method is not None and method.is_baseline:
            return None if model is None else baseline_of(Cell(model, method, Scheme("full")))
        scheme = self._quantizing_scheme(point, fields, method)
        calibrated = self._calibrated(method, scheme)
        calibration = self._calibration_of(point, fields, method, seed) if calibrated else None
        if (
            model is None
            or method is None
            or scheme is None
            or (calibrated and calibration is None)
        ):
            return None
        return Cell(model, method, scheme, calibration, inputs=inputs, seed=seed)

    def _quantizing_scheme(
        self, point: Point, fields: dict[str, Any], method: Method | None
    ) -> Scheme | None:
        name, where = point.get("scheme", (None, False))[0], self.file.where
        if name is not None and name != "full":
            return self._resolve("scheme", point, fields, self._scheme)
        if name is None:
            self.problems.add(
                f"{where}: a method that quantizes needs a scheme; add scheme=<name> (w4, w4g128, w8a8, …)"
            )
        elif method is not None:
            self.problems.add(
                f"{where}: scheme full belongs to method none, not to {method.name}; that cell is always added"
            )
        return None

    def _calibrated(self, method: Method | None, scheme: Scheme | None) -> bool:
        static = scheme is not None and has_static_activations(scheme)
        return static or (method is not None and bool(method.needs))

    def _calibration_of(
        self, point: Point, fields: dict[str, Any], method: Method | None, seed: int
    ) -> Calibration | None:
        if point.get("calibration", (None, False))[0] is None:
            needs = f" ({', '.join(method.needs)})" if method is not None and method.needs else ""
            who = (
                f"method {method.name}{needs}"
                if method is not None and needs
                else "a static activation scheme"
            )
            known = ", ".join(config_files("calibration"))
            self.problems.add(
                f"{self.file.where}: {who} needs calibration data; add calibration=<name> (known: {known})"
            )
            return None
        return self._resolve(
            "calibration", point, fields, functools.partial(self._calibration, seed=seed), seed
        )

    def _resolve(
        self,
        axis: str,
        point: Point,
        fields: dict[str, Any],
        make: Callable[[str, Any], T],
        *more: Any,
    ) -> T | None:
        name = point[axis][0]
        key = (axis, repr(name), repr(fields[axis]), *more)
        return self._once(key, lambda: make(self._name(axis, name), fields[axis]))

    def _name(self, axis: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self.file.where}: {axis}: a name is expected, not {value!r}")
        return value

    # the values

    def _model(self, name: str, fields: Sequence[tuple[str, Any, bool]]) -> Model:
        if name in config_files("model"):
            content, where = self._compose("model", name), str(config_files("model")[name])
        elif texts.resolve_path(name, self.base).is_dir():
            content, where = {"source": name}, f"model {name}"
            name = texts.resolve_path(name, self.base).resolve().name
        elif name.startswith((f"{texts.DEMO}:", f"{texts.TINY}:")):
            content, where = {"source": name}, f"model {name}"
            name = name.replace(":", "_")
        elif hub.HUB_ID.fullmatch(name) and not name.startswith("."):
            content, where = {"source": name}, f"model {name}"
            name = name.rsplit("/", 1)[1]
        else:
            hint = " A folder or a hub id owner/name is also a model."
            raise ConfigError(
                unknown_name("model", name, config_files("model"), self.file.where) + "." + hint
            )
        for key, value, _ in fields:
            set_nested(content, key, value)
        content = {"name": name, **content}
        self._refuse(content, ("digest",), where)
        model = self._typed(Model, content, where)
        source = model.source
        path = texts.resolve_path(source, self.base)
        is_hub_id = hub.HUB_ID.fullmatch(source) and not path.exists()
        if source.partition(":")[0] not in (texts.DEMO, texts.TINY) and not is_hub_id:
            source = str(path)
        pulled = self.bundle.model(source) if self.bundle is not None else None
        asked = model.revision or ""
        if (
            self.bundle is not None
            and pulled is not None
            and hub.COMMIT.fullmatch(asked)
            and asked != pulled[1]
        ):
            raise ConfigError(
                f"{where}: revision {asked} is asked for, and {self.bundle.folder} has commit {pulled[1]} of "
                f"{source}; run `harness data pull` for this sweep with --output {self.bundle.folder}"
            )
        digest = model_folders.model_digest(source, model.revision) if pulled is None else pulled[1]
        generation = (
            model_folders.generation_digest(source) if pulled is None else ""
        )  # of a hub id and its copies: in the commit
        source = source if pulled is None else str(pulled[0])
        return dataclasses.replace(
            model,
            name=_suffixed(model.name, fields),
            source=source,
            digest=digest,
            generation=generation,
        )

    def _scheme(self, name: str, fields: Sequence[tuple[str, Any, bool]]) -> Scheme:
        if name in config_files("scheme"):
            content, where = self._compose("scheme", name), str(config_files("scheme")[name])
        else:
            content, where = scheme_by_name(name, self.file.where), f"scheme {name}"
        for key, value, _ in fields:
            set_nested(content, key, value)
        scheme = self._typed(Scheme, {"name": name, **content}, where)
        scheme = dataclasses.replace(
            scheme, overrides=tuple(checked_override(o, scheme, where) for o in scheme.overrides)
        )
        for weight in (
            scheme.weight,
            *(dataclasses.replace(scheme.weight, **dict(o.weight)) for o in scheme.overrides),
        ):
            if weight.group_size == 0 or weight.group_size < -1:
                raise ConfigError(
                    f"{where}: weight.group_size {weight.group_size}: neither -1 (per output channel) nor positive"
                )
            if weight.format == "int" and not 1 <= weight.bits <= 8:
                raise ConfigError(f"{where}: weight.bits {weight.bits}: integers have 1 to 8 bits")
        return dataclasses.replace(scheme, name=_suffixed(name, fields))

    def _calibration(
        self, name: str, fields: Sequence[tuple[str, Any, bool]], seed: int
    ) -> Calibration:
        where = f"calibration {name}"
        if name in config_files("calibration"):
            content, where = (
                self._compose("calibration", name),
                str(config_files("calibration")[name]),
            )
        elif texts.resolve_path(name, self.base).exists():
            content = {"source": name}
            name = texts.resolve_path(name, self.base).name.split(".")[0]
        else:
            hint = ". A text file or a folder of splits is one too."
            raise ConfigError(
                unknown_name("calibration", name, config_files("calibration"), self.file.where)
                + hint
            )
        self._localise(content, content)
        for key, value, _ in fields:
            set_nested(content, key, value)
        if content.get("seed") is None:
            content["seed"] = seed
        self._refuse(content, ("digest",), where)
        calibration = self._typed(Calibration, {"name": name, **content}, where)
        source, digest = self._text(calibration.source, calibration.split)
        return dataclasses.replace(calibration, source=source, digest=digest)

    def _method(self, point: Point, fields: dict[str, Any]) -> Method | None:
        slots = {slot: point[slot][0] for slot in SLOTS if slot in point}
        name = point["method"][0] if "method" in point else None
        key = ("method", repr(name), repr(slots), repr([fields[slot] for slot in SLOTS]))
        return self._once(key, lambda: self._make_method(name, slots, fields))

    def _make_method(self, name: Any, slots: dict[str, Any], fields: dict[str, Any]) -> Method:
        content = self._method_yaml(self._name("method", name)) if name is not None else {}
        chosen = {slot: slots[slot] if slot in slots else content.get(slot) for slot in SLOTS}
        if name is not None and not any(content.get(slot) for slot in SLOTS):
            chosen = dict.fromkeys(SLOTS)  # the baseline stays one, whatever is edited
        parts: dict[str, Part | None] = {}
        suffixes: list[tuple[str, Any, bool]] = []
        for slot, part_name in chosen.items():
            parts[slot] = None
            if part_name is not None:
                own = (
                    content.get(f"{slot}_settings") or {} if part_name == content.get(slot) else {}
                )
                parts[slot], used = self._part(slot, self._name(slot, part_name), own, fields[slot])
                suffixes += used
        if name is None or chosen != {slot: content.get(slot) for slot in SLOTS}:
            name = self._method_name(chosen)
        return Method(_suffixed(name, suffixes), **parts)

    def _method_yaml(self, name: str) -> dict[str, Any]:
        content = self._compose("method", name, self.file.where)
        where = str(config_files("method")[name])
        known = [*SLOTS, *(f"{slot}_settings" for slot in SLOTS), "inputs"]
        for key in content:
            if key not in known:
                raise ConfigError(unknown_name("key", key, known, where))
        if content.get("inputs", INPUTS[0]) not in INPUTS:
            raise ConfigError(unknown_name("inputs", str(content["inputs"]), INPUTS, where))
        return content

    def _method_inputs(self, point: Point) -> str:
        """What the method is calibrated on as published, where neither sweep nor override says it: the YAML's `inputs`."""
        name = point["method"][0] if "method" in point else None
        if not isinstance(name, str) or name not in config_files("method"):
            return INPUTS[0]
        content = self._once(("method inputs", name), lambda: self._method_yaml(name)) or {}
        return str(content.get("inputs", INPUTS[0]))

    def _method_name(self, chosen: Mapping[str, str | None]) -> str:
        """The method of conf/method/ with these parts and no settings of its own, else the parts' names joined."""
        for name in config_files("method"):
            content = read_yaml(
                config_files("method")[name]
            )  # not composed: this is a look at every method there is
            if {slot: content.get(slot) for slot in SLOTS} == dict(chosen) and not any(
                content.get(f"{slot}_settings") for slot in SLOTS
            ):
                return name
        name = "+".join(filter(None, chosen.values())) or "none"
        if name in config_files("method"):  # of other parts: awq's rounding alone is not AWQ
            return "+".join(f"{slot}={part}" for slot, part in chosen.items() if part is not None)
        return name

    def _part(
        self, slot: str, name: str, own: Mapping[str, Any], fields: Sequence[tuple[str, Any, bool]]
    ) -> tuple[Part, list[tuple[str, Any, bool]]]:
        """The part, and those of the edited fields that it has."""
        facts = plugins.facts(slot, name, self.file.where)
        known, types = {**settings_of(slot, name)}, types_of(slot, name)
        where = f"{slot} {name}"
        if name in config_files(slot):
            where = str(config_files(slot)[name])
            content = {
                key: value for key, value in self._compose(slot, name).items() if key != "name"
            }
            known.update(checked_settings(known, content, where, types) if known else content)
        used = [(key, value, several) for key, value, several in fields if key in known]
        self.used_settings.update(f"{slot}.{key}" for key, _, _ in used)
        settings = checked_settings(
            known, {**own, **{key: value for key, value, _ in used}}, where, types
        )
        part = Part(
            name=name,
            settings=freeze(settings),
            version=facts.get("version", 1),
            needs=tuple(sorted(facts.get("needs", ()))),
            stochastic=facts.get("stochastic", False),
            activation_aware=facts.get("activation_aware", False),
        )
        return part, used

    def _check_settings_used(self, points: list[Point]) -> None:
        """A setting applies to the methods that have it; one that no method of the sweep has is a mistake."""
        asked = {
            key
            for point in points
            for key in point
            if key.partition(".")[0] in SLOTS and "." in key
        }
        for key in sorted(asked - self.used_settings):
            slot = key.partition(".")[0]
            methods = [
                value
                for (kind, *_), value in self.known.items()
                if kind == "method" and value is not None
            ]
            parts = [
                part for part in (getattr(method, slot) for method in methods) if part is not None
            ]
            known = {f"{slot}.{setting}" for part in parts for setting, _ in part.settings}
            self.problems.add(
                unknown_name(f"setting of a {slot} in this sweep", key, known, self.file.where)
            )

    # rules: which cells are left out, which come first

    def _first(self, cells: Sequence[Cell]) -> tuple[First, ...]:
        """The cells that each entry of `first` fits, with the baselines that they are compared with."""
        found = []
        for rule in filter(lambda rule: isinstance(rule, dict), self.file.first):
            fitting = [
                cell
                for cell in cells
                if all(matches(cell, key, wanted) for key, wanted in rule.items())
            ]
            keys = {cell_key(made) for cell in fitting for made in (cell, baseline_of(cell))}
            found.append(
                First(
                    ", ".join(f"{key}: {in_words(wanted)}" for key, wanted in rule.items()),
                    frozenset(keys),
                )
            )
        return tuple(found)

    def _skipped(self, cell: Cell) -> str | None:
        for rule in self.file.skip:
            if isinstance(rule, dict) and isinstance(rule.get("reason"), str) and len(rule) > 1:
                if all(
                    matches(cell, key, wanted) for key, wanted in rule.items() if key != "reason"
                ):
                    return str(rule["reason"]).strip()
        return None

    def _check_rules(self) -> None:
        for index, rule in enumerate(self.file.skip):
            where = f"{self.file.where}: skip[{index}]"
            if (
                not isinstance(rule, dict)
                or len(rule) < 2
                or not str(rule.get("reason") or "").strip()
            ):
                self.problems.add(f"{where}: axes to match and a reason are expected, not {rule!r}")
                continue
            self._check_rule(
                {key: wanted for key, wanted in rule.items() if key != "reason"}, where
            )
        for index, rule in enumerate(self.file.first):
            where = f"{self.file.where}: first[{index}]"
            if not isinstance(rule, dict) or not rule:
                self.problems.add(f"{where}: axes to match are expected, not {rule!r}")
                continue
            self._check_rule(rule, where)

    def _check_rule(self, rule: Mapping[str, Any], where: str) -> None:
        for key, wanted in rule.items():
            if not is_axis(key):
                self.problems.add(unknown_name("axis", key, AXES, where))
            elif key in GROUPS.values() and key not in ("model", "calibration"):
                self._check_rule_names(key, wanted, where)
            elif "." in key:
                self._check_rule_field(key, where)

    def _check_rule_names(self, group: str, wanted: Any, where: str) -> None:
        for name in wanted if isinstance(wanted, list) else [wanted]:
            known = config_files(group)
            parsed = (
                group == "scheme"
                and isinstance(name, str)
                and (SCHEME_NAME.fullmatch(name) or FORMAT_NAME.fullmatch(name))
            )
            if (
                isinstance(name, str)
                and not parsed
                and not fnmatch.filter(known, name)
                and not set("*?[+") & set(name)
            ):
                self.problems.add(unknown_name(group, name, known, where))

    def _check_rule_field(self, key: str, where: str) -> None:
        head, *names = key.split(".")
        kind: Any = {"model": Model, "scheme": Scheme, "calibration": Calibration}.get(head)
        if kind is None:  # a part's settings
            methods = [
                value
                for (axis, *_), value in self.known.items()
                if axis == "method" and value is not None
            ]
            parts = [
                part for part in (getattr(method, head) for method in methods) if part is not None
            ]
            known = {setting for part in parts for setting, _ in part.settings}
            if methods and names[0] not in known:
                self.problems.add(
                    unknown_name("setting", key, [f"{head}.{name}" for name in known], where)
                )
            return
        for name in names:
            fields = (
                hints_of(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else {}
            )
            if name not in fields:
                self.problems.add(unknown_name("field", name, fields, f"{where}: {key}"))
                return
            kind = next(
                (arg for arg in typing.get_args(fields[name]) if dataclasses.is_dataclass(arg)),
                fields[name],
            )

    # evaluations

    def _evaluations(self) -> tuple[Evaluation, ...]:
        entries = (
            self.file.evaluations if self.edits.evaluations is None else self.edits.evaluations
        )
        found: dict[str, Evaluation] = {}
        for entry in [*entries, *self.edits.more_evaluations]:
            with self.problems.collect():
                name, own = evaluation_entry(entry, self.file.where)
                for evaluation in self._expand(name, own, ()):
                    found.setdefault(evaluation.name, evaluation)
        for dotted in self.edits.evaluation_settings:
            if dotted != "limit" and dotted.partition(".")[0] not in found:
                self.problems.add(
                    unknown_name(
                        "evaluation",
                        dotted.partition(".")[0],
                        ["limit", *found],
                        "override evaluations",
                    )
                )
        with self.problems.collect():
            self._check_reported(found.values())
        return tuple(found.values())

    def _check_reported(self, evaluations: Iterable[Evaluation]) -> None:
        """A cell has one number of each name: parts of a benchmark, which are called by their own names, stand in one of them."""
        reporters: dict[str, str] = {}
        shared: dict[tuple[str, str], list[str]] = {}
        for evaluation in evaluations:
            for name in {
                evaluation.name,
                *parts_of(evaluation) - {dict(evaluation.settings).get("task")},
            }:
                other = reporters.setdefault(name, evaluation.name)
                if other != evaluation.name:
                    shared.setdefault((other, evaluation.name), []).append(name)
        for (first, second), names in shared.items():
            listed = ", ".join(sorted(names)[:3]) + (
                f" and {len(names) - 3} more" if len(names) > 3 else ""
            )
            self.problems.add(
                f"{self.file.where}: evaluations {first} and {second} both report {listed}; ask them in two sweeps"
            )

    def _expand(
        self, name: str, own: Mapping[str, Any], parents: tuple[str, ...], asker: str = ""
    ) -> Iterator[Evaluation]:
        if name in parents:
            raise ConfigError(
                f"evaluation {name}: the suite contains itself: {' > '.join((*parents, name))}"
            )
        self.asked.add(name)
        content = self._compose("evaluation", name, asker or self.file.where)
        where = str(config_files("evaluation")[name])
        if "suite" not in content:
            yield self._evaluation(name, content, own, where)
            return
        self._refuse(content, tuple(key for key in content if key != "suite"), where)
        members = content["suite"] if isinstance(content["suite"], list) else [content["suite"]]
        for member in members:
            with self.problems.collect():
                yield from self._expand(*evaluation_entry(member, where), (*parents, name), where)

    def _evaluation(
        self, name: str, content: dict[str, Any], own: Mapping[str, Any], where: str
    ) -> Evaluation:
        for key in content:
            if key not in ("evaluator", "settings", "limit", "local"):
                raise ConfigError(
                    unknown_name(
                        "key", key, ("evaluator", "settings", "limit", "local", "suite"), where
                    )
                )
        evaluator = self._name("evaluator", content.get("evaluator"))
        facts = plugins.facts("evaluator", evaluator, where)
        given = {**(content.get("settings") or {})}
        self._localise(given, content)
        edits = {
            dotted.partition(".")[2]: value
            for dotted, value in self.edits.evaluation_settings.items()
            if dotted.partition(".")[0] == name and "." in dotted
        }
        limit = self.edits.evaluation_settings.get(
            "limit", edits.pop("limit", content.get("limit"))
        )
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ConfigError(
                f"evaluation {name}: limit: a whole number from 1 is expected, not {limit!r}"
            )
        known = settings_of("evaluator", evaluator) or given
        settings = checked_settings(
            known, {**given, **own, **edits}, where, types_of("evaluator", evaluator)
        )
        data = self._evaluation_data(settings)
        version = facts.get("version", 1)
        task = settings.get("task")
        writes = isinstance(task, str) and task_files.generates(task, settings.get("include") or "")
        generates = bool(facts.get("generates", False)) or writes
        return Evaluation(name, evaluator, freeze(settings), version, data, limit, generates)

    def _evaluation_data(self, settings: dict[str, Any]) -> str:
        """Identity of the data that the settings name; makes their places absolute, in place."""
        if isinstance(settings.get("source"), str):
            settings["source"], digest = self._text(
                settings["source"], str(settings.get("split", "test"))
            )
            return digest
        if isinstance(settings.get("task"), str):
            for place in ("data_root", "include"):
                if settings.get(place) and settings[place] != texts.DEMO:
                    settings[place] = str(texts.resolve_path(settings[place], self.base))
            members = task_files.members(settings["task"], settings.get("include") or "")
            if "revisions" in settings:
                settings["revisions"] = (
                    self._revisions(members, settings["revisions"] or {}, settings.get("data_root"))
                    or None
                )
            return task_digest(members, settings, self.bundle)
        return ""

    def _revisions(
        self, members: Sequence[TaskFile], given: Mapping[str, str], data_root: str | None
    ) -> dict[str, str]:
        """The commits of the data sets that benchmarks read from the hub: the task's own revision, else a given one, else a pin."""
        found = {}
        for member in members:
            if (
                member.data_set is None
                or member.data_set in found
                or task_files.local_data(member, data_root) is not None
            ):
                continue
            revision = (
                member.revision or given.get(member.data_set) or self._pins().get(member.data_set)
            )
            commit = self._once(
                ("commit", member.data_set, revision),
                functools.partial(hub.hub_commit, member.data_set, "dataset", revision),
            )
            if commit is not None:
                found[member.data_set] = commit
        return found

    # data, runtime, tables

    def _localise(self, target: dict[str, Any], content: dict[str, Any]) -> None:
        """With data.root, what a YAML's `local` says replaces where its data lies; {root} is that folder. Removes `local`.

        Where data.root is a bundle, texts of the hub lie where its index says: `_text` looks there.
        """
        local = content.pop("local", None) or {}
        if self.runtime is None or self.runtime.data_root is None:
            return
        if self.bundle is not None and str(target.get("source")).startswith("hub:"):
            return
        root = str(self.runtime.data_root)
        target.update(
            {
                key: value.replace("{root}", root) if isinstance(value, str) else value
                for key, value in local.items()
            }
        )

    def _text(self, source: str, split: str) -> tuple[str, str]:
        """Where a text is read and its digest. Of the hub: its source at a commit, or the bundle's copy under the same digest."""
        if not source.startswith("hub:"):
            is_named = source in (texts.DEMO, texts.RANDOM_ASCII, texts.RANDOM_TOKENS)
            place = source if is_named else str(texts.resolve_path(source, self.base))
            return place, texts.corpus_digest(place, split)
        pinned = texts.pin(source, self._pins(), ask=self.bundle is None)
        if self.bundle is None:
            return pinned, texts.corpus_digest(pinned, split)
        found = self.bundle.text(pinned, split)
        if found is None:
            raise ConfigError(
                f"{self.bundle.folder} has no text {pinned}, split {split}: it was pulled for another sweep; "
                f"run `harness data pull` for this one with --output {self.bundle.folder}"
            )
        return str(found[0]), texts.corpus_digest(found[1], split)

    def _pins(self) -> Mapping[str, str]:
        """Data set -> commit, of conf/data_sets.yaml; the first root that names a data set counts."""
        return self._once("pins", data_set_commits) or {}

    def _typed(self, kind: type[T], content: dict[str, Any], where: str) -> T:
        problems = Problems()
        value = typed(kind, content, where, problems)
        if value is None:
            raise ConfigError("\n".join(problems.found))
        return value

    def _refuse(self, content: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
        for key in keys:
            if key in content:
                raise ConfigError(f"{where}: {key} cannot be set")

    def _runtime(self) -> Runtime | None:
        given = {**self.file.runtime, **self.edits.runtime}
        problems = Problems()
        choices = []
        for group in ("cluster", "tracking"):
            name = given.pop(group, None)
            if isinstance(name, str) and name not in config_files(group):
                problems.add(unknown_name(group, name, config_files(group), self.file.where))
            elif isinstance(name, str):
                choices.append(f"{group}={name}")
            elif name is not None:
                problems.add(f"{self.file.where}: {group}: a name is expected, not {name!r}")
        runtime = None
        if not problems.found:
            with problems.collect():
                runtime = self._make_runtime(choices, given, problems)
        for problem in problems.found:
            self.problems.add(problem)
        return runtime

    def _make_runtime(
        self, choices: list[str], given: Mapping[str, Any], problems: Problems
    ) -> Runtime | None:
        root = next(root for root in config_roots() if (root / "config.yaml").is_file())
        content = compose_with_hydra(root, "config", choices)
        from_file = {key for key in self.file.runtime if key not in self.edits.runtime}
        for key, value in given.items():
            set_nested(content, key, value)
        data = content.pop("data", None) or {}
        unknown = [key for key in data if key != "root"]
        for key in unknown:
            problems.add(unknown_name("key", f"data.{key}", ["data.root"], self.file.where))
        content["data_root"] = data.get("root")
        place = content.get("runs")  # a URL must not become a path on the way
        runtime = typed(
            Runtime, content, self.file.where if given else str(root / "config.yaml"), problems
        )
        if runtime is None:
            return None
        if runtime.device != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", runtime.device):
            problems.add(
                unknown_name(
                    "device",
                    runtime.device,
                    ("auto", "cpu", "cuda", "cuda:<number>"),
                    self.file.where,
                )
            )
        data_root = None
        if runtime.data_root is not None:
            data_root = texts.resolve_path(
                str(runtime.data_root), self.base if "data.root" in from_file else None
            )
            if not data_root.is_dir():
                problems.add(f"{self.file.where}: data.root: {data_root} is not a folder")
        if runtime.store.quota:
            with problems.collect():
                bytes_of(runtime.store.quota, f"{self.file.where}: store.quota")
        return dataclasses.replace(runtime, runs=place_of(str(place)), data_root=data_root)

    def _tables(self, evaluations: tuple[Evaluation, ...]) -> tuple[Table, ...]:
        tables: list[Table] = []
        for index, entry in enumerate(self.file.tables):
            where = f"{self.file.where}: tables[{index}]"
            if not isinstance(entry, dict):
                self.problems.add(
                    f"{where}: a mapping with name and columns is expected, not {entry!r}"
                )
                continue
            table = typed(Table, {**entry, "columns": []}, where, self.problems)
            columns = entry.get("columns") or []
            for number, column in enumerate(columns if isinstance(columns, list) else [columns]):
                content = {"metric": column} if isinstance(column, str) else column
                checked = typed(Column, content, f"{where}: columns[{number}]", self.problems)
                if table is not None and checked is not None:
                    table = dataclasses.replace(table, columns=(*table.columns, checked))
            if table is not None:
                tables.append(self._checked_table(table, evaluations, where))
        names = [table.name for table in tables]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.problems.add(f"{self.file.where}: two tables are called {name}")
        for name in names:
            if not re.fullmatch(r"\w[\w. -]*", name):
                self.problems.add(
                    f'{self.file.where}: table "{name}": it becomes a file name; letters, digits, . _ - only'
                )
        return tuple(tables)

    def _checked_table(
        self, table: Table, evaluations: tuple[Evaluation, ...], where: str
    ) -> Table:
        by_name = {evaluation.name: evaluation for evaluation in evaluations}
        columns = []
        for column in table.columns:
            if column.metric == "published":
                if (
                    not (column.reason or table.absent)
                    or not column.published
                    or not table.published
                ):
                    self.problems.add(
                        f"{where}: column {column.title or column.metric}: needs `published` and `reason`"
                    )
                columns.append(column)
                continue
            for metric in column.of if column.metric == "mean" else (column.metric,):
                head, _, leaf = metric.partition("/")
                replaced = (
                    self.edits.evaluations is not None
                )  # a narrowed run keeps the file's table, with gaps
                known_head = head in (
                    *self.asked,
                    "checkpoint",
                    "quantize",
                ) or head in self._parts_of_benchmarks(evaluations)
                if not leaf or (not known_head and not replaced):
                    known = [*by_name, "checkpoint/bits_per_weight", "quantize/seconds", "mean"]
                    self.problems.add(
                        unknown_name("evaluation for the column", metric, known, where)
                    )
                elif head in by_name and column.higher_is_better is None:
                    known_metrics = plugins.facts("evaluator", by_name[head].evaluator).get(
                        "metrics", {}
                    )
                    better = known_metrics.get(leaf, {}).get("higher_is_better")
                    column = dataclasses.replace(column, higher_is_better=better)
            if column.weights and len(column.weights) != len(column.of):
                self.problems.add(
                    f"{where}: column {column.metric}: {len(column.weights)} weights for {len(column.of)} metrics"
                )
            columns.append(column)
        if table.published and not any(
            (root / f"{table.published}.yaml").is_file()
            for root in published_folders(self.file.path)
        ):
            self.problems.add(f"{where}: no sweeps/published/{table.published}.yaml")
        return dataclasses.replace(table, columns=tuple(columns))

    def _check_models(self, tables: Sequence[Table], known: Iterable[str]) -> None:
        """Tables speak of models that the sweep has; a run that was narrowed to some models keeps the file's tables, with gaps."""
        if "model" in self.edits.axes:
            return
        names = sorted(known)
        for index, table in enumerate(tables):
            for name in dict.fromkeys(
                (*table.models, *(column.model for column in table.columns if column.model))
            ):
                if name not in names:
                    self.problems.add(
                        unknown_name("model", name, names, f"{self.file.where}: tables[{index}]")
                    )

    def _parts_of_benchmarks(self, evaluations: tuple[Evaluation, ...]) -> frozenset[str]:
        """Names of the groups and tasks that the sweep's benchmarks consist of; they have metrics of their own."""
        return frozenset[str]().union(*map(parts_of, evaluations))

    def _findings(self, tables: tuple[Table, ...]) -> tuple[Finding, ...]:
        found = []
        names = {
            table.name: {
                name for c in table.columns for name in (c.title, c.published, c.metric) if name
            }
            for table in tables
        }
        for index, entry in enumerate(self.file.findings):
            where = f"{self.file.where}: findings[{index}]"
            finding = typed(Finding, entry, where, self.problems)
            if finding is None:
                continue
            asked = [
                each
                for each in ("better", "above", "value", "loss", "excess")
                if getattr(finding, each)
            ]
            if len(asked) != 1:
                self.problems.add(
                    f"{where}: one of better, above, value, loss and excess is expected, not {asked or 'none'}"
                )
            places = (
                [place_of_term(term, finding) for each in asked for term in getattr(finding, each)]
                if not finding.relate
                else []
            )
            places += [
                reference.partition("/")[::2] for reference in (*finding.relate, *finding.over)
            ]
            for table, column in places:
                if table not in names:
                    self.problems.add(unknown_name("table", table, names, where))
                elif column not in names[table]:
                    self.problems.add(
                        unknown_name("column", column, names[table], f"{where}: table {table}")
                    )
            found.append(finding)
        return tuple(found)

    def _ad_hoc_title(self, cells: Sequence[Cell]) -> str:
        def distinct(names: Iterable[str]) -> str:
            return ", ".join(dict.fromkeys(names))

        quantized = [cell for cell in cells if not cell.method.is_baseline] or cells
        axes = (
            distinct(cell.model.name for cell in cells),
            distinct(cell.method.name for cell in quantized),
            distinct(cell.scheme.name for cell in quantized),
        )
        return " × ".join(axes)


def _suffixed(name: str, fields: Sequence[tuple[str, Any, bool]]) -> str:
    """The name with the fields in which cells of one sweep differ: "gptq[damping_fraction=0.1]"."""
    varied = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value, several in fields if several]
    return f"{name}[{','.join(varied)}]" if varied else name
