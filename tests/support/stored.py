"""Cells and stores with known contents."""

from __future__ import annotations

from harness.core.cell import Cell, Evaluation, Method, Model, Part, Scheme, freeze

PERPLEXITY = Evaluation("wikitext2", "perplexity", freeze({"length": 2048}), data_digest="w")


ARC = Evaluation("arc_easy", "lm_eval_tasks", freeze({"task": "arc_easy"}), data_digest="a")


def make_cell(
    method: str = "gptq", evaluations: tuple[Evaluation, ...] = (PERPLEXITY, ARC)
) -> Cell:
    rounding = Method(method, rounding=Part(method))
    return Cell(
        Model("demo", "demo", digest="d"), rounding, Scheme("w4g32"), evaluations=evaluations
    )
