"""Heat maps of layer errors: output errors where they are known, the worst cells of many, labels that fit."""

from __future__ import annotations

import dataclasses

import pytest
from synthetic_sweep import fill, make_sweep

from harness.reporting import heat_maps
from harness.reporting.heat_maps import error_overview
from harness.storage.record import Record


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    sweep = make_sweep(tmp_path_factory.mktemp("study"))
    store = fill(sweep)
    return [store.record(cell) for cell in sweep.cells]


def test_layer_errors_show_the_errors_of_outputs(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_overview(records[:1]) is None
    whole = error_overview(records)
    assert whole is not None
    monkeypatch.setattr(heat_maps, "OVERVIEW_ROWS", 2)
    worst = error_overview(records)
    assert worst is not None and worst.get_size_inches()[1] < whole.get_size_inches()[1]
    labels = [text.get_text() for text in worst.axes[0].get_yticklabels()]
    assert len(labels) == 2 and all("w2" in label or "w3" in label for label in labels), labels
    monkeypatch.undo()
    data_free = [  # as cells whose method needs no Hessian have it
        dataclasses.replace(
            record,
            manifest=(record.manifest or {})
            | {"layer_errors": [{**row, "output_error": None} for row in record.layer_errors]},
        )
        if record.cell.method.name == "rtn"
        else record
        for record in records
    ]
    mixed = error_overview(data_free)
    assert mixed is not None and "output error" in mixed.axes[1].get_ylabel()
    assert not any("rtn" in text.get_text() for text in mixed.axes[0].get_yticklabels())
    only = error_overview([record for record in data_free if record.cell.method.name == "rtn"])
    assert only is not None and "weight error" in only.axes[1].get_ylabel()


@pytest.mark.parametrize("rows", [1, 2, 5, 14])
def test_the_label_of_layer_errors_fits_the_figure(records: list[Record], rows: int) -> None:
    quantized = [record for record in records if record.layer_errors]
    figure = error_overview(quantized[:rows] or quantized)
    assert figure is not None
    figure.draw_without_rendering()
    label = figure.axes[1].yaxis.label.get_window_extent()
    assert 0 <= label.y0 and label.y1 <= figure.bbox.height
    assert 0 <= label.x0 and label.x1 <= figure.bbox.width
