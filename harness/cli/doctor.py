"""What `harness doctor` looks at: whether this machine can run sweeps, or whether a model can be used. Changes nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import HarnessError
from harness.core.units import size
from harness.execution import provenance
from harness.planning.resources import available_memory, count_cores
from harness.storage.files import free_disk
from harness.storage.places import place_of
from harness.storage.store import Store

KNOWN_GOOD = {  # what the harness was tested with; another minor version may do as well
    "torch": "2.13",
    "transformers": "5.23",
    "ray": "2.60",
    "mlflow": "3.17",
    "lm-eval": "0.4",
    "hydra-core": "1.3",
    "datasets": "5.2",
}
LEAST_MEMORY_BYTES = 4e9  # the demo with its tracking server fits
LEAST_DISK_BYTES = 5e9


@dataclass(frozen=True)
class Check:
    """One thing looked at. level: "ok", "note" (may matter) or "wrong" (sweeps will fail); advice: what to do, "" when ok."""

    level: str
    subject: str
    fact: str
    advice: str = ""


def examine(runs: str = "runs") -> list[Check]:
    """Everything, each finding by itself: one that breaks is a finding too."""
    checks: list[Callable[[], Iterable[Check]]] = [
        _python,
        _packages,
        _cores,
        _memory,
        lambda: _disk(Store(runs).root),
        lambda: _store(runs),
        _gpus,
        _configs,
        _hub,
        _git,
    ]
    found: list[Check] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:  # a doctor that dies of the illness is of no use
            found.append(
                Check(
                    "wrong",
                    getattr(check, "__name__", "check").strip("_"),
                    f"{type(error).__name__}: {error}",
                )
            )
    return found


def examine_model(name: str) -> list[Check]:
    """Everything that config, headers of weight files and tokenizer of a model say, without reading weights.

    name: of a model in conf/model, a folder, a hub id, demo or tiny:NAME. Of a hub id that is not on this machine config.json alone
    is looked at.
    """
    from harness.config.grid import load_sweep
    from harness.data import model_folders
    from harness.quantization import models

    try:
        (cell,) = load_sweep(None, [f"model={name}", "method=none"]).cells
        folder = model_folders.config_folder(cell.model)
    except HarnessError as error:
        return [Check("wrong", "model", str(error))]
    found = [Check("ok", "folder", str(folder))]
    missing = model_folders.unchecked(cell.model)
    if missing:
        found.append(Check("note", "download", missing))
        try:
            shapes = models.shapes(folder)
        except HarnessError as error:
            return [*found, Check("wrong", "model", str(error))]
        return [*found, *(Check("note", "model", note) for note in shapes.notes)]
    seen = models.examine(folder)
    found += [Check("ok", subject, fact) for subject, fact in seen.facts]
    of_family = seen.shapes.notes if seen.shapes is not None else ()
    found += [Check("note", "model", note) for note in (*of_family, *seen.notes)]
    return [*found, *(Check("wrong", "model", fault) for fault in seen.faults)]


def render(found: Iterable[Check], ready: str = "ready   harness run demo") -> str:
    """One line per finding, its advice below it; a last line that says whether anything is wrong. ready: that line if not."""
    found = list(found)
    width = max(len(each.subject) for each in found)
    lines = []
    for each in found:
        lines.append(f"{each.level:<6}  {each.subject:<{width}}  {each.fact}")
        if each.advice:
            lines.append(f"{'':<6}  {'':<{width}}  -> {each.advice}")
    wrong = sum(each.level == "wrong" for each in found)
    lines.append(f"{wrong} wrong: repair these before a sweep" if wrong else ready)
    return "\n".join(lines)


def _python() -> Iterable[Check]:
    fine = sys.version_info >= (3, 11)
    fact = f"{platform.python_version()} ({sys.executable})"
    yield Check("ok" if fine else "wrong", "python", fact, "" if fine else "use 3.11 or later")


def _packages() -> Iterable[Check]:
    installed = provenance.versions()
    for package, good in KNOWN_GOOD.items():
        version = installed.get(package)
        if version is None:
            yield Check("wrong", package, "not installed", "make install, or pip install -e .")
        elif version.split(".")[0] != good.split(".")[0]:
            advice = "another major version: run the tests before trusting numbers"
            yield Check("note", package, f"{version}, tested with {good}", advice)
        else:
            yield Check(
                "ok",
                package,
                version if version.startswith(good) else f"{version} (tested with {good})",
            )
    for module in ("ray", "mlflow", "lm_eval"):
        if importlib.util.find_spec(module) is None:
            yield Check("wrong", module, "cannot be imported", "make install, or pip install -e .")


def _cores() -> Iterable[Check]:
    cores = count_cores()
    yield Check("ok", "cores", f"{cores} usable")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) > cores:
        yield Check(
            "note",
            "OMP_NUM_THREADS",
            f"{threads} on {cores} cores",
            "unset it: workers set their own threads",
        )
    if os.environ.get("OMP_WAIT_POLICY", "PASSIVE").upper() == "ACTIVE":
        yield Check(
            "note",
            "OMP_WAIT_POLICY",
            "ACTIVE",
            "unset it: spinning threads slow the other workers some tenfold",
        )


def _memory() -> Iterable[Check]:
    free = available_memory()
    small = free < LEAST_MEMORY_BYTES
    advice = "end other programs, or use cluster.workers=1" if small else ""
    yield Check("note" if small else "ok", "memory", f"{size(free)} free", advice)


def _disk(runs: Path) -> Iterable[Check]:
    free = free_disk(runs)
    small = free < LEAST_DISK_BYTES
    fact, advice = (
        f"{size(free)} free for {runs.absolute()}",
        "keep results elsewhere: runs=FOLDER" if small else "",
    )
    yield Check("note" if small else "ok", "disk", fact, advice)


def _store(runs: str) -> Iterable[Check]:
    place = place_of(runs)
    path = Store(place).root
    existed = path.exists()
    try:
        Store(place).check_writable()
        yield Check("ok", "runs", f"{place} can be written")
    except HarnessError as error:
        yield Check("wrong", "runs", str(error))
    finally:
        if not existed and path.is_dir():
            path.rmdir()


def _gpus() -> Iterable[Check]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        listed = (
            subprocess.run([driver, "-L"], capture_output=True, text=True, timeout=30).stdout
            if driver
            else ""
        )
        cards = sum(line.startswith("GPU") for line in listed.splitlines())
        if cards:
            advice = "install the CUDA build of torch that fits the driver, or set device=cpu"
            yield Check(
                "wrong",
                "GPU",
                f"nvidia-smi sees {cards}, torch {torch.__version__} sees none",
                advice,
            )
        else:
            yield Check("ok", "GPU", "none; sweeps run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        busy = free < 0.9 * total
        advice = "something else uses it: efficiency figures would not be its own" if busy else ""
        fact = f"{torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free"
        yield Check("note" if busy else "ok", f"GPU {index}", fact, advice)


def _configs() -> Iterable[Check]:
    from harness.config.locations import list_names

    counts = {
        group: len(list_names(group))
        for group in ("sweeps", "models", "methods", "schemes", "evaluations")
    }
    words = ", ".join(f"{count} {group}" for group, count in counts.items())
    empty = [group for group, count in counts.items() if not count]
    advice = f"no {', '.join(empty)}: run from the checkout or reinstall" if empty else ""
    yield Check("wrong" if empty else "ok", "configs", words, advice)


def _hub() -> Iterable[Check]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    token = (
        "a token is set"
        if os.environ.get("HF_TOKEN")
        else "no HF_TOKEN: gated models (Llama) cannot be downloaded"
    )
    yield Check(
        "ok", "hub", "offline (HF_HUB_OFFLINE): local models and data alone" if offline else token
    )


def _git() -> Iterable[Check]:
    state = provenance.git_state()
    if "+" in state:
        advice = "records carry the digest of the changes; commit before a study"
        yield Check("note", "checkout", f"commit {state[:12]} with changes", advice)
    else:
        yield Check("ok", "checkout", f"commit {state[:12]}" if state else "an installed package")
