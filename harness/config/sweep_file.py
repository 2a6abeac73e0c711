"""Reading a sweep file: axes are sorted by grid, all other keys are kept for the modules that check them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.axes import AXES, EDITABLE, RUNTIME
from harness.config.locations import config_files, head_comment, unknown_config
from harness.config.overrides import override_values
from harness.config.renamed import current_key, current_name, current_names
from harness.config.typed import Problems
from harness.config.yaml_files import one_line, read_text, read_yaml
from harness.core.errors import ConfigError, unknown_name


@dataclass
class SweepFile:
    """The content of a sweep file: the axes of each grid, and all other keys unchecked."""

    path: Path | None = None
    title: str = ""
    description: str = ""
    grids: list[Grid] = field(default_factory=lambda: [Grid({}, [])])
    skip: list[dict[str, Any]] = field(default_factory=list)
    first: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    findings: list[Any] = field(default_factory=list)
    budgets: list[BudgetGrid] = field(default_factory=list)
    runtime: dict[str, Any] = field(default_factory=dict)
    baseline: bool = True

    @property
    def where(self) -> str:
        return str(self.path) if self.path is not None else "command line"


@dataclass
class BudgetGrid:
    """One entry of `budgets`: the grid of its candidates, all other keys unchecked, and where it stands."""

    content: dict[str, Any]
    candidates: Grid
    where: str


@dataclass
class Grid:
    """One grid. axes: axis or dotted field -> values; zips: groups of axes whose values are paired."""

    axes: dict[str, list[Any]]
    zips: list[dict[str, list[Any]]]


def sweep_path(name: str) -> Path:
    """The file of a sweep, given its name or path. Raises ConfigError with the nearest names if there is none."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"sweep {name}: no such file")
        return path.absolute()
    known = config_files("sweeps")
    if name not in known:
        raise ConfigError(unknown_config("sweeps", name))
    return known[name]


def read_sweep_file(path: Path, problems: Problems) -> SweepFile:
    """A sweep file with its keys checked; errors go to `problems`."""
    content = {current_key(key): value for key, value in read_yaml(path).items()}
    comment = head_comment(read_text(path))
    file = SweepFile(
        path=path,
        title=comment[0] if comment else path.stem,
        description="\n".join(comment[1:]).strip(),
    )
    shared: dict[str, list[Any]] = {}
    for key, value in content.items():
        where = f"{path}: {key}"
        if is_axis(key):
            with problems.collect():
                shared[key] = _axis_values(key, value, where)
        elif key.partition(".")[0] in RUNTIME:
            entries = value.items() if isinstance(value, dict) else [("", value)]
            file.runtime.update({f"{key}.{name}" if name else key: item for name, item in entries})
        elif key in ("skip", "first", "evaluations", "tables", "findings"):
            listed = value if isinstance(value, list) else [] if value is None else [value]
            setattr(file, key, [_with_current_names(key, entry) for entry in listed])
        elif key == "baseline" and isinstance(value, bool):
            file.baseline = value
        elif key not in ("grids", "budgets"):
            known = [
                *AXES,
                "grids",
                "skip",
                "first",
                "evaluations",
                "tables",
                "findings",
                "budgets",
                "baseline",
                *RUNTIME,
            ]
            problems.add(unknown_name("key", key, known, str(path)))
    budgets = content.get("budgets") or []
    for index, entry in enumerate(budgets if isinstance(budgets, list) else [budgets]):
        with problems.collect():
            file.budgets.append(_read_budget(entry, shared, f"{path}: budgets[{index}]", problems))
    # shared axes alone are a grid, unless they serve budgets only
    alone = not file.budgets or shared.keys() & {"method", "rounding"}
    grids = content.get("grids") or ([{}] if alone else [])
    file.grids = []
    for index, entry in enumerate(grids if isinstance(grids, list) else [grids]):
        with problems.collect():
            file.grids.append(_read_grid(entry, shared, f"{path}: grids[{index}]", problems))
    return file


def _read_budget(
    entry: Any, shared: Mapping[str, list[Any]], where: str, problems: Problems
) -> BudgetGrid:
    if not isinstance(entry, dict) or not isinstance(entry.get("of"), dict):
        raise ConfigError(
            f"{where}: a mapping with name, of (the axes of its candidates) and bits or bytes is expected, not {entry!r}"
        )
    candidates = _read_grid(entry["of"], shared, f"{where}.of", problems)
    return BudgetGrid({k: v for k, v in entry.items() if k != "of"}, candidates, where)


def _with_current_names(key: str, entry: Any) -> Any:
    """An entry of `skip`, `first`, `tables` or `findings` in which old names of methods and axes are replaced by the new ones."""
    if not isinstance(entry, dict):
        return entry
    if key in ("skip", "first"):
        rule = {current_key(str(axis)): wanted for axis, wanted in entry.items()}
        return {axis: current_names(axis, wanted) for axis, wanted in rule.items()}
    if key == "tables" and isinstance(entry.get("methods"), dict):
        methods = {current_name("method", name): row for name, row in entry["methods"].items()}
        return {**entry, "methods": methods}
    if key == "findings":
        return {
            name: list(map(_current_term, terms))
            if isinstance(terms, list)
            else _current_term(terms)
            for name, terms in entry.items()
        }
    return entry


def _current_term(term: Any) -> Any:
    if not isinstance(term, dict) or "method" not in term:
        return term
    return {**term, "method": current_name("method", term["method"])}


def _read_grid(entry: Any, shared: Mapping[str, list[Any]], where: str, problems: Problems) -> Grid:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: a mapping of axes to values is expected, not {entry!r}")
    axes: dict[str, list[Any]] = {}
    zips: list[dict[str, list[Any]]] = []
    for key, value in ((current_key(str(key)), value) for key, value in entry.items()):
        if key == "zip":
            for paired in value if isinstance(value, list) else [value]:
                zips.append(_read_zip(paired, f"{where}.zip", problems))
        elif is_axis(str(key)):
            axes[str(key)] = _axis_values(str(key), value, f"{where}.{key}")
        else:
            problems.add(
                unknown_name(
                    "axis",
                    str(key),
                    [*AXES, *(f"{name}.<field>" for name in EDITABLE), "zip"],
                    where,
                )
            )
    own = {*axes, *(axis for paired in zips for axis in paired)}
    inherited = {key: values for key, values in shared.items() if key not in own}
    if own & {"rounding"}:  # a grid that names its rounding does not inherit a method
        inherited.pop("method", None)
    return Grid({**axes, **inherited}, zips)


def _read_zip(paired: Any, where: str, problems: Problems) -> dict[str, list[Any]]:
    if not isinstance(paired, dict):
        raise ConfigError(f"{where}: a mapping of axes to lists of equal length is expected")
    paired = {current_key(str(key)): value for key, value in paired.items()}
    unknown = [key for key in paired if not is_axis(key)]
    for key in unknown:
        problems.add(unknown_name("axis", key, AXES, where))
    axes = {
        key: _axis_values(key, value, where) for key, value in paired.items() if key not in unknown
    }
    lengths = {key: len(values) for key, values in axes.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(
            f"{where}: paired axes differ in length: "
            + ", ".join(f"{key} {n}" for key, n in lengths.items())
        )
    return axes


def is_axis(key: str) -> bool:
    """Whether a key names an axis or a field of one ("calibration.samples")."""
    head, _, rest = key.partition(".")
    return key in AXES or (bool(rest) and head in EDITABLE)


def _axis_values(key: str, value: Any, where: str) -> list[Any]:
    """The values of an axis: a list, one scalar, or range(…), glob(…), … with the meaning that they have in an override."""
    if isinstance(value, str) and re.match(r"(range|glob|choice|sort)\(", value):
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        try:
            return override_values(OverridesParser.create().parse_override(f"{key}={value}"))
        except HydraException as error:
            raise ConfigError(f"{where}: {one_line(error)}") from error
    values = current_names(key, value if isinstance(value, list) else [value])
    if not values:
        raise ConfigError(f"{where}: an axis without values")
    return values
