"""Diagnosis: the planted linears and no others, the side that is to blame, and groups that repair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.cli.diagnose import render, run, track
from harness.core.cell import Calibration, Model
from harness.core.sweep import Runtime, Tracking
from harness.data import model_folders
from harness.quantization.calibration import draw_windows
from harness.quantization.diagnosis import Diagnosis, diagnose

PLANTED = [(0, f"self_attn.{name}_proj") for name in "qkv"] + [
    (0, "mlp.gate_proj"),
    (0, "mlp.up_proj"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Diagnosis]:
    from transformers import AutoTokenizer

    results = {}
    for source in ("demo", "demo:weight_outliers", "demo:activation_outliers"):
        model = Model(source, source)
        folder = model_folders.model_folder(model)
        calibration = Calibration("demo", "demo", "calibration", samples=2, length=128)
        windows = draw_windows(calibration, AutoTokenizer.from_pretrained(folder))
        results[source] = diagnose(model, folder, windows)
    return results


def names(reports: tuple) -> list[tuple[int, str]]:
    return [(report.block, report.linear) for report in reports]


def test_a_healthy_model_has_nothing_to_repair(found: dict[str, Diagnosis]) -> None:
    assert found["demo"].affected == () and found["demo"].overrides == []
    assert max(report.both for report in found["demo"].linears) < 1e-2
    assert "No linear stands out" in render(found["demo"])


def test_planted_weight_outliers_are_named_without_being_told(found: dict[str, Diagnosis]) -> None:
    diagnosis = found["demo:weight_outliers"]
    assert sorted(names(diagnosis.affected)) == sorted(PLANTED) == sorted(names(diagnosis.proposed))
    assert all(
        report.cause == "weights" and report.weight_ratio > 100 for report in diagnosis.affected
    )
    assert diagnosis.group_size == 16, "the plant fills one whole group of 16"
    assert sum(report.share for report in diagnosis.affected) > 0.99
    (override,) = diagnosis.overrides
    assert override["blocks"] == [0] and sorted(override["linears"]) == [
        "gate_proj",
        "k_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    healthy = {
        name: report
        for report, name in zip(found["demo"].linears, names(found["demo"].linears), strict=True)
    }
    for report in diagnosis.proposed:
        assert report.grouped < 2 * healthy[report.block, report.linear].both


def test_planted_activation_outliers_are_told_apart(found: dict[str, Diagnosis]) -> None:
    diagnosis = found["demo:activation_outliers"]
    assert sorted(names(diagnosis.affected)) == sorted(
        (block, name) for block in range(4) for _, name in PLANTED
    )
    assert all(
        report.cause == "activations" and report.activations > report.weights
        for report in diagnosis.affected
    )
    assert diagnosis.proposed == ()
    assert "smoothquant" in render(diagnosis)


def test_shares_add_up_and_the_record_is_json(found: dict[str, Diagnosis]) -> None:
    for diagnosis in found.values():
        assert sum(report.share for report in diagnosis.linears) == pytest.approx(1)
        assert (
            json.loads(json.dumps(diagnosis.record(), allow_nan=False))["model"] == diagnosis.model
        )
        assert len(diagnosis.channels["weights"]) == len(diagnosis.channels["activations"])


def test_a_stated_group_size_is_judged_and_not_another(tiny_model: object) -> None:
    folder = tiny_model("llama")  # type: ignore[operator]
    windows = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    diagnosis = diagnose(Model("tiny", str(folder)), folder, windows, group_size=32)
    assert diagnosis.group_size == 32
    assert len(diagnosis.linears) == 3 * 7


def test_the_command_writes_record_and_figures(tmp_path: Path) -> None:
    text = run(
        "demo:weight_outliers",
        [f"runs={tmp_path}", "calibration.samples=1", "device=cpu", "tracking=none"],
    )
    assert "MLflow" not in text
    place = tmp_path / "diagnoses" / "demo_weight_outliers"
    assert str(place) in text and '"group_size": 16' in text
    record = json.loads((place / "diagnosis.json").read_text())
    assert record["overrides"][0]["blocks"] == [0]
    made = {path.name for path in place.iterdir()}
    assert {
        f"{name}.png" for name in ("both", "weight-ratio", "activation-ratio", "channels")
    } <= made


def test_a_diagnosis_is_one_mlflow_run_however_often_it_is_made(
    tmp_path: Path, found: dict[str, Diagnosis]
) -> None:
    """Found again by what was asked; another question is another run. Figures and curves over blocks go with it."""
    from mlflow import MlflowClient

    diagnosis, runtime, place = (
        found["demo:weight_outliers"],
        Runtime(tmp_path / "runs", tracking=Tracking()),
        tmp_path / "made",
    )
    place.mkdir()
    (place / "both.png").write_bytes(b"a figure")
    for bits in (8, 8, 6):
        record = {**diagnosis.record(), "asked": {"bits": bits}}
        assert 'experiment "diagnoses"' in track(runtime, diagnosis, record, place)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("diagnoses")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    assert [each.data.params["bits"] for each in runs] == ["8", "6"]
    first = runs[0].info.run_id
    points = client.get_metric_history(first, "both/self_attn.q_proj")
    assert sorted((point.step, point.value > 0.1) for point in points) == [
        (0, True),
        (1, False),
        (2, False),
        (3, False),
    ]
    assert [file.path for file in client.list_artifacts(first)] == ["both.png"]
    assert "5 linears stand out" in runs[0].data.tags["mlflow.note.content"]


def test_a_tracking_server_that_is_not_there_costs_no_diagnosis(
    tmp_path: Path, found: dict[str, Diagnosis]
) -> None:
    runtime = Runtime(tmp_path / "runs", tracking=Tracking(kind="server", uri="http://127.0.0.1:9"))
    record = {**found["demo"].record(), "asked": {"bits": 8}}
    assert "no tracking server" in track(runtime, found["demo"], record, tmp_path)
    off = Runtime(tmp_path / "runs", tracking=Tracking(kind="none"))
    assert track(off, found["demo"], record, tmp_path) == ""
