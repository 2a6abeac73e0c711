"""Shell completion: names of sweeps, keys and values of overrides, keys of cells, export formats."""

from __future__ import annotations

from collections.abc import Iterator

AXES = (
    "model",
    "method",
    "transform",
    "rounding",
    "scheme",
    "calibration",
    "cluster",
    "tracking",
)  # values: conf/<axis>/
PLAIN_KEYS = (
    "inputs",
    "seed",
    "evaluations",
    "evaluations.limit",
    "calibration.samples",
    "runs",
    "device",
    "priority",
    "batch_size",
    "fail_fast",
    "export",
    "data.root",
    "baseline",
    "cluster.workers",
    "cluster.gpus_per_task",
    "cluster.gpu_memory",
    "cluster.address",
    "tracking.uri",
)
INPUTS = ("quantized", "full_precision")
GROUPS = (
    "sweeps",
    "models",
    "methods",
    "schemes",
    "calibrations",
    "evaluations",
    "evaluators",
    "transforms",
    "roundings",
    "clusters",
    "trackings",
)


def complete_sweep(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of sweeps and, as the first word may be one too, overrides."""
    from harness.config.locations import list_names

    yield from (
        (entry.name, entry.title)
        for entry in list_names("sweeps")
        if entry.name.startswith(incomplete)
    )
    yield from complete_override(incomplete)


def complete_override(incomplete: str) -> Iterator[tuple[str, str]]:
    """Keys of overrides; after "=", and after each comma of a list, the names of that group."""
    from harness.config.locations import list_names

    key, equals, value = incomplete.partition("=")
    if not equals:
        yield from (
            (f"{name}=", "") for name in (*AXES, *PLAIN_KEYS) if name.startswith(incomplete)
        )
        return
    chosen, comma, last = value.rpartition(",")
    if key == "inputs":
        names = [(name, "") for name in INPUTS]
    elif key in AXES or key == "evaluations":
        names = [
            (entry.name, entry.title) for entry in list_names(key if key in AXES else "evaluations")
        ]
    else:
        return
    taken = chosen.split(",")
    yield from (
        (f"{key}={chosen}{comma}{name}", title)
        for name, title in names
        if name.startswith(last) and name not in taken
    )


def complete_group(incomplete: str) -> list[str]:
    """Groups of `harness list`."""
    return [group for group in GROUPS if group.startswith(incomplete)]


def complete_key(incomplete: str) -> Iterator[tuple[str, str]]:
    """Cells in ./runs, by the first digits of their keys."""
    from harness.storage.store import Store

    store = Store("runs")
    for key in store.cell_keys():
        cell = store.cell(key) if key.startswith(incomplete) else None
        if cell is not None:
            yield key[:12], cell.title


def complete_layout(incomplete: str) -> list[str]:
    """Formats of `harness export`."""
    from harness.quantization.export import layouts

    return [name for name in layouts() if name.startswith(incomplete)]
