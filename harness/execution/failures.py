"""Events of failures, and marks in the records of cells whose memory ran out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable

from harness.core.errors import HarnessError
from harness.core.events import Failed
from harness.core.failures import failure_kind
from harness.storage.store import Store


def ran_out(
    store: Store,
    keys: Iterable[str],
    stage: str,
    beside: int,
    peak_memory_bytes: int,
    devices: int = 0,
    offload: bool = False,
) -> None:
    """Record for cells that memory ran out, so that later plans give them, and larger cells, more memory.

    stage    "quantize" or "evaluate"
    beside   checkpoints that the task made together (0: no other task ran on its machine or node), or sequences that it scored
             together (0: as many as the evaluator chose)
    devices  GPUs that it had; 0: main memory ran out
    offload  the model's blocks were in main memory
    """
    facts = {
        "beside": beside,
        "peak_memory_bytes": peak_memory_bytes,
        "devices": devices,
        "offload": offload,
        "time": time.time(),
    }
    for key in keys:
        store.write_provenance(key, {f"out_of_memory_{stage}": facts})


def failure(error: BaseException, keys: tuple[str, ...], stage: str) -> Failed:
    """The Failed event of an exception: its kind, its message in one line, and the traceback as detail."""
    text = str(error) or type(error).__name__
    reason = text if isinstance(error, HarnessError) else f"{type(error).__name__}: {text}"
    detail = "".join(traceback.format_exception(error))
    return Failed(
        time.time(),
        keys,
        stage=stage,
        kind=failure_kind(error),
        reason=reason.strip().splitlines()[0],
        detail=detail,
    )
