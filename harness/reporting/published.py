"""Numbers of papers: sweeps/published/<slug>/table<N>.yaml, and which of their rows is which cell of ours. Loads without torch.

The format is explained in docs/tables.md. Numbers keep the text they were printed with, so that 8.50 stays 8.50.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from harness.core.cell import Cell, cell_key
from harness.core.errors import ConfigError, unknown_name
from harness.core.package import published_folders
from harness.core.text import letters_and_digits

# what papers call the full-precision row, and what we do
BASELINES = ("fp16", "bf16", "fp32", "w16a16", "none")


class Printed(float):
    """A published number that remembers how the paper printed it: 8.50, 1.9e+3. rounding: half of its last digit."""

    text: str
    rounding: float

    def __new__(cls, text: str, rounding: float | None = None) -> Printed:
        number = super().__new__(cls, text)
        number.text = text
        number.rounding = (
            0.5 * 10.0 ** int(Decimal(text).as_tuple().exponent) if rounding is None else rounding
        )
        return number

    @property
    def percent(self) -> Printed:
        """A fraction as percent, with the digits that the paper printed."""
        return Printed(f"{Decimal(self.text).scaleb(2):f}", 100 * self.rounding)


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table. bits as printed; group_size None: one scale per output channel, or not stated."""

    model: str
    method: str
    weight_bits: float | None  # None: not printed
    activation_bits: float | None
    group_size: int | None
    label: str
    values: Mapping[str, Printed]
    sparsity: str = ""  # as a scheme states it: "0.5", "2:4"


@dataclass(frozen=True)
class Published:
    """A table of a paper, read from sweeps/published/<slug>/table<N>.yaml."""

    path: Path
    paper: str
    arxiv: str
    version: str
    table: str
    models: tuple[str, ...]  # names of the model that the whole table is about
    checkpoints: Mapping[str, str]  # row.model -> hub id
    fractions: frozenset[str]  # columns printed as fractions of one
    higher_is_better: Mapping[str, bool | None]
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...] = ()
    # methods whose group_size of null means that the paper does not say
    groups_not_stated: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        return (
            frozenset(name for row in self.rows for name in row.values)
            | self.higher_is_better.keys()
        )

    @property
    def source(self) -> str:
        return f"arXiv {self.arxiv}, {self.version}, table {self.table}"


def load_published(name: str, sweep_file: Path | None = None) -> Published:
    """A published table by its name, e.g. "llama3-empirical-study/table1". Raises ConfigError naming what is wrong.

    sweep_file: the file of the sweep that names it; a folder published/ beside that file comes first.
    """
    roots = published_folders(sweep_file)
    for root in roots:
        if (root / f"{name}.yaml").is_file():
            return _parse_published(root / f"{name}.yaml")
    known = {
        p.relative_to(root).with_suffix("").as_posix()
        for root in roots
        for p in root.glob("*/*.yaml")
    }
    raise ConfigError(unknown_name("published table", name, known))


def _parse_published(path: Path) -> Published:
    import yaml

    class Loader(yaml.SafeLoader):
        """Numbers keep the text they were written with."""

    for tag in ("int", "float"):
        Loader.add_constructor(
            f"tag:yaml.org,2002:{tag}", lambda loader, node: Printed(str(node.value))
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    needed = ("paper", "arxiv", "version", "table", "model", "columns", "rows")
    problems = [f'{path}: "{key}" is missing' for key in needed if key not in (content or {})]
    if problems:
        raise ConfigError("\n".join(problems))
    columns = {column["name"]: column for column in content["columns"]}
    fractions = {
        name for name, column in columns.items() if "fraction" in str(column.get("metric", ""))
    }
    if fractions == set(columns):  # then so are the averages that were derived from them
        fractions |= {name for row in content["rows"] for name in row.get("derived", {})}
    rows = []
    for number, row in enumerate(content["rows"], 1):
        where = f"{path}: row {number}"
        problems += [
            f'{where}: "{key}" is missing'
            for key in ("method", "w_bits", "values")
            if key not in row
        ]
        problems += [
            unknown_name("column", name, columns, where)
            for name in row.get("values", {})
            if name not in columns
        ]
        if problems:
            continue
        values = {**row["values"], **row.get("derived", {})}
        rows.append(
            PublishedRow(
                model=str(row.get("model", "")),
                method=str(row["method"]),
                weight_bits=None if row["w_bits"] is None else float(row["w_bits"]),
                activation_bits=None if row.get("a_bits") is None else float(row["a_bits"]),
                group_size=None if row.get("group_size") is None else int(row["group_size"]),
                label=str(
                    row.get("label")
                    or " ".join(str(row[key]) for key in ("benchmark", "metric") if row.get(key))
                ),
                values={name: value for name, value in values.items() if value is not None},
                sparsity=str(row.get("sparsity") or ""),
            )
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return Published(
        path=path,
        paper=str(content["paper"]),
        arxiv=str(content["arxiv"]),
        version=str(content["version"]),
        table=str(content["table"]),
        models=tuple(
            part.strip()
            for part in re.split(r"[(),;]| and ", str(content["model"]))
            if part.strip()
        ),
        checkpoints=content.get("checkpoints") or {},
        fractions=frozenset(fractions),
        higher_is_better={name: column.get("higher_is_better") for name, column in columns.items()},
        rows=tuple(rows),
        notes=tuple(content.get("notes") or ()),
        groups_not_stated=frozenset(content.get("groups_not_stated") or ()),
    )


def same_model(cell: Cell, published: Published, row: PublishedRow) -> bool:
    """By name or by hub id; a table about one model says so in its head, others in each row."""
    if row.model:
        names: tuple[str, ...] = (row.model, published.checkpoints.get(row.model) or "")
    else:
        names = (*published.models, *(name for name in published.checkpoints.values() if name))
    return bool(
        {letters_and_digits(name) for name in names if name}
        & {letters_and_digits(cell.model.name), letters_and_digits(cell.model.source)}
    )


def _same_method(cell: Cell, row: PublishedRow, methods: Mapping[str, str]) -> bool:
    method, name = (
        letters_and_digits(row.method),
        letters_and_digits(methods.get(cell.method.name, cell.method.name)),
    )
    if cell.method.is_baseline:
        return method in BASELINES
    return name in {method, letters_and_digits(row.label)} or (name, method) in {
        ("rtn", "rtnperchannel"),
        ("nf4", "normalfloat"),
    }


def _same_scheme(cell: Cell, row: PublishedRow, published: Published) -> bool:
    if cell.method.is_baseline:
        return True
    scheme = cell.scheme
    activation = scheme.activation.bits if scheme.activation else 16
    named = {
        dict(override.weight).get("group_size", scheme.weight.group_size)
        for override in scheme.overrides
    }
    # papers print that of the layers they name
    size = named.pop() if len(named) == 1 else scheme.weight.group_size
    group = None if size == -1 else size
    same_activation = row.activation_bits is None or row.activation_bits == activation
    same_group = group == row.group_size or (
        row.group_size is None and row.method in published.groups_not_stated
    )
    same_sparsity = scheme.weight.sparsity == row.sparsity
    return (
        scheme.weight.bits == row.weight_bits and same_activation and same_group and same_sparsity
    )


def match(
    cells: Sequence[Cell], published: Published, methods: Mapping[str, str] | None = None
) -> tuple[dict[str, PublishedRow], list[str]]:
    """cell_key -> its published row, and a sentence for each cell that several rows fit (none of them is taken).

    methods: our name of a method -> the method or label of its rows, where they are not called the same.
    """
    renamed = methods or {}
    matches: dict[str, PublishedRow] = {}
    ambiguous: list[str] = []
    for cell in cells:
        name = letters_and_digits(renamed.get(cell.method.name, cell.method.name))
        rows = [row for row in published.rows if same_model(cell, published, row)]
        rows = [
            row
            for row in rows
            if _same_method(cell, row, renamed) and _same_scheme(cell, row, published)
        ]
        rows = [row for row in rows if letters_and_digits(row.label) == name] or rows
        if len(rows) == 1:
            matches[cell_key(cell)] = rows[0]
        elif rows:
            listed = "; ".join(row.label or row.method for row in rows)
            ambiguous.append(
                f"{cell.title}: {len(rows)} published rows fit ({listed}); none is shown."
            )
    return matches, ambiguous
