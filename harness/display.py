"""What a person sees in the shell: a sweep while it runs, its summary, its state, and one record in full. Loads without torch.

`show_events` chooses a live view for a terminal and plain lines for a pipe or a log; both print a line per finished or failed cell.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from harness.cell import Cell, baseline_of, cell_key, quantize_key, score_key, to_json, untuned
from harness.control import living
from harness.errors import HarnessError
from harness.events import Event, Failed, Joined, Progress, Quantized, Scored, TaskStarted, Turn
from harness.flips import with_flips
from harness.plan import Plan, duration
from harness.store import Record, Store, is_running

SHOWN_AT_ONCE = 8                               # running cells in the live view
SHOWN_METRICS = 6                               # on a cell's line


class Tally:
    """How far a sweep is: what each cell still waits for, fed with events.

    units of work are checkpoints and evaluations; a block or a batch is a fraction of one. They give the remaining time.
    """

    def __init__(self, plan: Plan) -> None:
        self.cells: dict[str, Cell] = {cell_key(cell): cell for cell in plan.sweep.cells}
        self.pending: dict[str, set[str]] = {cell_key(cell): set() for cell in plan.missing}
        for each in plan.passes:
            for cell in each.cells:
                self.pending[cell_key(cell)].add("checkpoint")
        for scoring in plan.scorings:
            for cell, evaluations in zip(scoring.cells, scoring.evaluations, strict=True):
                self.pending[cell_key(cell)] |= {evaluation.name for evaluation in evaluations}
        self.units = sum(map(len, self.pending.values()))
        self.failed: dict[str, Failed] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self.running: dict[str, Progress] = {}
        self.began = time.monotonic()

    @property
    def done(self) -> list[str]:
        """Keys of the missing cells that are now complete."""
        return [key for key, waits in self.pending.items() if not waits and key not in self.failed]

    @property
    def fraction(self) -> float:
        """Share of the work that is done or can no longer be done."""
        if not self.units:
            return 1.0
        left = sum(len(waits) for key, waits in self.pending.items() if key not in self.failed)
        underway = sum(step.step / step.steps for key, step in self.running.items() if step.steps and key not in self.failed)
        return min(1.0, max(0.0, (self.units - left + min(underway, left)) / self.units))

    @property
    def seconds_left(self) -> float | None:
        """None until a twentieth is done, from which one may extrapolate."""
        fraction = self.fraction
        return None if fraction < 0.05 else (time.monotonic() - self.began) * (1 - fraction) / fraction

    def add(self, event: Event) -> list[str]:
        """Take in an event; return the keys of the cells that it completes."""
        finished = []
        for key in event.cell_keys:
            if key not in self.pending:
                continue
            waits = self.pending[key]
            match event:
                case Progress():
                    self.running[key] = event
                case Quantized():
                    waits.discard("checkpoint")
                    self.running.pop(key, None)
                case Scored():
                    waits.discard(event.evaluation)
                    self.metrics.setdefault(key, {}).update(event.metrics)
                    self.running.pop(key, None)
                case Failed():
                    self.running.pop(key, None)
                    if not event.retry:
                        self.failed[key] = event
                case _:
                    continue
            if not waits and isinstance(event, Quantized | Scored) and key not in self.failed:
                finished.append(key)
        return finished


class Display(Protocol):
    """Shows a running sweep. event: after the tally has taken it in, with the cells that it completed."""

    def line(self, text: str) -> None: ...

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing: for notebooks and tests."""

    def line(self, text: str) -> None:
        pass

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A line per checkpoint, finished cell and failure: for pipes and logs."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        for line in news(event, tally, finished):
            self.line(line)

    def close(self) -> None:
        pass


class Live:
    """The same lines, and below them a bar, the remaining time and what is being worked on."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = Console(highlight=False)
        self._live = RichLive("", console=self._console, refresh_per_second=8, transient=True)
        self._live.start()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        for line in news(event, tally, finished):
            self.line(line)
        self._live.update(self._view(tally))

    def _view(self, tally: Tally) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        bar = Table.grid(padding=(0, 2))
        left = tally.seconds_left
        remaining = f"{duration(left)} left" if left is not None else ""
        failed = f"{len(tally.failed)} failed" if tally.failed else ""
        done = f"{len(tally.done)} of {len(tally.pending)} cells"
        bar.add_row(ProgressBar(total=1.0, completed=tally.fraction, width=30), done, remaining, failed)
        rows = Table.grid(padding=(0, 2))
        for key, step in list(tally.running.items())[-SHOWN_AT_ONCE:]:
            rows.add_row(f"  {tally.cells[key].title}", f"{step.stage} {step.step}/{step.steps}")
        return Group(bar, rows)

    def close(self) -> None:
        self._live.stop()


def show_events() -> Display:
    """A live view when a person looks at a terminal, else lines."""
    return Live() if sys.stdout.isatty() else Lines()


def news(event: Event, tally: Tally, finished: Sequence[str]) -> list[str]:
    """The lines that an event is worth."""
    lines = []
    if isinstance(event, Quantized):
        for key in event.cell_keys:
            if key in tally.cells and not tally.cells[key].method.is_baseline and key not in finished:
                bits, seconds = event.record.get("bits_per_weight", 0.0), event.record.get("seconds", 0.0)
                lines.append(f"made    {tally.cells[key].title}    {bits:.2f} bits per weight in {seconds:.1f} s")
    if isinstance(event, Failed):
        again = ("; tried again" if event.kind in ("lost", "head_lost") else "; tried again alone") if event.retry else ""
        for key in event.cell_keys:
            title = tally.cells[key].title if key in tally.cells else key[:12]
            word, look = ("again ", "") if event.retry else ("FAIL  ", f"    harness show {key[:8]}")
            lines.append(f"{word}  {title}    {event.stage}: {event.reason}{again}{look}")
    if isinstance(event, Turn):
        waits = f"waits   {event.behind} goes first; what runs here is finished" if event.behind else "turn    nobody goes first"
        lines.append(f"{waits} (priority {event.priority} here)")
    if isinstance(event, Joined):
        lines.append(f"ray     dashboard http://{event.dashboard}")
    if isinstance(event, TaskStarted) and event.device not in ("", "cpu"):
        lines.append(f"start   {event.worker} on {event.device}")
    lines += [f"  ok    {tally.cells[key].title}    {short_metrics(tally.metrics.get(key, {}))}" for key in finished]
    return lines


def short_metrics(metrics: Mapping[str, float]) -> str:
    """The first few metrics on one line."""
    shown = [f"{name} {value:.4g}" for name, value in list(metrics.items())[:SHOWN_METRICS]]
    return "  ".join(shown) + (f"  and {len(metrics) - SHOWN_METRICS} more" if len(metrics) > SHOWN_METRICS else "")


# --- a sweep's state and one record ----------------------------------------------------------------------------------------------


def status(store: Store, name: str, cells: Iterable[Cell]) -> str:
    """How far a sweep is: a count per state, the failures with their reasons, and whether a driver is at work on it."""
    state = store.sweep_state(name) or {}
    running = bool(state) and is_running(state)
    lines, counts = [], {"done": 0, "partly": 0, "waiting": 0, "failed": 0}
    for cell in cells:
        record, now = store.record(cell), state.get("cells", {}).get(cell_key(cell), {})
        if record.complete:
            counts["done"] += 1
            continue
        if record.failures:
            kind = "failed"
            lines.append(f"FAIL    {cell.title}    {record.failures[-1].get('reason', '')}    harness show {record.cell_key[:8]}")
        else:
            kind = "partly" if record.manifest is not None or record.scores else "waiting"
        if running and now.get("state") in ("quantizing", "evaluating"):
            step = f"{now['stage']} {now['step']}/{now['steps']}" if now.get("stage") else now["state"]
            lines.append(f"now     {cell.title}    {step}")
        counts[kind] += 1
    total = sum(counts.values())
    words = [f"{counts['done']} of {total} cells done"] + [f"{n} {kind}" for kind, n in counts.items() if n and kind != "done"]
    if running:
        since = time.strftime("%H:%M:%S", time.localtime(state["started"]))
        words.append(f"running since {since} (process {state['owner']['pid']})")
    for each in living(store):
        if each["sweep"] == name and (each["priority"] or each["behind"]):
            waits = f", waits for {each['behind']}" if each["behind"] else ""
            lines.append(f"order   process {each['owner']['pid']}: priority {each['priority']}{waits}")
    return "\n".join([f"status  {name}: {' · '.join(words)}", *lines])


def record_text(record: Record, store: Store, command: str) -> str:
    """Everything known of a cell: what it is, what it scored, how its layers fared, how it was made and how to make it again."""
    import yaml

    cell = record.cell
    sections = [f"{cell.title}\n  cell        {record.cell_key}\n  checkpoint  {quantize_key(cell)}"]
    config = {name: value for name, value in to_json(cell).items() if name not in ("evaluations", "variant")}
    sections.append("config\n" + _indent(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)))
    sections.append("scores\n" + _indent(_scores(with_flips(record, store)) or "none yet"))
    if record.layer_errors:
        sections.append("layer errors (largest first)\n" + _indent(_layer_errors(record)))
    unseen = _unseen_experts(record)
    if unseen:
        sections.append("experts that too few calibration tokens reached\n" + _indent(unseen))
    for failure in record.failures:
        text = f"{failure.get('stage', '')}: {failure.get('reason', '')}\n{failure.get('detail', '')}"
        sections.append(f"failure ({failure.get('kind', '')})\n" + _indent(text))
    sections.append("ancestry\n" + _indent(_ancestry(record, store)))
    if record.provenance:
        sections.append("made by\n" + _indent(yaml.safe_dump(record.provenance, sort_keys=False, allow_unicode=True)))
    sections.append(f"log     {store.where(store.log_path(record.cell_key))}\nagain   {command}")
    return "\n\n".join(sections)


def _ancestry(record: Record, store: Store) -> str:
    """All that the numbers descend from: model, texts, data, seeds, code, packages, devices, and the cells behind them."""
    cell = record.cell
    model = cell.model
    revision = f"@{model.revision}" if model.revision else ""
    lines = [("model", f"{model.name}: {model.source}{revision}, {model.dtype}, weights {model.digest or 'not known'}")]
    if cell.calibration is not None:
        text = cell.calibration
        windows = f"{text.samples} windows of {text.length} tokens by seed {text.seed}"
        place = f"{text.source}, split {text.split}, digest {text.digest or 'not known'}"
        lines.append(("calibration", f"{text.name}: {windows} from {place}"))
    random = any(part.stochastic for part in cell.method.parts)
    lines.append(("seed", f"{cell.seed}" if random else f"{cell.seed}, which the method does not draw from"))
    for evaluation in cell.evaluations:
        limit = f", the first {evaluation.limit} items" if evaluation.limit is not None else ""
        scorer = f"{evaluation.name}: {evaluation.evaluator}, version {evaluation.version}{limit}"
        lines.append(("data", f"{scorer}, data {evaluation.data_digest or 'without a digest'}"))
    made: dict[str, Mapping[str, Any]] = {name: facts for name, facts in record.provenance.items() if isinstance(facts, Mapping)}
    scored = {name: score.get("provenance") for name, score in record.scores.items()}
    made |= {name: facts for name, facts in scored.items() if isinstance(facts, Mapping) and facts not in made.values()}
    for name, facts in made.items():
        changed = _place(store, facts.get("changes", ""))
        commit = facts.get("commit") or "an installed package"
        lines.append(("code", f"{name}: {commit}" + (f", changes {changed}" if changed else "")))
        if facts.get("packages"):
            lines.append(("packages", f"{name}: {_place(store, facts['packages'])}"))
        lines.append(("device", f"{name}: {facts.get('device')} on {facts.get('host')}, {facts.get('threads')} threads"))
    if cell.method.tuning is not None:
        lines.append(("tuned from", f"checkpoint {quantize_key(untuned(cell))}"))
    if not cell.method.is_baseline:
        lines.append(("compared", f"with cell {cell_key(baseline_of(cell))}"))
    return "\n".join(f"{name:<11} {text}" for name, text in dict.fromkeys(lines))


def _place(store: Store, name: str) -> str:
    if not name:
        return ""
    return f"{store.root / name}" + ("" if store.files.exists(store.root / name) else " (not here)")


def command_for(cell: Cell) -> str:
    """The command that makes one cell and its scores by itself: names, and what differs from what their files say today.

    It is tried: what is returned leads to the same keys. Where no such command exists (a configuration was renamed, a version
    raised, a corpus changed), that is said, and what the cell was is in the record.
    """
    import shlex

    from harness.config import load_sweep

    words = _names(cell)
    for _ in range(3):                          # with names alone, with what differs, and to see that nothing is left
        try:
            made = next(c for c in load_sweep(None, [*words, "baseline=false"]).cells)
        except (HarnessError, StopIteration):
            break
        different = _differences(cell, made)
        if cell_key(made) == cell_key(cell) and not any(word.startswith("evaluations=") for word in different):
            return shlex.join(["harness", "run", *words])
        new = {word.partition("=")[0] for word in different}
        if not set(different) - set(words):
            break
        words = [word for word in words if word.partition("=")[0] not in new] + different
    return f"the configuration has changed since; nearest: {shlex.join(['harness', 'run', *words])}"


def _names(cell: Cell) -> list[str]:
    """Words for the names of a cell's parts; settings that a sweep varies stand in brackets behind a name and are no part of it."""
    words = [f"model={_plain(cell.model.name)}", f"method={_plain(cell.method.name)}"]
    words += [] if cell.method.is_baseline else [f"scheme={_plain(cell.scheme.name)}"]
    if cell.calibration is not None:
        words.append(f"calibration={_plain(cell.calibration.name)}")
    if cell.seed:
        words.append(f"seed={cell.seed}")
    latest = {evaluation.name: evaluation for evaluation in cell.evaluations}
    if latest:
        words.append(f"evaluations=[{','.join(latest)}]")
        limits = {evaluation.limit for evaluation in latest.values()}
        words += [f"evaluations.limit={limits.pop()}"] if len(limits) == 1 and limits != {None} else []
    return words


def _plain(name: str) -> str:
    return name.partition("[")[0]


def _differences(cell: Cell, made: Cell) -> list[str]:
    """Overrides that lead from one cell towards another of the same names."""
    found = []
    parts = {slot: (getattr(cell.method, slot), getattr(made.method, slot)) for slot in ("transform", "rounding", "tuning")}
    groups = {name: (getattr(cell, name), getattr(made, name)) for name in ("calibration", "scheme", "model")}
    for slot, (wanted, given) in parts.items():
        if wanted is not None and given is not None:
            found += _changed(slot, to_json(wanted)["settings"], to_json(given)["settings"])
    for group, (wanted, given) in groups.items():
        found += _changed(group, to_json(wanted) or {}, to_json(given) or {})
    if cell.calibration is not None and cell.inputs != made.inputs:
        found.append(f"inputs={cell.inputs}")
    latest = {evaluation.name: evaluation for evaluation in cell.evaluations}
    others = {evaluation.name: evaluation for evaluation in made.evaluations}
    missing = [name for name in latest if name not in others or score_key(cell, latest[name]) != score_key(cell, others[name])]
    if missing:
        entries = []
        for name, evaluation in latest.items():
            own, theirs = to_json(evaluation)["settings"], to_json(others[name])["settings"] if name in others else {}
            changed = {key: value for key, value in own.items() if value != theirs.get(key)}
            entries.append(f"{{{name}: {_literal(changed)}}}" if name in missing and changed else name)
        found.append(f"evaluations=[{','.join(entries)}]")
    return found


def _changed(prefix: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in wanted.items():
        if name in ("name", "digest", "overrides") or value == given.get(name):
            continue
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            found += _changed(f"{prefix}.{name}", value, given[name])
        else:
            found.append(f"{prefix}.{name}={_literal(value)}")
    return found


def _literal(value: Any) -> str:
    """A JSON value in the grammar of overrides."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_literal, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_][\w./-]*", value) else "'" + value.replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _scores(record: Record) -> str:
    metrics = record.metrics()
    width = max(map(len, metrics), default=0)
    lines = []
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            error = metrics.get(f"{name}_stderr")
            lines.append(f"{name:<{width}}  {value:.6g}" + (f" ± {error:.2g}" if error is not None else ""))
    lines += [f"{name}  (missing)" for name in record.missing]
    return "\n".join(lines)


def _layer_errors(record: Record) -> str:
    def relative(row: Mapping[str, Any]) -> float:
        return next((float(row[name]) for name in ("output_error", "weight_error") if isinstance(row.get(name), int | float)), 0.0)

    rows = sorted(record.layer_errors, key=relative, reverse=True)
    lines = []
    for row in rows[:10]:
        facts = "  ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, int | float) and k != "block")
        lines.append(f"block {row.get('block')}  {row.get('linear')}  {facts}")
    return "\n".join(lines + ([f"… and {len(rows) - 10} more"] if len(rows) > 10 else []))


def _unseen_experts(record: Record) -> str:
    """Which matrices were rounded to nearest, and where scales were not searched, for want of calibration tokens."""
    notes = (record.manifest or {}).get("notes", {})
    rounded = {block: found for block, each in notes.items() if (found := each.get("rounded_to_nearest"))}
    unscaled = sum(len(each.get("pairs_without_calibration", ())) for each in notes.values())
    lines = []
    if rounded:
        lines.append(f"{sum(map(len, rounded.values()))} matrices were rounded to nearest instead")
        for block, found in rounded.items():
            none = sum(tokens == 0 for tokens in found.values())
            first = ", ".join(f"{name} ({tokens} tokens)" for name, tokens in list(found.items())[:3])
            more = f" … and {len(found) - 3} more" if len(found) > 3 else ""
            lines.append(f"block {block}  {len(found)}, of them {none} without any token: {first}{more}")
    if unscaled:
        lines.append(f"{unscaled} scales inside experts were left at 1")
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.rstrip().splitlines())
