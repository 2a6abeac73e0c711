"""Addresses of MLflow's pages, and two views of a sweep: its cells, sorted, and the curves of its methods.

MLflow 3.17 reads a page's state from a tag of the experiment, `mlflow.sharedViewState.<key>`, where the address names the key. The
tag holds at most 5,000 characters, so what is larger is compressed as MLflow itself does it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from harness.core.cell import digest
from harness.tracking.ui import MODEL_TRAINING

TAG_PREFIX = "mlflow.sharedViewState."
COLUMNS, METRICS = ("method", "bits", "group"), 8  # params shown; the most scores shown
RUNS_COMPARED = 100  # drawn in one chart
BITS = "checkpoint/bits_per_weight"
CURVES = "over_bits_per_weight"  # the section of metrics that the curves of methods are drawn from


def curve_metric(metric: str) -> str:
    """The name under which a cell gives a metric to the curve of its method."""
    return f"{CURVES}/{metric.replace('/', ' ')}"


def view_key(kind: str, sweep: str, experiment: str) -> str:
    """The key of a view of a sweep, "cells" or "curves"; longer where the experiment may hold other sweeps."""
    return kind if sweep == experiment else f"{kind}-{digest(sweep)[:8]}"


def view_tag(key: str) -> str:
    """The tag of the experiment that holds the view of a key."""
    return f"{TAG_PREFIX}{key}"


def run_page(experiment_id: str, run_id: str) -> str:
    """The address of a run, from the server's on."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{MODEL_TRAINING}"


def artifact_page(experiment_id: str, run_id: str, path: str) -> str:
    """The address of an artifact of a run."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path}?{MODEL_TRAINING}"


def artifact_file(run_id: str, path: str) -> str:
    """The address of an artifact itself, for images in descriptions."""
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run_id}"


def view_page(experiment_id: str, key: str, charts: bool = False) -> str:
    """The address of a view, as a table or as charts."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}{mode}&{MODEL_TRAINING}"


def cells_view(parent_id: str, scores: Sequence[str], lower_is_better: bool) -> str:
    """The page of a sweep's cells: best first, with their scores as columns, and each score over bits per weight as a chart.

    scores           metrics of the cells, the first of which sorts them
    lower_is_better  whether small values of the first score come first
    """
    shown = list(scores[:METRICS])
    columns = [f"params.`{name}`" for name in COLUMNS]
    columns += [f"metrics.`{name}`" for name in (*shown[:1], BITS, *shown[1:])]
    over_bits = [
        {
            "type": "SCATTER",
            "displayName": score,
            "xaxis": {"key": BITS, "type": "METRIC"},
            "yaxis": {"key": score, "type": "METRIC"},
        }
        for score in shown
    ]
    bars = [{"type": "BAR", "displayName": score, "metricKey": score} for score in shown]
    return _text(
        {
            "searchFilter": f"tags.mlflow.parentRunId = '{parent_id}'",
            "orderByKey": f"metrics.`{shown[0]}`" if shown else "attributes.start_time",
            "orderByAsc": lower_is_better,
            "selectedColumns": columns,
            "columnOrder": ["attributes.`Run Name`", *columns],
            **_charts({"Scores over bits per weight": over_bits, "Scores by cell": bars}),
        }
    )


def curves_view(parent_id: str, scores: Sequence[str], groups: Sequence[str]) -> str:
    """The charts of a sweep: one for each score, with a curve per method over the bits per weight as stored.

    The cells are grouped, so that a group has a colour and a curve; each cell gives one point (`curve_points`).

    scores  metrics of the cells
    groups  params whose values tell curves apart: the method, and the model and the group size where there are several
    """
    charts = [
        {
            "type": "LINE",
            "displayName": f"{score} over bits per weight",
            "metricKey": curve_metric(score),
            "selectedMetricKeys": [curve_metric(score)],
            "xAxisKey": "metric",
            "selectedXAxisMetricKey": curve_metric(BITS),
            "useGlobalXaxisKey": False,
            "lineSmoothness": 0,
            "useGlobalLineSmoothing": False,
            "displayPoints": True,
        }
        for score in scores
    ]
    return _text(
        {
            "searchFilter": f"tags.mlflow.parentRunId = '{parent_id}'",
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
            "runListHidden": True,
            "groupBy": {
                "aggregateFunction": "average",
                "groupByKeys": [{"mode": "param", "groupByData": name} for name in groups],
            },
            **_charts({"All methods over bits per weight": charts}),
        }
    )


def _charts(sections: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    charts = [
        {
            "uuid": f"{section}-{number}",
            "metricSectionId": section,
            "runsCountToCompare": RUNS_COMPARED,
            "isGenerated": False,
            "deleted": False,
            **chart,
        }
        for section, own in sections.items()
        for number, chart in enumerate(own)
    ]
    heads = [
        {"uuid": section, "name": section, "display": True, "isReordered": True}
        for section in sections
    ]
    return {"compareRunCharts": charts, "compareRunSections": heads, "isAccordionReordered": True}


def _text(state: Mapping[str, Any]) -> str:
    """A state of the page as the text of its tag."""
    whole = {
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "runsHidden": [],
        **state,
    }
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(whole).encode(), 9)).decode()}"
