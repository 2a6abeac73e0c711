"""Diagnoses in MLflow: one run each, in the experiment "diagnoses"."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.cell import digest
from harness.core.sweep import Runtime, Sweep
from harness.core.text import without_password
from harness.tracking.connection import Connection
from harness.tracking.run_contents import (
    BATCH_METRICS,
    PARAM_LIMIT,
    TAG_LIMIT,
    cut_text,
    flat_facts,
    metric_key,
    metric_name,
    user_name,
)

SUMMARY = (
    "linear layers of a model that low-bit weights and activations damage, and why; "
    "open a run for its text, curves and figures"
)


def record_diagnosis(
    runtime: Runtime,
    name: str,
    record: Mapping[str, Any],
    curves: Mapping[str, Mapping[int, float]],
    text: str,
    folder: Path,
) -> str:
    """Record a diagnosis as one MLflow run, with the files of its folder; returns where it is, one line.

    name    the name of the run
    record  JSON values: its entry "asked" (what was diagnosed, and how) identifies the run, which is found again, completed where
            the record changed, and never doubled
    curves  metric -> block -> value, which MLflow draws over the blocks
    text    Markdown for the run's page
    Raises TrackingError.
    """
    key, shown = digest(record["asked"]), digest(record)
    experiment = runtime.tracking.experiment or "diagnoses"
    sweep = Sweep(
        experiment,
        "Diagnoses",
        SUMMARY,
        (),
        (),
        (),
        dataclasses.replace(
            runtime, tracking=dataclasses.replace(runtime.tracking, experiment=experiment)
        ),
    )
    connection = Connection(sweep)
    with connection.writing(f"record the diagnosis of {name} in {connection.uri}"):
        client, experiment_id = (
            connection.client,
            connection.find_experiment(f"Diagnoses: {SUMMARY}"),
        )
        found = client.search_runs([experiment_id], f"tags.`harness.diagnosis` = '{key}'")
        run = (
            found[0]
            if found
            else client.create_run(
                experiment_id,
                run_name=name,
                tags={
                    "harness.diagnosis": key,
                    "mlflow.user": user_name(),
                    "mlflow.source.type": "JOB",
                },
            )
        )
        if run.data.tags.get("harness.record") != shown:
            entities, now = connection.mlflow.entities, int(1000 * time.time())
            points = [
                entities.Metric(metric_name(metric), value, now, step)
                for metric, values in curves.items()
                for step, value in values.items()
                if math.isfinite(value)
            ]
            params = [
                entities.Param(metric_key(entry), cut_text(str(value), PARAM_LIMIT))
                for entry, value in flat_facts(record["asked"]).items()
                if entry not in run.data.params
            ]
            for begin in range(0, max(len(points), 1), BATCH_METRICS):
                client.log_batch(
                    run.info.run_id,
                    points[begin : begin + BATCH_METRICS],
                    params if begin == 0 else [],
                    [],
                )
            client.log_artifacts(run.info.run_id, str(folder))
            client.set_tag(run.info.run_id, "mlflow.note.content", cut_text(text, TAG_LIMIT))
            # last: what was interrupted is done again
            client.set_tag(run.info.run_id, "harness.record", shown)
            client.set_terminated(run.info.run_id, "FINISHED")
    return f'experiment "{experiment}" in {without_password(connection.uri)}'
