"""A sweep after its YAML was composed and checked: cells, what was skipped and why, the tables to make, and where to run.

`config` makes it; `plan`, `schedule`, `tracking` and `tables` read it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from harness.core.cell import Cell
from harness.core.text import without_password


@dataclass(frozen=True)
class Skip:
    """Cells that a rule of the sweep leaves out, and the rule's reason."""

    titles: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class First:
    """Cells that come before others. text: the condition as the sweep states it; keys: of the cells and of their baselines."""

    text: str
    keys: frozenset[str]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    metric    "wikitext2/perplexity", "arc_easy/acc", "checkpoint/bits_per_weight"; or "mean" of `of`
    published name of the column in the published YAML; "" where the paper has none
    digits    decimals printed; scale multiplies the value (100 for percent)
    weights   for "mean": one weight per metric of `of`; empty is the plain mean
    model     the cell of this model with the row's method and scheme; for tables with their models side by side
    reason    why there is no metric of ours; then `metric` is "published", and the column holds the paper's numbers alone
    """

    metric: str
    title: str = ""
    published: str = ""
    digits: int = 2
    scale: float = 1.0
    higher_is_better: bool | None = None
    of: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    model: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Correlation:
    """Pearson's r over cells of every column's metric with the mean of others; then each column of the table is a row.

    over     metrics whose mean is correlated with
    bits     cells of these weight bits only; empty: all but the baselines
    methods  cells of these methods only
    """

    over: tuple[str, ...]
    bits: tuple[float, ...] = ()
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of a sweep: one row per cell in the sweep's order, or the published rows in theirs.

    published  path below sweeps/published/ without .yaml ("llama3-empirical-study/table1"); "" when there is none
    methods    our name of a method -> the method or the label of its published rows, where they are not called the same
    protocol   differences of protocol that could explain a gap, printed below the table
    absent     why no cell stands in this table; it shows the published rows alone
    order      a metric: a model's rows from its largest value to its smallest, those without one last; "": the sweep's order
    """

    name: str
    caption: str = ""
    columns: tuple[Column, ...] = ()
    published: str = ""
    models: tuple[str, ...] = ()  # rows of these models only; empty: all
    methods: dict[str, str] = field(default_factory=dict)
    protocol: tuple[str, ...] = ()
    correlation: Correlation | None = None
    absent: str = ""
    order: str = ""


@dataclass(frozen=True)
class Term:
    """Rows of a table, for a finding; what is empty fits any row.

    bits, group  as the table prints them: 3 or W8A8; 128 or row
    model        a name or a pattern ("*14b*"); a finding whose terms name no model is asked of every model
    table        with `column`: where to look, if not where the finding says
    """

    method: str = ""
    bits: Any = ""
    group: Any = ""
    model: str = ""
    variant: str = ""
    table: str = ""
    column: str = ""


@dataclass(frozen=True)
class Finding:
    """A statement of a study as a check of a table's numbers, ours or the published ones.

    better    each term is better than the next, by more than `margin`
    above     the same for the numbers as such, whatever is better
    value     the numbers of these terms lie between at_least and at_most
    loss      the same for what they are worse than their model's baseline; negative where they are better
    excess    each term loses more than the next
    relate    mean |Pearson r| of the columns `relate` with the mean of the columns `over` ("table7/ptb"), over the rows of `value`
    """

    text: str
    source: str = ""
    table: str = ""
    column: str = ""
    better: tuple[Term, ...] = ()
    above: tuple[Term, ...] = ()
    value: tuple[Term, ...] = ()
    loss: tuple[Term, ...] = ()
    excess: tuple[Term, ...] = ()
    margin: float = 0.0
    at_least: float | None = None
    at_most: float | None = None
    relate: tuple[str, ...] = ()
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """Where tasks run. kind: local (in processes of this machine without Ray), ray (started here), or address of a cluster.

    workers    concurrent tasks on this machine; 0: one per GPU, or one per two cores
    """

    kind: Literal["local", "ray"] = "ray"
    address: str = ""
    workers: Annotated[int, Ge(0)] = 0
    gpus_per_task: Annotated[float, Ge(0)] = 1.0
    # of one GPU of a cluster at an address, "80GB"; a larger model takes several
    gpu_memory: str = ""
    task_timeout_seconds: float = 0.0  # 0: none
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreLimits:
    """quota: bytes that runs/ may take, as "200GB"; "": as many as there are."""

    quota: str = ""


@dataclass(frozen=True)
class Tracking:
    """Where records go. kind: sqlite (mlflow.db beside runs/), server (uri), or none."""

    kind: Literal["sqlite", "server", "none"] = "sqlite"
    uri: str = ""
    experiment: str = ""


@dataclass(frozen=True)
class Runtime:
    """What changes where and how a sweep runs but none of its numbers.

    runs      the store: a folder, or as text the URL of an object store
    priority  among the sweeps that share the store: while one of a higher priority has tasks that wait, this one begins nothing
    """

    runs: Path | str
    store: StoreLimits = StoreLimits()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    data_root: Path | None = None
    device: str = "auto"  # auto, cpu, cuda
    priority: int = 0
    batch_size: int = 0  # 0: chosen by the evaluator
    fail_fast: bool = False
    export: str = ""  # a format that every checkpoint must fit; cells that do not are refused
    notify: str = ""  # a web address or a command that gets a message when a run ends


@dataclass(frozen=True)
class Sweep:
    """A sweep, read and checked.

    cells          distinct, in the order of the file's grids; baselines that differences need come with them
    method_titles  name of a method of the cells, without the settings that the sweep varies -> what papers call it
    """

    name: str
    title: str
    description: str
    cells: tuple[Cell, ...]
    skips: tuple[Skip, ...]
    tables: tuple[Table, ...]
    runtime: Runtime
    path: Path | None = None
    overrides: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    first: tuple[First, ...] = ()
    method_titles: dict[str, str] = field(default_factory=dict)

    def priority_tier(self, key: str) -> int:
        """Of a cell by its key: 0 for what comes first."""
        return next(
            (priority_tier for priority_tier, each in enumerate(self.first) if key in each.keys),
            len(self.first),
        )

    @property
    def shown_tables(self) -> tuple[Table, ...]:
        """Its tables; for a sweep that names none, one with sizes and the headline metric of every evaluation."""
        return self.tables or (Table(self.name, self.title),)


def command_line(sweep: Sweep, command: str = "run") -> str:
    """What runs the sweep again (finished work is not repeated), or shows its table."""
    words = (
        []
        if sweep.path is None
        else [sweep.name if sweep.path.parent.name == "sweeps" else str(sweep.path)]
    )
    return without_password(shlex.join(["harness", command, *words, *sweep.overrides]))
