"""The Python API: sweeps from a notebook, and one place from which plugins import.

    import harness
    harness.plan("demo")                            # one row per cell: done, to do, or refused and why
    records = harness.run("demo", "cluster=local")  # runs the sweep, or finishes it; one row per cell with every metric
    harness.table("demo")                           # the paper's table; .frame, .latex(), .markdown(), .figure()
    harness.status("demo"), harness.show("2ddd94ff"), harness.findings("demo"), harness.report("demo")

    from harness import Evidence, Grid, Score, UniformWeight    # for methods, model families, evaluations (docs/adding.md)

Overrides are those of the command line. Importing the package takes no time: every name is imported on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from harness.cli.notebook import Text
    from harness.core.cell import ActivationScheme as ActivationScheme
    from harness.core.cell import Calibration as Calibration
    from harness.core.cell import Cell as Cell
    from harness.core.cell import Evaluation as Evaluation
    from harness.core.cell import KVScheme as KVScheme
    from harness.core.cell import Method as Method
    from harness.core.cell import Model as Model
    from harness.core.cell import Scheme as Scheme
    from harness.core.cell import WeightScheme as WeightScheme
    from harness.core.errors import ConfigError as ConfigError
    from harness.core.errors import DataError as DataError
    from harness.core.errors import EvaluationError as EvaluationError
    from harness.core.errors import HarnessError as HarnessError
    from harness.core.errors import MethodError as MethodError
    from harness.core.errors import ModelError as ModelError
    from harness.core.errors import PlanError as PlanError
    from harness.core.events import Progress as Progress
    from harness.core.shapes import LinearShape as LinearShape
    from harness.core.shapes import ScalePair as ScalePair
    from harness.core.shapes import Shapes as Shapes
    from harness.core.sweep import Sweep
    from harness.data.texts import read_corpus as read_corpus
    from harness.evaluation.protocols import Score as Score
    from harness.evaluation.protocols import Subject as Subject
    from harness.evaluation.statistics import mean_error as mean_error
    from harness.quantization.methods.checks import check_grid as check_grid
    from harness.quantization.methods.checks import check_pruned as check_pruned
    from harness.quantization.methods.checks import check_rotations as check_rotations
    from harness.quantization.methods.checks import check_tables as check_tables
    from harness.quantization.methods.checks import check_uniform as check_uniform
    from harness.quantization.methods.checks import refusals as refusals
    from harness.quantization.methods.checks import require_finite as require_finite
    from harness.quantization.methods.evidence import sensitivity_of as sensitivity_of
    from harness.quantization.methods.evidence import shared_factor as shared_factor
    from harness.quantization.methods.folding import fold_scales as fold_scales
    from harness.quantization.methods.folding import in_attention as in_attention
    from harness.quantization.methods.folding import makes_values as makes_values
    from harness.quantization.methods.folding import mlp_outputs as mlp_outputs
    from harness.quantization.methods.folding import put_parameters as put_parameters
    from harness.quantization.methods.folding import repeat_scales as repeat_scales
    from harness.quantization.methods.folding import rotate_block as rotate_block
    from harness.quantization.methods.folding import rotate_ends as rotate_ends
    from harness.quantization.methods.folding import writes_residual as writes_residual
    from harness.quantization.methods.protocols import BlockView as BlockView
    from harness.quantization.methods.protocols import Evidence as Evidence
    from harness.quantization.methods.protocols import ModelReader as ModelReader
    from harness.quantization.methods.protocols import Network as Network
    from harness.quantization.methods.protocols import Survey as Survey
    from harness.quantization.methods.protocols import TrainedLinear as TrainedLinear
    from harness.quantization.methods.protocols import WholeModel as WholeModel
    from harness.quantization.methods.protocols import build_rounding as build_rounding
    from harness.quantization.methods.reducing import check_blocks as check_blocks
    from harness.quantization.methods.reducing import without_blocks as without_blocks
    from harness.quantization.models.parts import ATTENTION as ATTENTION
    from harness.quantization.models.parts import DOWN as DOWN
    from harness.quantization.models.parts import GATE_UP as GATE_UP
    from harness.quantization.models.parts import GATED_MLP as GATED_MLP
    from harness.quantization.models.parts import OUTPUT as OUTPUT
    from harness.quantization.models.parts import QKV as QKV
    from harness.quantization.models.parts import MixtureFamily as MixtureFamily
    from harness.quantization.models.parts import attention_pairs as attention_pairs
    from harness.quantization.models.parts import gated_mlp_pairs as gated_mlp_pairs
    from harness.quantization.models.parts import row_locations as row_locations
    from harness.quantization.models.parts import whole_locations as whole_locations
    from harness.quantization.models.protocols import DecoderFamily as DecoderFamily
    from harness.quantization.models.protocols import WeightLocation as WeightLocation
    from harness.quantization.numerics.activations import round_dynamic as round_dynamic
    from harness.quantization.numerics.adapters import AdapterTuning as AdapterTuning
    from harness.quantization.numerics.adapters import LowRankLinear as LowRankLinear
    from harness.quantization.numerics.adapters import LowRankSettings as LowRankSettings
    from harness.quantization.numerics.error_feedback import Columns as Columns
    from harness.quantization.numerics.error_feedback import feed_forward as feed_forward
    from harness.quantization.numerics.grids import CONVENTIONS as CONVENTIONS
    from harness.quantization.numerics.grids import SCALE_DTYPES as SCALE_DTYPES
    from harness.quantization.numerics.grids import Fitting as Fitting
    from harness.quantization.numerics.grids import Grid as Grid
    from harness.quantization.numerics.grids import as_stored as as_stored
    from harness.quantization.numerics.grids import encode as encode
    from harness.quantization.numerics.grids import fit as fit
    from harness.quantization.numerics.grids import from_range as from_range
    from harness.quantization.numerics.hessians import Factor as Factor
    from harness.quantization.numerics.hessians import damped as damped
    from harness.quantization.numerics.hessians import inverse_factor as inverse_factor
    from harness.quantization.numerics.packing import pack as pack
    from harness.quantization.numerics.packing import unpack as unpack
    from harness.quantization.numerics.sparse import Outliers as Outliers
    from harness.quantization.numerics.training import Document as Document
    from harness.quantization.numerics.training import nearest_through as nearest_through
    from harness.quantization.numerics.training import round_through as round_through
    from harness.quantization.numerics.training import steps_of as steps_of
    from harness.quantization.numerics.training import train as train
    from harness.quantization.numerics.weights import DenseWeight as DenseWeight
    from harness.quantization.numerics.weights import QuantizedWeight as QuantizedWeight
    from harness.quantization.numerics.weights import UniformWeight as UniformWeight
    from harness.quantization.numerics.weights import on_grid as on_grid
    from harness.reporting.shown import ShownTable
    from harness.storage.store import Store

__version__ = "0.1.0"

# Idle threads of torch sleep at barriers. By default they spin, and beside other busy processes an operation then waits for
# threads that do not run: a pass can take a hundred times as long. OpenMP reads this once, when torch is loaded, and this
# package is imported first on every road: shell, workers, notebooks.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FOR_PLUGINS = {  # module -> the names that plugins import from here
    # every plugin
    "harness.core.errors": (
        "ConfigError",
        "DataError",
        "EvaluationError",
        "HarnessError",
        "MethodError",
        "ModelError",
        "PlanError",
    ),
    "harness.core.events": ("Progress",),
    # methods
    "harness.core.cell": (
        "ActivationScheme",
        "Calibration",
        "Cell",
        "Evaluation",
        "KVScheme",
        "Method",
        "Model",
        "Scheme",
        "WeightScheme",
    ),
    "harness.core.shapes": ("LinearShape", "ScalePair", "Shapes"),
    "harness.quantization.methods.protocols": (
        "BlockView",
        "Evidence",
        "ModelReader",
        "Network",
        "Survey",
        "TrainedLinear",
        "WholeModel",
        "build_rounding",
    ),
    "harness.quantization.methods.reducing": ("check_blocks", "without_blocks"),
    "harness.quantization.methods.checks": (
        "check_grid",
        "check_pruned",
        "check_rotations",
        "check_tables",
        "check_uniform",
        "refusals",
        "require_finite",
    ),
    "harness.quantization.methods.evidence": ("sensitivity_of", "shared_factor"),
    "harness.quantization.methods.folding": (
        "fold_scales",
        "in_attention",
        "makes_values",
        "mlp_outputs",
        "put_parameters",
        "repeat_scales",
        "rotate_block",
        "rotate_ends",
        "writes_residual",
    ),
    "harness.quantization.numerics.activations": ("round_dynamic",),
    "harness.quantization.numerics.adapters": ("AdapterTuning", "LowRankLinear", "LowRankSettings"),
    "harness.quantization.numerics.error_feedback": ("Columns", "feed_forward"),
    "harness.quantization.numerics.grids": (
        "CONVENTIONS",
        "SCALE_DTYPES",
        "Fitting",
        "Grid",
        "as_stored",
        "encode",
        "fit",
        "from_range",
    ),
    "harness.quantization.numerics.hessians": ("Factor", "damped", "inverse_factor"),
    "harness.quantization.numerics.packing": ("pack", "unpack"),
    "harness.quantization.numerics.sparse": ("Outliers",),
    "harness.quantization.numerics.training": (
        "Document",
        "nearest_through",
        "round_through",
        "steps_of",
        "train",
    ),
    "harness.quantization.numerics.weights": (
        "DenseWeight",
        "QuantizedWeight",
        "UniformWeight",
        "on_grid",
    ),
    # model families
    "harness.quantization.models.protocols": ("DecoderFamily", "WeightLocation"),
    "harness.quantization.models.parts": (
        "ATTENTION",
        "DOWN",
        "GATED_MLP",
        "GATE_UP",
        "OUTPUT",
        "QKV",
        "MixtureFamily",
        "attention_pairs",
        "gated_mlp_pairs",
        "row_locations",
        "whole_locations",
    ),
    # evaluations
    "harness.data.texts": ("read_corpus",),
    "harness.evaluation.protocols": ("Score", "Subject"),
    "harness.evaluation.statistics": ("mean_error",),
}
_HOMES = {name: module for module, names in FOR_PLUGINS.items() for name in names}

__all__ = ["__version__", "findings", "plan", "report", "run", "show", "status", "table", *_HOMES]


def __getattr__(name: str) -> Any:
    """A name for plugins, imported on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def plan(sweep: str | None = None, *overrides: str) -> pandas.DataFrame:
    """What a sweep would do, one row per cell: state (done, evaluate, quantize, refused), missing evaluations, reasons.

    `.attrs["text"]` is the plan as `harness plan` prints it. Raises ConfigError when the sweep itself is wrong.
    """
    from harness.planning.planner import make
    from harness.planning.render import render

    loaded, store = _load(sweep, overrides)
    made = make(loaded, store)
    frame = made.frame()
    frame.attrs["text"] = render(made)
    return frame


def run(sweep: str | None = None, *overrides: str, show: bool = True) -> pandas.DataFrame:
    """Carry a sweep out, or finish it; one row per cell with its metrics and, where it failed, the reason.

    Prints the plan and the progress: a live bar in a notebook, plain lines elsewhere; nothing with show=False. An interrupt (the
    notebook's stop button, Ctrl-C, `harness cancel`) ends the workers and raises KeyboardInterrupt, so that what follows does not
    run either; finished work stays, and the same call continues. Raises PlanError with every refusal before anything starts.
    `.attrs["summary"]` is the summary that `harness run` prints.
    """
    from harness.cli.notebook import api_display
    from harness.execution import driver

    loaded, _ = _load(sweep, overrides)
    summary = driver.run(loaded, api_display() if show else None)
    if show:
        print(summary.text, flush=True)
    if summary.interrupted:
        raise KeyboardInterrupt(summary.text)
    frame = driver.frame(summary.records)
    frame.attrs["summary"] = summary.text
    return frame


def table(sweep: str | None = None, *overrides: str, name: str = "") -> ShownTable:
    """A table of a sweep, its first when no name is given.

    A notebook shows it as the paper's table; `.frame` has its numbers at full precision with the published ones beside ours,
    `.latex()`, `.markdown()` and `.figure()` what their names say.
    """
    from harness.core.errors import ConfigError, unknown_name
    from harness.reporting.shown import ShownTable
    from harness.reporting.tables import build

    loaded, store = _load(sweep, overrides)
    chosen = next((each for each in loaded.shown_tables if not name or each.name == name), None)
    if chosen is None:
        raise ConfigError(
            unknown_name(
                "table", name, [each.name for each in loaded.shown_tables], f"sweep {loaded.name}"
            )
        )
    known = store.snapshot(loaded.cells)
    records = [known.record(cell) for cell in loaded.cells]
    return ShownTable(loaded, build(loaded, chosen, records, known), records)


def status(sweep: str | None = None, *overrides: str) -> Text:
    """The progress of a sweep, or without one of every sweep in runs/, whichever process runs it, as `harness status` prints it."""
    from harness.cli.notebook import Text
    from harness.cli.status import status as status_text
    from harness.cli.status import store_facts, store_text
    from harness.storage.store import Store

    if sweep is None and not overrides:
        store = Store("runs")
        return Text(store_text(str(store.place), store_facts(store)))
    loaded, store = _load(sweep, overrides)
    return Text(status_text(store.snapshot(loaded.cells), loaded.name, loaded.cells))


def show(key: str, runs: str = "runs") -> Text:
    """All about one cell, as `harness show` prints it.

    key: the first digits of the cell's key; runs: the folder or URL of the results.
    """
    from harness.cli.notebook import Text
    from harness.cli.show import cell_text
    from harness.core.errors import ConfigError
    from harness.storage.store import Store

    store = Store(runs)
    cell = store.cell(store.find(key))
    if cell is None:
        raise ConfigError(f"cell {key} in {runs} has no readable cell.json; run its sweep again")
    return Text(cell_text(cell, store))


def findings(sweep: str, *overrides: str) -> pandas.DataFrame:
    """Each finding of a sweep with its answer by our numbers and by the published ones: holds, does not hold, cannot tell yet.

    `.attrs["text"]` is what `harness findings` prints. Raises ConfigError where the sweep states none.
    """
    import pandas

    from harness.core.errors import ConfigError
    from harness.reporting.findings import SIDES, check, render

    loaded, store = _load(sweep, overrides)
    if not loaded.findings:
        raise ConfigError(f"sweep {loaded.name} states no findings; docs/tables.md says how")
    known = store.snapshot(loaded.cells)
    checked = check(loaded, [known.record(cell) for cell in loaded.cells], known)
    rows = []
    for each in checked:
        row: dict[str, Any] = {"finding": each.finding.text, "source": each.finding.source}
        for side in SIDES:
            answer = getattr(each, side)
            row[side] = None if answer is None else answer.verdict
            row[f"{side} numbers"] = "" if answer is None else "; ".join(answer.numbers)
        rows.append(row)
    frame = pandas.DataFrame(rows)
    frame.attrs["text"] = render(checked)
    return frame


def report(sweep: str | None = None, *overrides: str) -> str:
    """Write a sweep's tables, figures and report again; returns where the report lies: one page for a browser."""
    from harness.reporting.files import refresh

    loaded, store = _load(sweep, overrides)
    return store.where(refresh(loaded, store))


def _load(sweep: str | None, overrides: tuple[str, ...]) -> tuple[Sweep, Store]:
    from harness.cli.arguments import load

    return load(sweep, overrides)
