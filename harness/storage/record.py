"""The record of a cell: configuration, scores, checkpoint, layer errors, failures, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.core.cell import Cell

CHECKPOINT_METRICS = {  # manifest field -> metric
    "bits_per_weight": "checkpoint/bits_per_weight",
    "bits_per_weight_total": "checkpoint/bits_per_weight_total",
    "bits_per_original_weight": "checkpoint/bits_per_original_weight",
    "stored_bytes": "checkpoint/bytes",
    "seconds": "quantize/seconds",
    "peak_memory_bytes": "quantize/peak_memory_bytes",
}

DELTA_METRICS = (
    "bytes",
    "ends_bytes",
    "ratio",
    "base_bits_per_weight",
)  # of the manifest's `delta`


@dataclass(frozen=True)
class Record:
    """All facts of the store on a cell.

    manifest    of its checkpoint; None while there is none
    scores      evaluation name -> {"metrics": …, "stderr": …, "details": …, "score_key": …}; only complete ones
    missing     evaluations of the cell that have no score yet
    failures    newest last; {"stage", "kind", "reason", "detail", "time"}
    problems    damaged files that count as missing, one sentence each
    """

    cell: Cell
    quantize_key: str
    cell_key: str
    manifest: dict[str, Any] | None = None
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    failures: tuple[dict[str, Any], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.manifest is not None and not self.missing

    @property
    def smoke(self) -> bool:
        """Whether a score was made on a part of its data only (a smoke run)."""
        return any(score.get("details", {}).get("smoke") for score in self.scores.values())

    @property
    def layer_errors(self) -> list[dict[str, Any]]:
        """One row per quantized matrix: {"block", "linear", …}; at the cell's width where the checkpoint holds several."""
        rows = []
        for row in (self.manifest or {}).get("layer_errors", []):
            others = {name: value for name, value in row.items() if name != "at"}
            rows.append({**others, **row.get("at", {}).get(self._width(row), {})})
        return rows

    def _width(self, row: Mapping[str, Any]) -> str:
        """The bits of one matrix of the manifest in this cell."""
        return str(int(self.cell.scheme.weight_for(row["block"], row["linear"]).bits))

    def _sizes(self) -> dict[str, Any]:
        """Sizes of the cell as it is read, where its checkpoint holds several widths; {} where it holds one."""
        manifest = self.manifest or {}
        linears = manifest.get("linears", [])
        if not any("widths" in entry for entry in linears):
            return {}
        size = sum(
            entry.get("widths", {}).get(self._width(entry), entry["bytes"]) for entry in linears
        )
        weights = sum(entry["shape"][0] * entry["shape"][1] for entry in linears)
        total = 8 * size + manifest["unquantized_bits"]
        return {
            "bits_per_weight": 8 * size / weights,
            "bits_per_weight_total": total / manifest["parameters"],
            "stored_bytes": -(-total // 8),
        }

    def metrics(self) -> dict[str, float]:
        """Every number of the cell by full name: "wikitext2/perplexity", "arc_easy/acc_stderr", "checkpoint/bits_per_weight", …"""
        found: dict[str, float] = {}
        manifest = {**(self.manifest or {}), **self._sizes()}
        if (
            "bits_per_weight_total" in manifest
        ):  # a model that was not reduced has its original weights
            manifest = {"bits_per_original_weight": manifest["bits_per_weight_total"], **manifest}
        for source, metric in CHECKPOINT_METRICS.items():
            value = manifest.get(source)
            if isinstance(value, int | float):
                found[metric] = float(value)
        delta = (self.manifest or {}).get("delta") or {}
        found.update(
            {
                f"delta/{name}": float(delta[name])
                for name in DELTA_METRICS
                if isinstance(delta.get(name), int | float)
            }
        )
        cached = self.provenance.get("cache", {}).get("bits")
        if isinstance(cached, int | float):
            found["checkpoint/cache_bits"] = float(cached)
        for score in self.scores.values():
            found.update({name: float(value) for name, value in score["metrics"].items()})
            found.update(
                {f"{name}_stderr": float(value) for name, value in score.get("stderr", {}).items()}
            )
        return found

    def smoke_metrics(self) -> frozenset[str]:
        """Names of the metrics that were made on a part of their data only."""
        return frozenset(
            name
            for score in self.scores.values()
            if score.get("details", {}).get("smoke")
            for name in score["metrics"]
        )


def under_name(score: dict[str, Any], name: str) -> dict[str, Any]:
    """A score with the metric names of the evaluation `name`. Keys do not contain names, so it may have been made under another."""
    made_as = str(score.get("evaluation", name))
    if made_as == name:
        return score

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        own = f"{made_as}/"
        return {
            f"{name}/{key.removeprefix(own)}" if key.startswith(own) else key: value
            for key, value in values.items()
        }

    return {
        **score,
        "evaluation": name,
        **{part: renamed(score[part]) for part in ("metrics", "stderr") if part in score},
    }
