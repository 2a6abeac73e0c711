"""Runs every task in a new process of this machine, without Ray."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

from harness.core.failures import FailureKind
from harness.core.sweep import Runtime
from harness.execution import worker
from harness.execution.executors.base import (
    POLL_SECONDS,
    Exit,
    Message,
    gpus_of,
    process_environment,
)
from harness.execution.tasks import Task, decode, decode_event, encode, encode_event
from harness.planning.resources import count_cores, count_gpus

STOP_SECONDS = 5.0  # between SIGTERM and SIGKILL
PRINTED_BYTES = 4000  # of a worker's last output, stored with its failure


class Processes:
    """Runs every task in a new process of this machine, which sees as many GPUs as the task needs.

    A worker reads its task as JSON from its standard input and writes events as lines of JSON to a pipe; what libraries print goes
    to a file, whose last lines are the detail of a failure.
    """

    def __init__(self, workers: int, runtime: Runtime) -> None:
        self.worker_slots = workers
        self.threads = max(1, count_cores() // workers)
        self._gpus = count_gpus() if runtime.device != "cpu" else 0
        self._hidden = runtime.device == "cpu"
        self.gpu_fraction, self.max_gpus = min(1.0, self._gpus / workers), self._gpus
        self._news: queue.Queue[Message] = queue.Queue()
        self._running: dict[int, tuple[subprocess.Popen[str], list[int]]] = {}

    def width(self, gpus: float) -> int:
        """Where tasks share GPUs, a task that needs more than its fraction takes all slots."""
        if gpus <= self.gpu_fraction or not self._gpus:
            return 1
        return (
            self.worker_slots
            if self._gpus < self.worker_slots
            else math.ceil(gpus / (self._gpus // self.worker_slots))
        )

    def waits(self, number: int) -> bool:
        return False

    def submit(self, number: int, task: Task) -> None:
        devices = getattr(task, "devices", 1)
        taken = {place for _, places in self._running.values() for place in places}
        places = [place for place in range(self.worker_slots) if place not in taken][
            : self.width(gpus_of(task))
        ]
        environment = {**os.environ, **process_environment(self.threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                _visible_gpu(index) for index in self._gpus_of(places)[:devices]
            )
        elif self._hidden:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        ours, theirs = os.pipe()
        printed = tempfile.TemporaryFile("w+", errors="replace")
        command = [
            sys.executable,
            "-c",
            "from harness.execution.executors.processes import serve; serve()",
            str(theirs),
            str(os.getpid()),
        ]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            pass_fds=(theirs,),
            text=True,
        )
        os.close(theirs)
        self._running[number] = process, places
        threading.Thread(
            target=self._listen, args=(number, process, ours, printed), daemon=True
        ).start()
        assert process.stdin is not None
        # The exit code of a process that died at once is reported.
        with contextlib.suppress(BrokenPipeError), process.stdin:
            json.dump(encode(task), process.stdin)

    def _gpus_of(self, places: Sequence[int]) -> list[int]:
        """The GPUs of slots: each slot has GPUs of its own, or shares one with other slots."""
        each = max(1, self._gpus // self.worker_slots)
        if len(places) == self.worker_slots:
            return list(range(self._gpus))
        return [
            index % self._gpus
            for place in places
            for index in range(place * each, (place + 1) * each)
        ]

    def _listen(
        self, number: int, process: subprocess.Popen[str], pipe: int, printed: IO[str]
    ) -> None:
        with open(pipe, encoding="utf-8") as lines, printed:
            for line in lines:
                if line.endswith("\n"):  # a killed worker may leave an incomplete line
                    self._news.put(Message(number, decode_event(json.loads(line))))
            code = process.wait()
            printed.seek(0, os.SEEK_END)
            printed.seek(max(0, printed.tell() - PRINTED_BYTES))
            self._news.put(Message(number, _exit_of(code, printed.read())))

    def wait(self) -> list[Message]:
        messages = []
        try:
            messages.append(self._news.get(timeout=POLL_SECONDS))
            while True:
                messages.append(self._news.get_nowait())
        except queue.Empty:
            pass
        known = [
            message for message in messages if message.number in self._running
        ]  # a cancelled task sends no more messages
        for message in known:
            if isinstance(message.news, Exit):
                del self._running[message.number]
        return known

    def cancel(self, number: int) -> None:
        process, _ = self._running.pop(number)
        _end([process])

    def close(self) -> None:
        _end([process for process, _ in self._running.values()])
        self._running.clear()


def serve() -> None:
    """The main function of a worker process. Arguments: the pipe for events, the driver's process id."""
    pipe, driver = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides which tasks an interrupt ends
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    with open(pipe, "w", encoding="utf-8") as out:
        for event in worker.run(decode(json.load(sys.stdin))):
            out.write(json.dumps(encode_event(event)) + "\n")
            out.flush()


def _end_with(driver: int) -> None:
    """End this process when the driver has ended, for whatever reason."""
    while os.getppid() == driver:
        time.sleep(0.5)
    os._exit(1)


def _exit_of(code: int, printed: str) -> Exit:
    if code == 0:
        return Exit()
    if code < 0:
        name = (
            signal.Signals(-code).name
            if -code in {s.value for s in signal.Signals}
            else f"signal {-code}"
        )
        killed = FailureKind.KILLED
        return Exit(killed, f"{killed.sentence} by {name}", printed)
    last = next(
        (line for line in reversed(printed.splitlines()) if line.strip()), "it printed nothing"
    )
    return Exit(FailureKind.ERROR, f"the worker process ended with code {code}: {last}", printed)


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _visible_gpu(index: int) -> str:
    """The index-th GPU that this process itself may see."""
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return visible[index] if index < len(visible) else str(index)
