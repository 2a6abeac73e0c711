"""From YAML and overrides to a checked sweep.

    sweeps/<name>.yaml + overrides  ->  axes of every grid  ->  each axis value composed once  ->  their product  ->  frozen cells

A sweep of a thousand cells has about forty distinct axis values, and Hydra takes 60 to 140 ms for each composition. It therefore
composes config.yaml and only those values whose YAML has a `defaults` list; this module takes the product. Values are checked
against the dataclasses of core/cell.py and core/sweep.py, settings of plugins against their YAML and source.
One ConfigError reports all problems of a sweep: file, key, value and the nearest name that exists.
The language of a sweep file and of overrides is described in docs/sweeps.md.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.config.axes import EDITABLE, INPUTS, SLOTS
from harness.config.budgets import read_budgets
from harness.config.context import (
    Context,
    Fields,
    T,
    checked,
    checked_name,
    composed,
    localise,
    once,
    refuse_keys,
    text_of,
    varied,
)
from harness.config.evaluations import read_evaluations
from harness.config.locations import config_files, listing, unknown_config
from harness.config.overrides import Edits, parse_overrides
from harness.config.rules import check_rules, first_cells, skip_reason
from harness.config.runtime import read_runtime
from harness.config.schemes import read_scheme
from harness.config.sweep_file import Grid, SweepFile, read_sweep_file, sweep_path
from harness.config.tables import check_models, read_findings, read_tables
from harness.config.typed import Problems, checked_settings, set_nested, settings_of, types_of
from harness.config.yaml_files import read_yaml
from harness.core import plugins
from harness.core.budget import Budget
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
    digest,
    has_static_scales,
    make_part,
    to_json,
)
from harness.core.errors import ConfigError, unknown_name
from harness.core.labels import with_settings, with_variants, without_settings
from harness.core.sweep import Runtime, Skip, Sweep
from harness.data import hub, model_folders, texts
from harness.data.bundle import Bundle

METHODS = ("method", "rounding")  # axes whose override replaces the methods of a grid
Point = dict[str, tuple[Any, bool]]  # axis of a grid -> (value, whether the axis has several)


# --- what others call ----------------------------------------------------------------------------------------------------------


def load_sweep(name: str | None, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a file (a name below sweeps/ or a path) with overrides applied; without a name, the grid of the overrides.

    Reads configurations, facts of plugins, and model folders and corpora for their digests. Starts nothing, and writes only
    a cache of digests. Raises ConfigError with every problem.
    """
    problems = Problems()
    file = SweepFile() if name is None else read_sweep_file(sweep_path(name), problems)
    edits = parse_overrides(overrides, problems)
    problems.check()
    return _sweep(_context(file, edits, problems), tuple(overrides))


# --- from axes to cells --------------------------------------------------------------------------------------------------------


AD_HOC_NAME_LENGTH = 48  # without its digest


def _context(file: SweepFile, edits: Edits, problems: Problems) -> Context:
    context = Context(file, edits, problems)
    context.runtime = read_runtime(context)
    if context.runtime is not None and context.runtime.data_root is not None:
        with problems.collect():
            context.bundle = Bundle.open(context.runtime.data_root)
    return context


def _sweep(context: Context, overrides: tuple[str, ...]) -> Sweep:
    evaluations = read_evaluations(context)
    asked = _budget_points(context)
    points = [point for grid in context.file.grids for point in _points(context, grid)]
    cells, skips = _cells(context, [*points, *itertools.chain.from_iterable(asked)], evaluations)
    budgets = _budgets(context, asked, cells, evaluations)
    _check_settings_used(context, points)
    check_rules(context)
    tables = read_tables(context, evaluations)
    named = {str(point["model"][0]) for point in points if "model" in point}
    check_models(context, tables, named | {cell.model.name for cell in cells})
    findings = read_findings(context, tables)
    context.problems.found = dict.fromkeys(map(context.edits.blamed, context.problems.found))
    context.problems.check()
    file = context.file
    title = file.title or _ad_hoc_title(cells)
    return Sweep(
        name=file.path.stem if file.path is not None else _ad_hoc_name(title, cells),
        title=title,
        description=file.description,
        cells=cells,
        skips=skips,
        tables=tables,
        runtime=typing.cast(Runtime, context.runtime),
        path=file.path,
        overrides=overrides,
        findings=findings,
        first=first_cells(context, cells),
        budgets=budgets,
        method_titles=_method_titles(context, cells),
    )


def _method_titles(context: Context, cells: Sequence[Cell]) -> dict[str, str]:
    """Method -> the `title` of its YAML; of parts that were put together, their titles with a plus between them."""
    titles = {}
    for name in {without_settings(cell.method.name) for cell in cells}:
        parts = [part.rpartition("=")[2] for part in name.split("+")]
        known = [
            composed(context, "method", part).get("title")
            if part in config_files("method")
            else None
            for part in parts
        ]
        if any(known):
            titles[name] = " + ".join(
                title or part for title, part in zip(known, parts, strict=True)
            )
    return titles


def _budget_points(context: Context) -> list[list[Point]]:
    """The candidates of each budget. An override of methods or schemes leaves budgets out; grids of candidates are then plain ones,
    where the file has no other.
    """
    if {axis.partition(".")[0] for axis in context.edits.axes} & {"method", *SLOTS, "scheme"}:
        if not context.file.grids:
            context.file.grids = [each.candidates for each in context.file.budgets]
        context.file.budgets = []
    return [list(_points(context, each.candidates)) for each in context.file.budgets]


def _budgets(
    context: Context,
    asked: list[list[Point]],
    cells: Sequence[Cell],
    evaluations: tuple[Evaluation, ...],
) -> tuple[Budget, ...]:
    """The budgets of the sweep; their candidates are cells of the sweep, unless a rule skips them."""
    known = {cell_key(cell): cell for cell in cells}
    wanted = []
    for entry, points in zip(context.file.budgets, asked, strict=True):
        found: dict[str, tuple[Cell, Calibration | None]] = {}
        for point in points:
            cell = _cell(context, point)
            if cell is not None and cell_key(cell) in known:
                found[cell_key(cell)] = known[cell_key(cell)], _windows_of(context, point, cell)
        wanted.append((entry, list(found.values())))
    return read_budgets(context, wanted, evaluations)


def _windows_of(context: Context, point: Point, cell: Cell) -> Calibration | None:
    """The calibration of a point, also where its method needs none: a budget measures on its windows."""
    if cell.calibration is not None or point.get("calibration", (None, False))[0] is None:
        return cell.calibration
    fields = tuple(
        (key.partition(".")[2], value, several)
        for key, (value, several) in point.items()
        if key.startswith("calibration.")
    )
    make = functools.partial(_calibration, seed=cell.seed)
    return _resolve(context, "calibration", point, {"calibration": fields}, make, cell.seed)


def _points(context: Context, grid: Grid) -> Iterator[Point]:
    """Every point of a grid: axis -> (value, whether the axis has several).

    Settings that a grid states belong to its own methods: with a method of an override that it does not name they are left out.
    """
    edits = dict(context.edits.axes)
    own = [v for axes in (grid.axes, *grid.zips) for k in METHODS for v in axes.get(k, ())]
    dropped = set(edits)
    if set(METHODS) & set(edits):
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
            [{key: (value, True) for key, value in zip(paired, row, strict=True)} for row in rows]
        )
    steps.extend(
        [{key: (value, len(values) > 1)} for value in values] for key, values in axes.items()
    )
    for combination in itertools.product(*steps):
        point = {key: value for step in combination for key, value in step.items()}
        replaced = [point[key][0] for key in METHODS if key in edits]
        if replaced and not any(name in own for name in replaced):
            point = {
                key: value
                for key, value in point.items()
                if key in edits or key.partition(".")[0] not in SLOTS
            }
        yield point


def _cells(
    context: Context, points: list[Point], evaluations: tuple[Evaluation, ...]
) -> tuple[tuple[Cell, ...], tuple[Skip, ...]]:
    cells: dict[tuple[str, str], Cell] = {}
    skipped: dict[str, dict[str, None]] = {}
    for point in points:
        cell = _cell(context, point)
        if cell is None:
            continue
        cell = dataclasses.replace(cell, evaluations=evaluations)
        reason = skip_reason(context, cell)
        if reason is not None:
            skipped.setdefault(reason, {}).setdefault(cell.title)
            continue
        baseline = (
            context.edits.baseline if context.edits.baseline is not None else context.file.baseline
        )
        for made in (baseline_of(cell), cell) if baseline else (cell,):
            cells.setdefault((cell_key(made), made.title), made)
    if not cells and not context.problems.found:
        context.problems.add(
            f"{context.file.where}: every cell is skipped"
            if skipped
            else f"{context.file.where}: there are no cells"
        )
    return with_variants(cells.values()), tuple(
        Skip(tuple(titles), reason) for reason, titles in skipped.items()
    )


def _cell(context: Context, point: Point) -> Cell | None:
    missing = [axis for axis in ("model",) if axis not in point]
    if not {"method", "rounding", "reduction"} & set(point):
        missing.append("method")
    for axis in missing:
        context.problems.add(
            f"{context.file.where}: no {axis}; add {axis}=<name> (`{listing(axis)}` lists all)"
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
        point["inputs"][0] if "inputs" in point else _method_inputs(context, point),
    )
    if type(seed) is not int or seed < 0:
        context.problems.add(
            f"{context.file.where}: seed: a whole number from 0 is expected, not {seed!r}"
        )
    if inputs not in INPUTS:
        context.problems.add(unknown_name("inputs", str(inputs), INPUTS, context.file.where))
    model = _resolve(context, "model", point, fields, _model)
    method = _method(context, point, fields)
    if method is not None and method.is_baseline:
        return None if model is None else baseline_of(Cell(model, method, Scheme("full")))
    scheme = (
        Scheme("full")  # as the baseline has, whatever scheme is named
        if method is not None and not method.quantizes
        else _quantizing_scheme(context, point, fields, method)
    )
    calibrated = _calibrated(method, scheme)
    calibration = _calibration_of(context, point, fields, method, seed) if calibrated else None
    if model is None or method is None or scheme is None or (calibrated and calibration is None):
        return None
    return Cell(model, method, scheme, calibration, inputs=inputs, seed=seed)


def _quantizing_scheme(
    context: Context, point: Point, fields: dict[str, Any], method: Method | None
) -> Scheme | None:
    name, where = point.get("scheme", (None, False))[0], context.file.where
    if name is not None and name != "full":
        return _resolve(context, "scheme", point, fields, read_scheme)
    if name is None:
        context.problems.add(
            f"{where}: a method that quantizes needs a scheme; add scheme=<name> (w4, w4g128, w8a8, …)"
        )
    elif method is not None:
        context.problems.add(
            f"{where}: scheme full belongs to method none, not to {method.name}; the full-precision cell is always added"
        )
    return None


def _calibrated(method: Method | None, scheme: Scheme | None) -> bool:
    static = scheme is not None and has_static_scales(scheme)
    return static or (method is not None and method.uses_calibration)


def _calibration_of(
    context: Context, point: Point, fields: dict[str, Any], method: Method | None, seed: int
) -> Calibration | None:
    if point.get("calibration", (None, False))[0] is None:
        needs = ", ".join(method.all_needs) if method is not None else ""
        needs = f" ({needs})" if needs else ""
        who = (
            f"method {method.name}{needs}"
            if method is not None and needs
            else "a scheme with static scales"
        )
        context.problems.add(
            f"{context.file.where}: {who} needs calibration data; add calibration=<name> (`{listing('calibration')}` lists all)"
        )
        return None
    return _resolve(
        context, "calibration", point, fields, functools.partial(_calibration, seed=seed), seed
    )


def _resolve(
    context: Context,
    axis: str,
    point: Point,
    fields: dict[str, Any],
    make: Callable[[Context, str, Fields], T],
    *more: Any,
) -> T | None:
    name = point[axis][0]
    key = (axis, repr(name), repr(fields[axis]), *more)
    return once(
        context, key, lambda: make(context, checked_name(context, axis, name), fields[axis])
    )


def _model(context: Context, name: str, fields: Fields) -> Model:
    name, content, where = _model_content(context, name)
    for key, value, _ in fields:
        set_nested(content, key, value)
    content = {"name": name, **content}
    refuse_keys(content, ("digest", "base_digest"), where)
    model = checked(Model, content, where)
    source, digest = _located(context, model, where)
    local = context.bundle is None or context.bundle.model(model.source) is None
    # of a hub id and its copies: in the commit
    generation = model_folders.generation_digest(source) if local else ""
    base, base_digest = _base(context, model.base, where)
    return dataclasses.replace(
        model,
        name=with_settings(model.name, varied(fields)),
        source=source,
        digest=digest,
        generation=generation,
        base=base,
        base_digest=base_digest,
    )


def _base(context: Context, name: str, where: str) -> tuple[str, str]:
    """Where the base of a fine-tune lies, and the digest of its weights; ("", "") for no base.

    name: a model of conf/model/, a folder or a hub id, as `model` takes them.
    """
    if not name:
        return "", ""
    name, content, place = _model_content(context, name)
    model = checked(Model, {"name": name, **content}, place)
    return _located(context, model, f"{where}: base")


def _model_content(context: Context, name: str) -> tuple[str, dict[str, Any], str]:
    """The name of a model, its mapping and where that is written. Raises ConfigError for an unknown name."""
    if name in config_files("model"):
        content, where = composed(context, "model", name), str(config_files("model")[name])
    elif texts.resolve_path(name, context.base).is_dir():
        content, where = {"source": name}, f"model {name}"
        name = texts.resolve_path(name, context.base).resolve().name
    elif name.startswith((f"{texts.DEMO}:", f"{texts.TINY}:")):
        content, where = {"source": name}, f"model {name}"
        name = name.replace(":", "_")
    elif hub.HUB_ID.fullmatch(name) and not name.startswith("."):
        content, where = {"source": name}, f"model {name}"
        name = name.rsplit("/", 1)[1]
    else:
        hint = " A folder or a hub id owner/name is also a model."
        raise ConfigError(unknown_config("model", name, context.file.where) + hint)
    return name, content, where


def _located(context: Context, model: Model, where: str) -> tuple[str, str]:
    """The source of a model as it is read (a folder of the bundle where that has it), and the digest of its weights."""
    source = model.source
    path = texts.resolve_path(source, context.base)
    is_hub_id = hub.HUB_ID.fullmatch(source) and not path.exists()
    if source.partition(":")[0] not in (texts.DEMO, texts.TINY) and not is_hub_id:
        source = str(path)
    pulled = context.bundle.model(source) if context.bundle is not None else None
    asked = model.revision or ""
    if (
        context.bundle is not None
        and pulled is not None
        and hub.COMMIT.fullmatch(asked)
        and asked != pulled[1]
    ):
        raise ConfigError(
            f"{where}: revision {asked} is requested, but {context.bundle.folder} has commit {pulled[1]} of "
            f"{source}; run `harness data pull` for this sweep with --output {context.bundle.folder}"
        )
    if pulled is not None:
        return str(pulled[0]), pulled[1]
    return source, model_folders.model_digest(source, model.revision)


def _calibration(context: Context, name: str, fields: Fields, seed: int) -> Calibration:
    where = f"calibration {name}"
    if name in config_files("calibration"):
        content, where = (
            composed(context, "calibration", name),
            str(config_files("calibration")[name]),
        )
    elif texts.resolve_path(name, context.base).exists():
        content = {"source": name}
        name = texts.resolve_path(name, context.base).name.split(".")[0]
    else:
        hint = " A text file or a folder of splits is also a calibration."
        raise ConfigError(unknown_config("calibration", name, context.file.where) + hint)
    localise(context, content, content)
    for key, value, _ in fields:
        set_nested(content, key, value)
    if content.get("seed") is None:
        content["seed"] = seed
    refuse_keys(content, ("digest",), where)
    calibration = checked(Calibration, {"name": name, **content}, where)
    source, digest = text_of(context, calibration.source, calibration.split)
    return dataclasses.replace(calibration, source=source, digest=digest)


def _method(context: Context, point: Point, fields: dict[str, Any]) -> Method | None:
    slots = {slot: point[slot][0] for slot in SLOTS if slot in point}
    name = point["method"][0] if "method" in point else None
    key = ("method", repr(name), repr(slots), repr([fields[slot] for slot in SLOTS]))
    return once(context, key, lambda: _make_method(context, name, slots, fields))


def _make_method(
    context: Context, name: Any, slots: dict[str, Any], fields: dict[str, Any]
) -> Method:
    content = (
        _method_yaml(context, checked_name(context, "method", name)) if name is not None else {}
    )
    chosen = {slot: slots[slot] if slot in slots else content.get(slot) for slot in SLOTS}
    if name is not None and not any(content.get(slot) for slot in SLOTS):
        chosen = dict.fromkeys(SLOTS)  # the baseline stays one, whatever is edited
    parts: dict[str, Part | None] = {}
    suffixes: list[tuple[str, Any, bool]] = []
    for slot, part_name in chosen.items():
        parts[slot] = None
        if part_name is not None:
            own = content.get(f"{slot}_settings") or {} if part_name == content.get(slot) else {}
            parts[slot], used = _part(
                context, slot, checked_name(context, slot, part_name), own, fields[slot]
            )
            suffixes += used
    if name is None or chosen != {slot: content.get(slot) for slot in SLOTS}:
        name = _method_name(context, chosen)
    made: dict[str, Any] = dict(parts)
    return Method(with_settings(name, varied(suffixes)), **made)


def _method_yaml(context: Context, name: str) -> dict[str, Any]:
    content = composed(context, "method", name, context.file.where)
    where = str(config_files("method")[name])
    known = [*SLOTS, *(f"{slot}_settings" for slot in SLOTS), "inputs", "title"]
    for key in content:
        if key not in known:
            raise ConfigError(unknown_name("key", key, known, where))
    if not isinstance(content.get("title", ""), str):
        raise ConfigError(f"{where}: title: a text is expected, not {content['title']!r}")
    if content.get("inputs", INPUTS[0]) not in INPUTS:
        raise ConfigError(unknown_name("inputs", str(content["inputs"]), INPUTS, where))
    return content


def _method_inputs(context: Context, point: Point) -> str:
    """The `inputs` of the method's YAML (its published calibration), used if neither sweep nor override sets `inputs`."""
    name = point["method"][0] if "method" in point else None
    if not isinstance(name, str):
        return INPUTS[0]

    def read() -> dict[str, Any]:
        return _method_yaml(context, name) if name in config_files("method") else {}

    content = once(context, ("method inputs", name), read) or {}
    return str(content.get("inputs", INPUTS[0]))


def _method_name(context: Context, chosen: Mapping[str, str | None]) -> str:
    """The name of the method in conf/method/ with these parts and no settings; the joined names of the parts if there is none."""
    for name in config_files("method"):
        # not composed: this is a look at every method there is
        content = read_yaml(config_files("method")[name])
        if {slot: content.get(slot) for slot in SLOTS} == dict(chosen) and not any(
            content.get(f"{slot}_settings") for slot in SLOTS
        ):
            return name
    name = "+".join(filter(None, chosen.values())) or "none"
    if name in config_files("method"):  # of other parts: awq's rounding alone is not AWQ
        return "+".join(f"{slot}={part}" for slot, part in chosen.items() if part is not None)
    return name


def _part(
    context: Context, slot: str, name: str, own: Mapping[str, Any], fields: Fields
) -> tuple[Part, list[tuple[str, Any, bool]]]:
    """The part with its settings checked, and the edited fields that are settings of this part."""
    facts = plugins.facts(slot, name, context.file.where)
    known, types = {**settings_of(slot, name)}, types_of(slot, name)
    where = f"{slot} {name}"
    if name in config_files(slot):
        where = str(config_files(slot)[name])
        content = {
            key: value for key, value in composed(context, slot, name).items() if key != "name"
        }
        known.update(checked_settings(known, content, where, types) if known else content)
    used = [each for each in fields if each[0].partition(".")[0] in known]
    context.used_settings.update(f"{slot}.{key}" for key, _, _ in used)
    settings = checked_settings(known, _edited(known, own, used), where, types)
    if facts.get("wraps", False):
        settings["base_settings"] = _base_settings(context, slot, settings, where)
    return make_part(slot, name, settings), used


def _edited(known: Mapping[str, Any], own: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """The settings that a method's YAML gives a part (`own`), edited by fields; "base_settings.grid" edits one entry of a mapping.

    known: the settings of the part's own YAML. Settings of one base are dropped where the fields name another base.
    """
    given = copy.deepcopy(dict(own))
    for key, value, _ in sorted(fields, key=lambda each: (each[0] != "base", "." in each[0])):
        head = key.partition(".")[0]
        changed = key == "base" and value != given.get("base", known["base"])
        if changed and "base_settings" in known:
            given["base_settings"] = {}
        elif key != head and isinstance(known[head], dict):
            given.setdefault(head, copy.deepcopy(known[head]))
        set_nested(given, key, value)
    return given


def _base_settings(
    context: Context, slot: str, settings: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """All settings of the base of a part around another: those of the base's YAML, with the part's `base_settings` over them."""
    name, given = settings["base"], settings["base_settings"]
    try:
        base, _ = _part(context, slot, checked_name(context, slot, name), given, ())
    except ConfigError as error:
        lines = (f"{where}: base {name}: {line}" for line in str(error).split("\n"))
        raise ConfigError("\n".join(lines)) from error
    return dict(to_json(base)["settings"])


def _check_settings_used(context: Context, points: list[Point]) -> None:
    """Adds a problem for each edited setting that no method of the sweep has.

    Where an override chooses other methods, settings of the file may belong to methods that it leaves out: only typed ones count.
    """
    asked = {
        key for point in points for key in point if key.partition(".")[0] in SLOTS and "." in key
    }
    if {"method", *SLOTS} & set(context.edits.axes):
        asked &= set(context.edits.axes)
    for key in sorted(asked - context.used_settings):
        slot = key.partition(".")[0]
        methods = [
            value
            for (kind, *_), value in context.values.items()
            if kind == "method" and value is not None
        ]
        parts = [part for part in (getattr(method, slot) for method in methods) if part is not None]
        known = {f"{slot}.{setting}" for part in parts for setting, _ in part.settings}
        context.problems.add(
            unknown_name(f"setting of a {slot} in this sweep", key, known, context.file.where)
        )


def _ad_hoc_name(title: str, cells: Sequence[Cell]) -> str:
    """A name for a grid without a file, safe as a file name: its title, and a digest of its cells in any order.

    The same grid has the same name whatever its evaluations and wherever it runs; another grid has another.
    """
    words = re.sub(r"[^\w.]+", "-", title, flags=re.ASCII).strip("-.")[:AD_HOC_NAME_LENGTH]
    return f"{words.rstrip('-.') or 'grid'}-{digest(sorted(map(cell_key, cells)))[:8]}"


def _ad_hoc_title(cells: Sequence[Cell]) -> str:
    def distinct(names: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(names))

    quantized = [cell for cell in cells if not cell.method.is_baseline] or cells
    axes = (
        distinct(cell.model.name for cell in cells),
        distinct(cell.method.name for cell in quantized),
        distinct(cell.scheme.name for cell in quantized),
    )
    return " × ".join(axes)
