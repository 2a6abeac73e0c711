"""`harness status`: the progress of a sweep, and of all sweeps of a store, as facts and as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from harness.config.locations import config_files
from harness.core.cell import Cell, cell_key
from harness.core.failures import with_remedy
from harness.core.units import duration
from harness.execution.coordination import active_drivers
from harness.storage.store import Store
from harness.storage.sweep_state import is_running

WATCH_SECONDS = 2.0
CLEAR = "\x1b[H\x1b[2J"  # a terminal's screen


def sweep_facts(store: Store, name: str, cells: Iterable[Cell]) -> dict[str, Any]:
    """The progress of a sweep as JSON: a count per state, what runs now, the failures, and the drivers that run it."""
    state = store.sweep_state(name) or {}
    running = bool(state) and is_running(state)
    counts = {"done": 0, "partly": 0, "waiting": 0, "failed": 0}
    failures, now = [], []
    for cell in cells:
        record, seen = store.record(cell), state.get("cells", {}).get(cell_key(cell), {})
        named = {"key": record.cell_key, "title": cell.title}
        if record.complete:
            counts["done"] += 1
            continue
        if record.failures:
            kind, last = "failed", record.failures[-1]
            reason = with_remedy(last.get("reason", ""), last.get("kind", ""))
            failures.append({**named, "kind": last.get("kind", ""), "reason": reason})
        else:
            kind = "partly" if record.manifest is not None or record.scores else "waiting"
        if running and seen.get("state") in ("quantizing", "evaluating"):
            steps = {key: seen[key] for key in ("stage", "step", "steps") if key in seen}
            now.append({**named, "state": seen["state"], **steps})
        counts[kind] += 1
    drivers = [
        {"process": each["owner"]["pid"], "priority": each["priority"], "behind": each["behind"]}
        for each in active_drivers(store)
        if each["sweep"] == name
    ]
    return {
        "sweep": name,
        "cells": sum(counts.values()),
        **counts,
        "running": running,
        "started": state.get("started"),
        "updated": state.get("updated"),
        "ended": state.get("ended"),
        "seconds_left": state.get("seconds_left") if running else None,
        "process": state["owner"]["pid"] if running else None,
        "now": now,
        "failures": failures,
        "drivers": drivers,
    }


def status(store: Store, name: str, cells: Iterable[Cell]) -> str:
    """The progress of a sweep as text."""
    return status_text(sweep_facts(store, name, cells))


def status_text(facts: Mapping[str, Any]) -> str:
    """The facts of one sweep as text: a line of counts, then a line per running and per failed cell, with its remedy."""
    words = [f"{facts['done']} of {facts['cells']} cells done"]
    words += [f"{facts[kind]} {kind}" for kind in ("partly", "waiting", "failed") if facts[kind]]
    if facts["running"]:
        since = time.strftime("%H:%M:%S", time.localtime(facts["started"]))
        words.append(f"running since {since} (process {facts['process']})")
        if facts["seconds_left"] is not None:
            words.append(f"{duration(facts['seconds_left'])} left")
    lines = [f"status  {facts['sweep']}: {' · '.join(words)}"]
    for each in facts["now"]:
        step = f"{each['stage']} {each['step']}/{each['steps']}" if each.get("stage") else ""
        lines.append(f"now     {each['title']}    {step or each['state']}")
    for each in facts["failures"]:
        lines.append(
            f"FAIL    {each['title']}    {each['reason']}    harness show {each['key'][:8]}"
        )
    for each in facts["drivers"]:
        if each["priority"] or each["behind"]:
            waits = f", waiting for {each['behind']}" if each["behind"] else ""
            lines.append(f"order   process {each['process']}: priority {each['priority']}{waits}")
    return "\n".join(lines)


def store_facts(store: Store) -> list[dict[str, Any]]:
    """Every sweep that ran on a store, the latest first: its state, progress, times, and the command that goes on with it.

    state: running; done; failed (cells failed); stopped (it ended before it was finished); died (its process did not end it).
    """
    found = []
    for name in store.sweep_names():
        state = store.sweep_state(name)
        if state is None:
            continue
        states = [each.get("state", "waiting") for each in state["cells"].values()]
        done, failed = states.count("done"), states.count("failed")
        running = is_running(state)
        if running:
            word = "running"
        elif state.get("ended") is None:
            word = "died"
        else:
            word = "done" if done == len(states) else "failed" if failed else "stopped"
        found.append(
            {
                "sweep": name,
                "title": state.get("title", ""),
                "state": word,
                "cells": len(states),
                "done": done,
                "failed": failed,
                "started": state["started"],
                "updated": state["updated"],
                "ended": state.get("ended"),
                "seconds_left": state.get("seconds_left") if running else None,
                "process": state["owner"]["pid"] if running else None,
                "resume": "" if word in ("running", "done") else resume_command(name, state),
            }
        )
    return sorted(found, key=lambda each: -float(each["updated"]))


def resume_command(name: str, state: Mapping[str, Any]) -> str:
    """The command that goes on with a sweep: as it was run, else by its name in sweeps/; "" where neither is known."""
    return str(
        state.get("command") or (f"harness run {name}" if name in config_files("sweeps") else "")
    )


def store_text(place: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The sweeps of a store as text, two lines for one that is to be resumed."""
    if not found:
        return f"no sweep has run on {place} yet; start with: harness run demo"
    width = min(40, max(len(each["sweep"]) for each in found))
    lines = []
    for each in found:
        progress = f"{each['done']} of {each['cells']} cells"
        progress += f", {each['failed']} failed" if each["failed"] else ""
        moment = time.strftime("%d %b %H:%M", time.localtime(each["updated"]))
        if each["state"] == "running":
            left = each["seconds_left"]
            when = f"{duration(left)} left" if left is not None else "time left not known yet"
        else:
            when = {"died": f"last seen {moment}"}.get(each["state"], f"ended {moment}")
        lines.append(f"{each['state']:<8}{each['sweep']:<{width}}  {progress}  {when}")
        lines += [f"        {each['resume']}"] if each["resume"] else []
    return "\n".join(lines)


def watch(
    look: Callable[[], tuple[str, bool]], clear: bool, seconds: float = WATCH_SECONDS
) -> None:
    """Print look()'s text again and again, until it says that nothing runs, or Ctrl-C. clear: on an empty screen each time."""
    try:
        while True:
            text, running = look()
            print(f"{CLEAR if clear else ''}{text}", flush=True)
            if not running:
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        return
