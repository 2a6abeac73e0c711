"""Addresses of MLflow's pages, and the page of a sweep's cells: sorted, with its columns and charts.

MLflow 3.17 reads a page's state from a tag of the experiment, `mlflow.sharedViewState.<key>`, where the address names the key. The
tag holds at most 5,000 characters, so what is larger is compressed as MLflow itself does it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from harness.core.cell import digest
from harness.tracking.ui import MODEL_TRAINING

TAG_PREFIX = "mlflow.sharedViewState."
COLUMNS, METRICS = ("method", "bits", "group"), 8  # params shown; the most scores shown
BITS = "checkpoint/bits_per_weight"


def view_key(sweep: str, experiment: str) -> str:
    """The key of a sweep's view; short where the experiment holds this sweep alone."""
    return "cells" if sweep == experiment else f"cells-{digest(sweep)[:8]}"


def view_tag(key: str) -> str:
    """The tag of the experiment that holds the view of a key."""
    return f"{TAG_PREFIX}{key}"


def run_page(experiment_id: str, run_id: str) -> str:
    """The address of a run, from the server's on."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{MODEL_TRAINING}"


def artifact_page(experiment_id: str, run_id: str, path: str) -> str:
    """The address of an artifact of a run."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path}?{MODEL_TRAINING}"


def cells_page(experiment_id: str, key: str, charts: bool = False) -> str:
    """The address of a sweep's cells, as a table or as charts."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}{mode}&{MODEL_TRAINING}"


def cells_view(
    parent_id: str,
    scores: Sequence[str],
    curves: Mapping[str, Sequence[str]],
    lower_is_better: bool,
) -> str:
    """The state of the runs page of a sweep's cells, as the text of its tag.

    scores           metrics of the cells, the first of which sorts them
    curves           score -> metrics of the parent, one per method, with the bit width as step
    lower_is_better  whether small values of the first score come first
    """
    shown = list(scores[:METRICS])
    columns = [f"params.`{name}`" for name in COLUMNS]
    columns += [f"metrics.`{name}`" for name in (BITS, *shown)]
    sections = [{"uuid": "scores", "name": "Scores over bits per weight"}]
    charts: list[dict[str, Any]] = [
        {
            "uuid": f"score-{number}",
            "metricSectionId": "scores",
            "type": "SCATTER",
            "runsCountToCompare": 100,
            "isGenerated": False,
            "deleted": False,
            "xaxis": {"key": BITS, "type": "METRIC"},
            "yaxis": {"key": score, "type": "METRIC"},
        }
        for number, score in enumerate(shown)
    ]
    sections.append({"uuid": "bars", "name": "Scores by cell"})
    charts += [
        {
            "uuid": f"bar-{number}",
            "metricSectionId": "bars",
            "type": "BAR",
            "runsCountToCompare": 100,
            "isGenerated": False,
            "deleted": False,
            "metricKey": score,
        }
        for number, score in enumerate(shown)
    ]
    state = {
        "searchFilter": f"tags.mlflow.parentRunId = '{parent_id}'",
        "orderByKey": f"metrics.`{shown[0]}`" if shown else "attributes.start_time",
        "orderByAsc": lower_is_better,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsHiddenMode": "SHOW_ALL",
        "runsHidden": [],
        "compareRunCharts": charts,
        "compareRunSections": [
            {**section, "display": True, "isReordered": True} for section in sections
        ],
        "isAccordionReordered": True,
    }
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()}"
