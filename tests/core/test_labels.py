"""What cells are called in tables, and what tells them apart."""

from __future__ import annotations

import dataclasses

from synthetic_sweep import LLAMA, cells, w4a8

from harness.core.cell import (
    ActivationScheme,
    Cell,
    Method,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
    freeze,
)
from harness.core.labels import bits_text, replicates, with_variants


def test_labels() -> None:
    assert bits_text(w4a8(LLAMA)) == "W4A8"
    assert bits_text(cells(LLAMA)[0]) == "16"
    fp8 = Scheme("fp8", WeightScheme("fp8_e4m3", 8), ActivationScheme("fp8_e4m3", bits=8))
    assert bits_text(Cell(LLAMA, Method("rtn", rounding=Part("rtn")), fp8)) == "W8A8 fp8_e4m3"
    nf4 = Cell(
        LLAMA, Method("rtn", rounding=Part("rtn")), Scheme("nf4", WeightScheme("nf4", 4, 64))
    )
    assert bits_text(nf4) == "4 nf4"


def test_names_tell_apart_what_a_sweep_varies() -> None:
    first = cells(LLAMA, ("gptq",), (4, 3))[1]
    assert first.calibration is not None
    other = dataclasses.replace(
        first.calibration, name="pile", source="pile", digest="p", packing="document"
    )
    grid = [
        dataclasses.replace(
            first, inputs=inputs, calibration=dataclasses.replace(calibration, seed=seed), seed=seed
        )
        for inputs in ("quantized", "full_precision")
        for calibration in (first.calibration, other)
        for seed in (0, 1)
    ]
    titles = [cell.title for cell in with_variants(grid)]
    assert len(set(titles)) == 8 and titles[-1].endswith(
        "w4g128 · calibration pile · inputs full_precision · seed 1"
    )
    plain = with_variants([*cells(LLAMA), w4a8(LLAMA)])
    assert not any(cell.variant for cell in plain)  # nothing to tell apart
    # names are no part of a key
    assert list(map(cell_key, with_variants(grid))) == list(map(cell_key, grid))
    other_settings = dataclasses.replace(
        first,
        method=dataclasses.replace(
            first.method,
            rounding=Part("gptq", freeze({"damping_fraction": 0.1}), needs=("hessian",)),
        ),
    )
    assert [cell.variant for cell in with_variants([first, other_settings])] == [
        "rounding.damping_fraction 0.01",
        "rounding.damping_fraction 0.1",
    ]
    assert [len(row) for row in replicates(grid)] == [2] * 4
