"""The axes of a grid, the groups of conf/, and the keys of a sweep that are no axes."""

from __future__ import annotations

GROUPS = {  # what `harness list` calls them -> folder below conf/
    "models": "model",
    "methods": "method",
    "reductions": "reduction",
    "transforms": "transform",
    "roundings": "rounding",
    "tunings": "tuning",
    "schemes": "scheme",
    "calibrations": "calibration",
    "evaluations": "evaluation",
    "clusters": "cluster",
    "trackings": "tracking",
}
SLOTS = ("reduction", "transform", "rounding", "tuning")
AXES = ("model", "method", *SLOTS, "scheme", "calibration", "inputs", "seed")
EDITABLE = ("model", *SLOTS, "scheme", "calibration")  # axes with fields: "calibration.samples"
RUNTIME = (
    "runs",
    "store",
    "device",
    "priority",
    "batch_size",
    "fail_fast",
    "export",
    "notify",
    "data",
    "cluster",
    "tracking",
)
INPUTS = ("quantized", "full_precision")
