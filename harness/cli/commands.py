"""The commands of `harness`: plan, run, status, table, report, findings, show, export, diagnose, cancel, gc, publish,
ui, list, doctor.

A sweep is named by a file in sweeps/ (or a path), and changed by overrides; without a name the overrides state the grid:

    harness run demo
    harness run llama3_8b_ptq cluster=ray rounding=gptq,rtn
    harness run model=demo method=rtn,gptq scheme=w4,w3

Exit codes: 0 all cells done, 1 a cell failed or another error, 2 a config is wrong, 3 the plan refuses, 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.completion import (
    GROUPS,
    complete_group,
    complete_key,
    complete_layout,
    complete_override,
    complete_sweep,
)
from harness.config.overrides import split_arguments
from harness.core.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from harness.core.sweep import Sweep
    from harness.storage.store import Store


app = typer.Typer(
    name="harness",
    help="Distributed sweeps of model × method × bit width for quantized language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


SweepArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[SWEEP]",
        help="A file of sweeps/, a path, or the first override.",
        autocompletion=complete_sweep,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the sweep: axes take lists (scheme=w4,w3).",
        autocompletion=complete_override,
    ),
]
Runs = Annotated[str, typer.Option("--runs", help="The folder, or the URL, that holds results.")]


@app.command()
def plan(sweep: SweepArgument = None, overrides: Overrides = None) -> None:
    """Say what a sweep would do: done, missing, refused with all reasons, passes, time, memory, disk. Starts nothing."""
    from harness.planning.planner import make
    from harness.planning.render import render, require

    loaded, store = _load(sweep, overrides)
    made = make(loaded, store)
    print(render(made))
    if not made.refused and not made.problems:
        print(f"next    {_again('run' if made.missing else 'table', sweep, overrides)}")
    require(made)


@app.command()
def run(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Wall time, e.g. 90min or 8h: the cheapest cells first, and nothing after it."
        ),
    ] = "",
) -> None:
    """Carry a sweep out, or finish it: what is done is not done again."""
    from harness.cli import progress
    from harness.core.units import seconds_of
    from harness.execution import driver

    limit = seconds_of(budget) if budget else None
    loaded, _ = _load(sweep, overrides)
    summary = driver.run(loaded, progress.show_events(), budget_seconds=limit)
    print(summary.text)
    raise typer.Exit(summary.exit_code)


@app.command()
def status(sweep: SweepArgument = None, overrides: Overrides = None) -> None:
    """How far a sweep is, here or in another process."""
    from harness.cli import status as display

    loaded, store = _load(sweep, overrides)
    print(display.status(store.snapshot(loaded.cells), loaded.name, loaded.cells))


@app.command()
def table(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--format", "-f", help="md, latex, csv or html.")] = "md",
    name: Annotated[
        str,
        typer.Option("--table", "-t", help="One table of the sweep by name; all when not given."),
    ] = "",
) -> None:
    """Print a sweep's tables, published numbers beside ours; gaps name the command that fills them."""
    from harness.reporting import render as tables
    from harness.reporting import tables as tables_module

    if form not in tables.FORMATS:
        raise ConfigError(unknown_name("table format", form, tables.FORMATS))
    loaded, store = _load(sweep, overrides)
    names = [each.name for each in loaded.shown_tables]
    if name and name not in names:
        raise ConfigError(unknown_name("table", name, names, f"sweep {loaded.name}"))
    store = store.snapshot(loaded.cells)
    records = [store.record(cell) for cell in loaded.cells]
    chosen = [each for each in loaded.shown_tables if not name or each.name == name]
    print(
        "\n".join(
            tables.render(tables_module.build(loaded, each, records, store), form)
            for each in chosen
        ),
        end="",
    )


@app.command()
def report(sweep: SweepArgument = None, overrides: Overrides = None) -> None:
    """Write a sweep's report: one page with its tables, figures, findings, and how each number was made."""
    from harness.reporting import files

    loaded, store = _load(sweep, overrides)
    print(f"report  {store.where(files.refresh(loaded, store))}")


@app.command()
def findings(sweep: SweepArgument = None, overrides: Overrides = None) -> None:
    """Say of each finding of the study whether our results hold it, and whether its own published numbers do."""
    from harness.reporting import findings as checks

    loaded, store = _load(sweep, overrides)
    if not loaded.findings:
        raise ConfigError(f"sweep {loaded.name} states no findings; docs/tables.md says how")
    store = store.snapshot(loaded.cells)
    print(
        checks.render(checks.check(loaded, [store.record(cell) for cell in loaded.cells], store)),
        end="",
    )


@app.command()
def show(
    key: Annotated[
        str, typer.Argument(help="The first digits of a cell's key.", autocompletion=complete_key)
    ],
    runs: Runs = "runs",
) -> None:
    """Everything known of one cell: config, scores, layer errors, failures, how it was made and how to make it again."""
    from harness.cli import show as show_module
    from harness.config import reproduce
    from harness.storage.store import Store

    store = Store(runs)
    cell = store.cell(store.find(key))
    if cell is None:
        raise ConfigError(f"cell {key} in {runs} has no readable cell.json; run its sweep again")
    print(show_module.record_text(store.record(cell), store, reproduce.command_for(cell)))


@app.command()
def cancel(
    target: Annotated[
        str,
        typer.Argument(metavar="SWEEP|KEY", help="A sweep, or the first digits of a cell's key."),
    ],
    runs: Runs = "runs",
) -> None:
    """Stop a running sweep, or take one cell out of it, from any shell that sees --runs; what is finished stays."""
    from harness.storage.store import Store

    store = Store(runs)
    if target in store.sweep_names():
        store.cancel(target)
        print(f"sweep {target} ends within seconds; harness run {target} goes on with it")
        return
    key = store.find(target)
    store.cancel(key)
    print(
        f"cell {key[:12]} is left out within seconds where it runs; the next harness run of its sweep tries it again"
    )


@app.command()
def prioritize(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep that runs.")],
    priority: Annotated[int, typer.Argument(metavar="N", help="Higher goes first; 0 is usual.")],
    runs: Runs = "runs",
) -> None:
    """Change the priority of a running sweep among those that share --runs; what runs of the others is finished first."""
    from harness.execution.coordination import active_drivers
    from harness.storage.store import Store

    store = Store(runs)
    names = {str(each["sweep"]) for each in active_drivers(store)}
    if sweep not in names:
        raise ConfigError(
            f"{unknown_name('running sweep', sweep, names, runs)}\nStart it with priority={priority}."
        )
    store.ask_priority(sweep, priority)
    print(
        f"sweep {sweep} has priority {priority} within seconds, until it ends; priority={priority} in its file or command stays"
    )


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    runs: Runs = "runs",
) -> None:
    """Delete checkpoints that no cell uses and what killed processes left; never a result."""
    from harness.core.units import size
    from harness.storage import gc as clean
    from harness.storage.store import Store

    store = Store(runs)
    found = clean.find(store)
    for each in found:
        print(f"{size(each.bytes):>9}  {store.where(each.path)}  {each.reason}")
    freed = sum(each.bytes for each in found) if dry_run else clean.remove(store, found)
    print(
        f"{len(found)} leftovers, {size(freed)} {'would be free; nothing was deleted' if dry_run else 'freed'}"
    )


@app.command()
def export(
    key: Annotated[
        str, typer.Argument(help="The first digits of a cell's key.", autocompletion=complete_key)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="compressed_tensors, gptq or peft.",
            autocompletion=complete_layout,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")],
    runs: Runs = "runs",
) -> None:
    """Write a quantized cell as a folder that other libraries load; refused, with all reasons, where the format cannot hold it."""
    from harness.quantization import export as exporting
    from harness.storage.store import Store

    print(exporting.export(Store(runs), key, form, output).text)


@app.command()
def publish(sweep: SweepArgument = None, overrides: Overrides = None, runs: Runs = "runs") -> None:
    """Send a sweep's results, or without a name everything in --runs, to tracking again; completes runs, never doubles them."""
    from harness.storage.store import Store
    from harness.tracking import mlflow_runs

    loaded, store = _load(sweep, overrides) if sweep else (None, Store(runs))
    print(mlflow_runs.publish(store, loaded))


@app.command()
def diagnose(
    model: Annotated[
        str,
        typer.Argument(help="A model of conf/model/, a folder, a hub id, or demo:weight_outliers."),
    ],
    overrides: Overrides = None,
    bits: Annotated[int, typer.Option(help="Of weights and activations.")] = 8,
    group_size: Annotated[int, typer.Option(help="To propose; 0: the largest that repairs.")] = 0,
) -> None:
    """Say which linears of a model 8-bit weights and activations ruin, through which side, and the fewest to treat apart."""
    from harness.cli import diagnose as diagnose_module

    print(diagnose_module.run(model, overrides or [], bits, group_size))


@app.command()
def ui(
    runs: Runs = "runs",
    port: Annotated[int, typer.Option(help="On the loopback interface.")] = 5000,
) -> None:
    """Serve MLflow's pages on the results beside a runs folder; ends with Ctrl-C."""
    from harness.core.sweep import Runtime
    from harness.storage.places import place_of
    from harness.tracking.serving import serve

    raise typer.Exit(serve(Runtime(place_of(runs)), port))


data_app = typer.Typer(
    help="Data for machines without network: pull a bundle, check one.", no_args_is_help=True
)
app.add_typer(data_app, name="data")


@data_app.command("pull")
def data_pull(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The bundle; data.root=<it> runs from it.")
    ] = Path("bundle"),
) -> None:
    """Fetch the models, texts and benchmarks of a sweep into one folder, at pinned revisions and with row hashes."""
    from harness.data import bundle

    loaded, _ = _load(sweep, overrides)
    for line in bundle.pull(loaded, output):
        print(line)
    print(f"next    {_again('run', sweep, overrides)} data.root={output}")


@data_app.command("check")
def data_check(folder: Annotated[Path, typer.Argument(help="A bundle.")]) -> None:
    """Compare a bundle with its own index; exit 1 where something is missing or changed."""
    from harness.data import bundle

    problems = bundle.verify(folder)
    print("\n".join(problems) or f"{folder}: complete and unchanged")
    raise typer.Exit(int(bool(problems)))


@app.command("list")
def list_command(
    group: Annotated[
        str, typer.Argument(help=", ".join(GROUPS), autocompletion=complete_group)
    ] = "sweeps",
) -> None:
    """What there is to choose from: sweeps, models, methods, schemes, …"""
    from harness.config.locations import list_names

    entries = list_names(group)
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.title}".rstrip())


@app.command()
def doctor(runs: Runs = "runs") -> None:
    """Check this machine: versions, cores, memory, disk, GPUs, Ray, MLflow, permissions; what is wrong and what to do."""
    from harness.cli import doctor as doctor_module

    found = doctor_module.examine(runs)
    print(doctor_module.render(found))
    raise typer.Exit(int(any(each.level == "wrong" for each in found)))


def _load(sweep: str | None, overrides: list[str] | None) -> tuple[Sweep, Store]:
    from harness.config.grid import load_sweep
    from harness.storage.store import Store

    name, changes = split_arguments(sweep, overrides)
    if name is None and not changes:
        raise ConfigError(
            "name a sweep (`harness list sweeps`) or state a grid, e.g. model=demo method=rtn scheme=w4"
        )
    loaded = load_sweep(name, changes)
    return loaded, Store(loaded.runtime.runs)


def _again(command: str, sweep: str | None, overrides: list[str] | None) -> str:
    import shlex

    words = [word for word in (sweep, *(overrides or [])) if word]
    return f"harness {command} {shlex.join(words)}"
