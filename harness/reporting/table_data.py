"""A table as data: rows, columns, values."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.core.cell import Cell
from harness.core.labels import baseline_title, method_title
from harness.core.sweep import Column
from harness.evaluation.statistics import Comparison
from harness.reporting.published import Printed

GAP = "—"
PUBLISHED_ONLY = "published"  # the metric of a column that only the paper has


@dataclass(frozen=True)
class Value:
    """One entry. number: ours, scaled as printed, None for a gap; with several seeds their mean.

    stderr  over items, for one seed; of a mean of metrics, that of independent ones
    half_width  of the 95 % interval of the mean over seeds; None for one seed
    gap  why there is no number: "missing", "failed", "absent" (no cell of the sweep), "unmeasured" (no metric of ours), or
         "undefined" (a correlation that these numbers do not have)
    """

    number: float | None = None
    stderr: float | None = None
    seeds: int = 1
    half_width: float | None = None
    published: Printed | None = None
    published_number: float | None = None  # scaled like ours
    agrees: bool | None = None  # with the published number; None where the two cannot be compared
    comparison: Comparison | None = None
    best: bool = False
    smoke: bool = False
    problems: bool = False  # some items have no score, or the evaluator warned
    gap: str = ""
    cell_key: str = ""  # of the cell that the number was made by, the first of several seeds

    @property
    def difference(self) -> float | None:
        return (
            None
            if self.number is None or self.published_number is None
            else self.number - self.published_number
        )


@dataclass(frozen=True)
class Row:
    """labels: texts of the label columns; cell None: a published row that the sweep has no cell for.

    others: keys of the cells of further models and seeds that stand in this row too.
    """

    labels: tuple[str, ...]
    values: tuple[Value, ...]
    cell: Cell | None = None
    cell_key: str = ""
    model: str = ""
    baseline: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class ColumnHead:
    """column as in the sweep; title with the direction that is better; published: three sub-columns."""

    column: Column
    title: str
    higher_is_better: bool | None
    published: bool = False


@dataclass(frozen=True)
class TableData:
    """A table with its values but without a form: labels and columns, rows in order, and the notes printed below it.

    method_titles: name of a method -> what papers call it
    """

    name: str
    caption: str
    labels: tuple[str, ...]  # heads of the label columns
    columns: tuple[ColumnHead, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = field(default=())
    sweep: str = ""
    method_titles: dict[str, str] = field(default_factory=dict)

    def paper_labels(self, row: Row) -> tuple[str, ...]:
        """The label columns of a row with the method's name as papers print it: "SliM-LLM", "FP16"."""
        texts = dict(zip(self.labels, row.labels, strict=True))
        if "method" in texts:
            if row.cell is not None and row.baseline:
                dtype = row.cell.model.dtype
                texts["method"] = baseline_title(dtype, texts.get("bits", ""))
            else:
                texts["method"] = method_title(texts["method"], self.method_titles)
        return tuple(texts.values())
