"""The tables and findings that a sweep file states, checked against its evaluations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from harness.config.context import Context
from harness.config.evaluations import parts_of
from harness.config.typed import typed
from harness.core import plugins
from harness.core.cell import Evaluation
from harness.core.errors import unknown_name
from harness.core.package import published_folders
from harness.core.sweep import Column, Finding, Table, Term


def place_of_term(term: Term, finding: Finding) -> tuple[str, str]:
    """(table, column) in which a term of a finding is looked up."""
    return term.table or finding.table, term.column or finding.column


def read_tables(context: Context, evaluations: tuple[Evaluation, ...]) -> tuple[Table, ...]:
    """The tables of a sweep file, each column checked against the sweep's evaluations."""
    tables: list[Table] = []
    for index, entry in enumerate(context.file.tables):
        where = f"{context.file.where}: tables[{index}]"
        if not isinstance(entry, dict):
            context.problems.add(
                f"{where}: a mapping with name and columns is expected, not {entry!r}"
            )
            continue
        table = typed(Table, {**entry, "columns": []}, where, context.problems)
        columns = entry.get("columns") or []
        for number, column in enumerate(columns if isinstance(columns, list) else [columns]):
            content = {"metric": column} if isinstance(column, str) else column
            checked = typed(Column, content, f"{where}: columns[{number}]", context.problems)
            if table is not None and checked is not None:
                table = dataclasses.replace(table, columns=(*table.columns, checked))
        if table is not None:
            tables.append(_checked_table(context, table, evaluations, where))
    names = [table.name for table in tables]
    for name in sorted({name for name in names if names.count(name) > 1}):
        context.problems.add(f"{context.file.where}: two tables are called {name}")
    for name in names:
        if not re.fullmatch(r"\w[\w. -]*", name):
            context.problems.add(
                f'{context.file.where}: table "{name}": it becomes a file name; letters, digits, . _ - only'
            )
    return tuple(tables)


def _checked_table(
    context: Context, table: Table, evaluations: tuple[Evaluation, ...], where: str
) -> Table:
    by_name = {evaluation.name: evaluation for evaluation in evaluations}
    columns = []
    for column in table.columns:
        if column.metric == "published":
            if not (column.reason or table.absent) or not column.published or not table.published:
                context.problems.add(
                    f"{where}: column {column.title or column.metric}: needs `published` and `reason`"
                )
            columns.append(column)
            continue
        for metric in column.of if column.metric == "mean" else (column.metric,):
            head, _, leaf = metric.partition("/")
            # a narrowed run keeps the file's table, with gaps
            replaced = context.edits.evaluations is not None
            known_head = head in (
                *context.evaluation_names,
                "checkpoint",
                "quantize",
                "delta",
            ) or head in _parts_of_benchmarks(evaluations)
            if not leaf or (not known_head and not replaced):
                known = [
                    *by_name,
                    "checkpoint/bits_per_weight",
                    "quantize/seconds",
                    "delta/bytes",
                    "mean",
                ]
                context.problems.add(
                    unknown_name("evaluation for the column", metric, known, where)
                )
            elif head in by_name and column.higher_is_better is None:
                known_metrics = plugins.facts("evaluator", by_name[head].evaluator).get(
                    "metrics", {}
                )
                better = known_metrics.get(leaf, {}).get("higher_is_better")
                column = dataclasses.replace(column, higher_is_better=better)
        if column.weights and len(column.weights) != len(column.of):
            context.problems.add(
                f"{where}: column {column.metric}: {len(column.weights)} weights for {len(column.of)} metrics"
            )
        columns.append(column)
    if table.published and not any(
        (root / f"{table.published}.yaml").is_file()
        for root in published_folders(context.file.path)
    ):
        context.problems.add(f"{where}: no sweeps/published/{table.published}.yaml")
    return dataclasses.replace(table, columns=tuple(columns))


def check_models(context: Context, tables: Sequence[Table], known: Iterable[str]) -> None:
    """Adds a problem for each model that a table names and the sweep does not have.

    Overrides of `model` narrow a sweep; its tables then keep their models and show gaps.
    """
    if "model" in context.edits.axes:
        return
    names = sorted(known)
    for index, table in enumerate(tables):
        for name in dict.fromkeys(
            (*table.models, *(column.model for column in table.columns if column.model))
        ):
            if name not in names:
                context.problems.add(
                    unknown_name("model", name, names, f"{context.file.where}: tables[{index}]")
                )


def _parts_of_benchmarks(evaluations: tuple[Evaluation, ...]) -> frozenset[str]:
    """Names of the groups and tasks within the sweep's benchmarks; each has metrics under its own name."""
    return frozenset[str]().union(*map(parts_of, evaluations))


def read_findings(context: Context, tables: tuple[Table, ...]) -> tuple[Finding, ...]:
    """The findings of a sweep file, each term checked against the tables and their columns."""
    found = []
    names = {
        table.name: {
            name for c in table.columns for name in (c.title, c.published, c.metric) if name
        }
        for table in tables
    }
    for index, entry in enumerate(context.file.findings):
        where = f"{context.file.where}: findings[{index}]"
        finding = typed(Finding, entry, where, context.problems)
        if finding is None:
            continue
        asked = [
            each
            for each in ("better", "above", "value", "loss", "excess")
            if getattr(finding, each)
        ]
        if len(asked) != 1:
            context.problems.add(
                f"{where}: one of better, above, value, loss and excess is expected, not {asked or 'none'}"
            )
        places = (
            [place_of_term(term, finding) for each in asked for term in getattr(finding, each)]
            if not finding.relate
            else []
        )
        places += [reference.partition("/")[::2] for reference in (*finding.relate, *finding.over)]
        for table, column in places:
            if table not in names:
                context.problems.add(unknown_name("table", table, names, where))
            elif column not in names[table]:
                context.problems.add(
                    unknown_name("column", column, names[table], f"{where}: table {table}")
                )
        found.append(finding)
    return tuple(found)
