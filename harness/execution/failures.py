"""What a failure is called, and whether memory ran out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable

from harness.core.errors import HarnessError
from harness.core.events import Failed
from harness.storage.store import Store

OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
)


def ran_out(
    store: Store,
    keys: Iterable[str],
    stage: str,
    beside: int,
    peak_memory_bytes: int,
    devices: int = 0,
    offload: bool = False,
) -> None:
    """Note in the records that memory ran out, for plans of cells that need as much or more.

    stage    "quantize" or "evaluate"
    beside   how many checkpoints the task made together (0: it had a machine or a node to itself), or sequences it scored together
             (0: as many as the evaluator chose)
    devices  GPUs that it had; 0: it was main memory that ran out
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
    """A Failed event of an exception: kind "out_of_memory" where memory ran out, else "error"; one line, and the traceback."""
    text = str(error) or type(error).__name__
    kind = "out_of_memory" if is_out_of_memory(error) else "error"
    reason = text if isinstance(error, HarnessError) else f"{type(error).__name__}: {text}"
    detail = "".join(traceback.format_exception(error))
    return Failed(
        time.time(),
        keys,
        stage=stage,
        kind=kind,
        reason=reason.strip().splitlines()[0],
        detail=detail,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's own error on a card, Python's, and the plain RuntimeError of torch's CPU allocator."""
    if isinstance(error, MemoryError) or type(error).__name__ in (
        "OutOfMemoryError",
        "TorchOutOfMemoryError",
    ):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in OUT_OF_MEMORY_WORDS
    )
