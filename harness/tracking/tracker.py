"""The interface of a tracker, and the tracker that does nothing. Loads without MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from harness.storage.record import Record

if TYPE_CHECKING:
    from harness.reporting.table_data import TableData


STATUS = {  # state of a cell -> status of its run
    "waiting": "SCHEDULED",
    "quantizing": "RUNNING",
    "evaluating": "RUNNING",
    "done": "FINISHED",
    "failed": "FAILED",
    "refused": "FAILED",
    "unfinished": "KILLED",
}


class Tracker(Protocol):
    """Where a sweep's records go while it runs."""

    def cell(self, record: Record, state: str) -> None:
        """Note what is known of a cell now. state: a key of STATUS."""

    def progress(self, text: str) -> None:
        """How far the sweep is, in words."""

    def usage(self, cell_key: str, facts: Mapping[str, float]) -> None:
        """The resources that the process which works on a cell takes now, by name."""

    def finish(self, made: Mapping[str, TableData], files: Sequence[Path], summary: str) -> str:
        """Close the sweep; returns its page, from the server's address on, "" where there is none.

        made: its tables by name; files: its figures and its report; summary: the last lines that the run printed.
        """


class NullTracker:
    """Tracking is off."""

    def progress(self, text: str) -> None:
        pass

    def usage(self, cell_key: str, facts: Mapping[str, float]) -> None:
        pass

    def cell(self, record: Record, state: str) -> None:
        pass

    def finish(self, made: Mapping[str, TableData], files: Sequence[Path], summary: str) -> str:
        return ""
