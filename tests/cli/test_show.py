"""What `harness show` says of experts that calibration did not reach."""

from __future__ import annotations

from pathlib import Path

from harness.cli.show import record_text
from harness.core.cell import Cell, Method, Model, Part, Scheme
from harness.storage.record import Record
from harness.storage.store import Store


def test_show_counts_the_experts_that_were_rounded_to_nearest(tmp_path: Path) -> None:
    cell = Cell(
        Model("mixture", "mixture", digest="d"),
        Method("gptq", rounding=Part("gptq")),
        Scheme("w4g32"),
    )
    notes = {
        "0": {
            "rounded_to_nearest": {
                "mlp.experts.3.gate_proj": 0,
                "mlp.experts.3.up_proj": 0,
                "mlp.experts.3.down_proj": 7,
            }
        },
        "1": {"pairs_without_calibration": ["mlp.experts.3.up_proj → mlp.experts.3.down_proj"]},
    }
    text = record_text(Record(cell, "q", "c", {"notes": notes}), Store(tmp_path), "again")
    assert "3 matrices were rounded to nearest instead" in text
    assert "block 0  3, of them 2 without any token: mlp.experts.3.gate_proj (0 tokens)" in text
    assert "1 scales inside experts were left at 1" in text
    assert "too few calibration" not in record_text(
        Record(cell, "q", "c", {"notes": {}}), Store(tmp_path), "again"
    )


def test_show_says_what_one_more_fine_tune_costs(tmp_path: Path) -> None:
    cell = Cell(
        Model("tuned", "tuned", digest="d", base="base", base_digest="e" * 64),
        Method("bitdelta", rounding=Part("bitdelta", needs=("base_weight",))),
        Scheme("sign"),
    )
    manifest = {
        "bits_per_weight": 1.0,
        "base": {"source": "base", "dtype": "bfloat16", "digest": "e" * 64},
        "delta": {
            "bytes": 1000,
            "ends_bytes": 200,
            "fine_tune_bytes": 18000,
            "ratio": 15.0,
            "base_bits_per_weight": 16.0,
        },
    }
    record = Record(cell, "q", "c", manifest)
    assert record.metrics()["delta/ratio"] == 15 and record.metrics()["delta/ends_bytes"] == 200
    text = record_text(record, Store(tmp_path), "again")
    assert "1,200: 1,000 of matrices, 200 of other tensors that differ" in text
    assert "17.000 for 1, 9.000 for 2, 5.000 for 4, 2.000 for 16" in text
    assert f"base, weights {'e' * 64}" in " ".join(text.split())
    other = record_text(Record(cell, "q", "c", {}), Store(tmp_path), "again")
    assert "difference from the base" not in other


def test_facts_that_were_not_recorded_are_not_shown_as_none(tmp_path: Path) -> None:
    cell = Cell(Model("demo", "demo"), Method("none"), Scheme("full"))
    facts = {"quantize": {"device": "cpu", "host": None}}
    text = record_text(Record(cell, "q", "c", provenance=facts), Store(tmp_path), "again")
    assert "quantize: cpu on host not known, threads not known" in text and "None" not in text
