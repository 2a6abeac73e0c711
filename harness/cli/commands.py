"""The commands of `harness`, each a short function: it loads a sweep, calls the part that does the work, and prints the result."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.arguments import RunsCommand, load, place_alone, with_runs
from harness.cli.completion import (
    GROUPS,
    complete_group,
    complete_key,
    complete_layout,
    complete_override,
    complete_sweep,
)
from harness.cli.json_output import json_text, print_json
from harness.core.errors import ConfigError, PlanError, unknown_name

HELP = """Distributed sweeps of model × method × bit width for quantized language models.

A sweep is a file in sweeps/ or a path. Overrides change it; without a name they define the grid.

\b
Examples:
  harness list sweeps
  harness plan demo
  harness run demo
  harness run llama3_8b_ptq cluster=ray rounding=gptq,rtn
  harness run model=demo method=rtn,gptq scheme=w4,w3 calibration=demo
  harness table demo --format latex

\b
Exit codes:
  0    success; for a run: all cells are done
  1    a cell failed, or another error
  2    a config or an option is wrong
  3    the plan refuses cells
  130  interrupted (Ctrl-C); the same command continues
"""

app = typer.Typer(
    name="harness",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import harness

        print(f"harness {harness.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options that stand before a command."""


SweepArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[SWEEP]",
        help="A name in sweeps/, a path, or the first override.",
        autocompletion=complete_sweep,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the sweep; an axis takes a list (scheme=w4,w3).",
        autocompletion=complete_override,
    ),
]
Runs = Annotated[str, typer.Option("--runs", help="The folder or URL of the results (or runs=).")]
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON, for programs.")]


@app.command()
def plan(
    sweep: SweepArgument = None, overrides: Overrides = None, runs: Runs = "", as_json: Json = False
) -> None:
    """Show what a sweep would do: cells that are done, missing or refused (with all reasons), passes, time, memory, disk.

    \b
    Examples:
      harness plan demo
      harness plan llama3_8b_ptq method=gptq scheme=w4g128
    """
    from harness.planning.planner import make
    from harness.planning.render import render, require

    loaded, store = load(sweep, overrides, runs)
    made = make(loaded, store)
    if as_json:
        print_json(made.facts())
        raise typer.Exit(PlanError.exit_code if made.refused or made.problems else 0)
    print(render(made))
    if not made.refused and not made.problems:
        print(
            f"next    {_again('run' if made.missing else 'table', sweep, with_runs(overrides, runs))}"
        )
    require(made)


@app.command()
def run(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Wall time, e.g. 90min or 8h: runs the cheapest cells first and starts nothing afterwards."
        ),
    ] = "",
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Start a large sweep without a question.")
    ] = False,
    runs: Runs = "",
) -> None:
    """Run a sweep, or finish it; completed work is not repeated.

    A sweep ends with its terminal. Over ssh start it inside tmux or screen, or with nohup; `harness status` shows it from anywhere.

    \b
    Examples:
      harness run demo
      harness run demo cluster=local cluster.workers=2 tracking=none
      harness run demo evaluations.limit=20
      harness run llama3_8b_ptq cluster=ray --budget 8h
    """
    from harness.cli.progress import asks_for_large, asks_nothing, show_events, ssh_advice
    from harness.core.units import seconds_of
    from harness.execution.driver import run as run_sweep

    limit = seconds_of(budget) if budget else None
    loaded, _ = load(sweep, overrides, runs)
    confirm = asks_nothing if yes else asks_for_large
    if advice := ssh_advice(os.environ):
        print(advice)
    summary = run_sweep(loaded, show_events(), budget_seconds=limit, confirm=confirm)
    print(summary.text)
    raise typer.Exit(summary.exit_code)


@app.command()
def allocate(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    bits: Annotated[
        str, typer.Option(help="Stored bits per weight, one or several: 3.2 or 2.8,3.2.")
    ] = "",
    size: Annotated[
        str, typer.Option("--bytes", help="Bytes of the quantized matrices instead: 1.2GB.")
    ] = "",
    budget: Annotated[str, typer.Option(help="Only the budget of this name.")] = "",
    together: Annotated[
        str, typer.Option(help="Matrices that get one candidate: none, serving or block.")
    ] = "",
    trials: Annotated[int | None, typer.Option(help="Measured swaps; 0: none, unverified.")] = None,
    runs: Runs = "",
) -> None:
    """Choose a width (and method) for every matrix within a size, measure it, and compare it with the uniform cell of that size.

    Candidates are those of the sweep's `budgets:`, or else its cells that differ in their weight scheme alone. Missing ones are
    made first.

    \b
    Examples:
      harness allocate budget_demo --bits 3.2
      harness allocate demo method=gptq scheme=w4g32,w3g32,w2g32 inputs=full_precision --bits 2.8,3.1
    """
    from harness.cli.allocate import run_allocation

    loaded, store = load(sweep, overrides, runs)
    raise typer.Exit(run_allocation(loaded, store, bits, size, budget, together, trials))


@app.command()
def status(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again every two seconds while it runs.")
    ] = False,
    runs: Runs = "",
    as_json: Json = False,
) -> None:
    """Show the progress of a sweep, or without a name of every sweep of --runs, whichever process runs it.

    \b
    Examples:
      harness status
      harness status demo --watch
    """
    from harness.cli import status as progress
    from harness.config.locations import config_files
    from harness.storage.store import Store

    sweep, runs = place_alone(sweep, overrides, runs)
    # a grid without a file is known to its store alone
    store = Store(runs or "runs")
    if sweep is None or (sweep not in config_files("sweeps") and sweep in store.sweep_names()):
        place = str(store.place)

        def look() -> tuple[str, bool]:
            found = [e for e in progress.store_facts(store) if sweep in (None, e["sweep"])]
            shown = json_text(found) if as_json else progress.store_text(place, found)
            return shown, any(each["state"] == "running" for each in found)

    else:
        loaded, store = load(sweep, overrides, runs)

        def look() -> tuple[str, bool]:
            facts = progress.sweep_facts(store.snapshot(loaded.cells), loaded.name, loaded.cells)
            return json_text(facts) if as_json else progress.status_text(facts), bool(
                facts["running"]
            )

    if watch:
        progress.watch(look, clear=sys.stdout.isatty() and not as_json)
    else:
        print(look()[0])


@app.command()
def table(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--format", "-f", help="md, latex, csv or html.")] = "md",
    name: Annotated[
        str,
        typer.Option(
            "--table", "-t", help="The name of one table; without it all tables are printed."
        ),
    ] = "",
    runs: Runs = "",
    as_json: Json = False,
) -> None:
    """Print the tables of a sweep, with published numbers beside ours; for each gap, the command that fills it.

    \b
    Examples:
      harness table demo
      harness table llama3_8b_ptq --table table1 --format latex
    """
    from harness.cli.tables import table_text
    from harness.reporting.render import FORMATS

    if form not in FORMATS:
        raise ConfigError(unknown_name("table format", form, FORMATS))
    loaded, store = load(sweep, overrides, runs)
    names = [each.name for each in loaded.shown_tables]
    if name and name not in names:
        raise ConfigError(unknown_name("table", name, names, f"sweep {loaded.name}"))
    form = "json" if as_json else form
    print(table_text(loaded, store, [name] if name else names, form), end="")


@app.command()
def report(sweep: SweepArgument = None, overrides: Overrides = None, runs: Runs = "") -> None:
    """Write a sweep's report: one page with its tables, figures, findings, and how each number was made.

    \b
    Examples:
      harness report demo
    """
    from harness.reporting.files import refresh

    loaded, store = load(sweep, overrides, runs)
    store.check_exists()
    print(f"report  {store.where(refresh(loaded, store))}")


@app.command()
def findings(
    sweep: SweepArgument = None, overrides: Overrides = None, runs: Runs = "", as_json: Json = False
) -> None:
    """Check each finding of the study against our results and against its own published numbers.

    \b
    Examples:
      harness findings demo_methods
    """
    from harness.reporting.findings import check, render

    loaded, store = load(sweep, overrides, runs)
    if not loaded.findings:
        raise ConfigError(f"sweep {loaded.name} states no findings; docs/tables.md says how")
    store = store.snapshot(loaded.cells)
    checked = check(loaded, [store.record(cell) for cell in loaded.cells], store)
    if as_json:
        print_json([dataclasses.asdict(each) for each in checked])
    else:
        print(render(checked), end="")


@app.command(cls=RunsCommand)
def show(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY | SWEEP [PART]...]",
            help="The first digits of a cell's key; or a sweep and names of the cell's parts.",
            autocompletion=complete_key,
        ),
    ] = None,
    runs: Runs = "",
    as_json: Json = False,
) -> None:
    """Show one cell: configuration, scores, layer errors, failures, provenance, and the command that reproduces it.

    Without a word, or where several cells fit, it lists the cells.

    \b
    Examples:
      harness show
      harness show 2ddd94ff
      harness show demo gptq w4
    """
    from harness.cli.cells import find_cells, list_facts, list_text
    from harness.cli.show import cell_facts, cell_text

    store, found = find_cells(words or [], runs)
    if not found:
        print("[]" if as_json else f"no cells in {store.place} yet; start with: harness run demo")
        return
    if not words or len(found) > 1:
        if as_json:
            print_json(list_facts(found, store))
        else:
            print(list_text(found, store))
        return
    key, _, cell = found[0]
    if cell is None:
        raise ConfigError(
            f"cell {key[:12]} in {store.place} has no readable cell.json; run its sweep"
        )
    if as_json:
        print_json(cell_facts(cell, store))
    else:
        print(cell_text(cell, store))


@app.command(cls=RunsCommand)
def diff(
    first: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A sweep, or the folder or URL of results.",
            autocompletion=complete_sweep,
        ),
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="Another one.", autocompletion=complete_sweep)
    ],
    runs: Runs = "",
    as_json: Json = False,
) -> None:
    """Compare two sweeps or two stores: cells that only one has, and differences in configuration and scores.

    \b
    Examples:
      harness diff demo demo_methods
      harness diff runs /mnt/other/runs
    """
    from harness.cli.diff import compare, diff_text, records_of

    found = compare(records_of(first, runs), records_of(second, runs))
    if as_json:
        print_json(found)
    else:
        print(diff_text(first, second, found))


@app.command(cls=RunsCommand)
def cancel(
    target: Annotated[
        str,
        typer.Argument(metavar="SWEEP|KEY", help="A sweep, or the first digits of a cell's key."),
    ],
    runs: Runs = "runs",
) -> None:
    """Stop a running sweep, or remove one cell from it, from any shell that sees --runs; finished work stays.

    \b
    Examples:
      harness cancel demo
      harness cancel 2ddd94ff
    """
    from harness.storage.store import Store

    store = Store(runs)
    if target in store.sweep_names():
        from harness.cli.status import resume_command

        store.cancel(target)
        command = resume_command(target, store.sweep_state(target) or {})
        goes_on = f"; {command} goes on with it" if command else ""
        print(f"sweep {target} ends within seconds{goes_on}")
        return
    key = store.find(target)
    store.cancel(key)
    print(
        f"cell {key[:12]} is left out within seconds where it runs; the next harness run of its sweep tries it again"
    )


@app.command(cls=RunsCommand)
def prioritize(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A running sweep.")],
    priority: Annotated[
        int,
        typer.Argument(
            metavar="N", help="A sweep with a higher priority runs first; the default is 0."
        ),
    ],
    runs: Runs = "runs",
) -> None:
    """Change the priority of a running sweep among the sweeps that share --runs; running tasks of the others finish first.

    \b
    Examples:
      harness prioritize demo 5
    """
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


@app.command(cls=RunsCommand)
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be deleted.")
    ] = False,
    runs: Runs = "runs",
) -> None:
    """Delete checkpoints that no cell uses and leftovers of killed processes; results are never deleted.

    \b
    Examples:
      harness gc --dry-run
      harness gc
    """
    from harness.core.units import size
    from harness.storage.gc import find, remove
    from harness.storage.store import Store

    store = Store(runs)
    found = find(store)
    for each in found:
        print(f"{size(each.bytes):>9}  {store.where(each.path)}  {each.reason}")
    freed = sum(each.bytes for each in found) if dry_run else remove(store, found)
    print(
        f"{len(found)} leftovers, {size(freed)} {'would be free; nothing was deleted' if dry_run else 'freed'}"
    )


@app.command(cls=RunsCommand)
def export(
    key: Annotated[
        str, typer.Argument(help="The first digits of a cell's key.", autocompletion=complete_key)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="compressed_tensors, gptq, peft or transformers.",
            autocompletion=complete_layout,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")],
    runs: Runs = "runs",
) -> None:
    """Export a quantized cell as a folder that other libraries load; refused, with all reasons, if the format cannot hold it.

    \b
    Examples:
      harness export 2ddd94ff --format compressed_tensors --output folder
    """
    from harness.quantization.export import export as export_cell
    from harness.storage.store import Store

    print(export_cell(Store(runs), key, form, output).text)


@app.command()
def publish(sweep: SweepArgument = None, overrides: Overrides = None, runs: Runs = "") -> None:
    """Send the results of a sweep, or without a name everything in --runs, to MLflow; updates existing runs, no duplicates.

    \b
    Examples:
      harness publish demo
      harness publish --runs s3://bucket/prefix
    """
    from harness.storage.store import Store
    from harness.tracking.mlflow_runs import publish as publish_results

    sweep, runs = place_alone(sweep, overrides, runs)
    loaded, store = load(sweep, overrides, runs) if sweep else (None, Store(runs or "runs"))
    store.check_exists()
    print(publish_results(store, loaded))


@app.command()
def diagnose(
    model: Annotated[
        str,
        typer.Argument(help="A name in conf/model/, a folder, a hub id, or demo:weight_outliers."),
    ],
    overrides: Overrides = None,
    bits: Annotated[int, typer.Option(help="Bits of weights and activations.")] = 8,
    group_size: Annotated[
        int, typer.Option(help="Group size of the proposed repair; 0: the largest that is enough.")
    ] = 0,
) -> None:
    """Find the linear layers that 8-bit weights and activations damage most, the cause, and the smallest set to treat separately.

    \b
    Examples:
      harness diagnose demo:weight_outliers
      harness diagnose llama3_8b calibration=c4 calibration.samples=16
    """
    from harness.cli.diagnose import run as diagnose_model

    print(diagnose_model(model, overrides or [], bits, group_size))


@app.command(cls=RunsCommand)
def ui(
    runs: Runs = "runs",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The port on the loopback interface.")
    ] = 5000,
) -> None:
    """Show the results beside a runs folder in MLflow's web pages, until Ctrl-C.

    \b
    Examples:
      harness ui
      harness ui --port 5001
    """
    from harness.core.sweep import Runtime
    from harness.storage.places import place_of
    from harness.tracking.serving import serve

    raise typer.Exit(serve(Runtime(place_of(runs)), port))


data_app = typer.Typer(
    help="Data for machines without network access: create a bundle, check it.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")


@data_app.command("pull")
def data_pull(
    sweep: SweepArgument = None,
    overrides: Overrides = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The folder of the bundle; data.root=FOLDER reads it."),
    ] = Path("bundle"),
) -> None:
    """Download the models, texts and benchmarks of a sweep into one folder, at pinned revisions and with a hash of every row.

    \b
    Examples:
      harness data pull llama3_8b_ptq --output bundle
    """
    from harness.data.bundle import pull

    loaded, _ = load(sweep, overrides)
    for line in pull(loaded, output):
        print(line)
    print(f"next    {_again('run', sweep, overrides)} data.root={output}")


@data_app.command("check")
def data_check(folder: Annotated[Path, typer.Argument(help="The folder of a bundle.")]) -> None:
    """Compare a bundle with its index; exit code 1 if a file is missing or changed.

    \b
    Examples:
      harness data check bundle
    """
    from harness.data.bundle import verify

    problems = verify(folder)
    print("\n".join(problems) or f"{folder}: complete and unchanged")
    raise typer.Exit(int(bool(problems)))


@app.command("list")
def list_command(
    group: Annotated[
        str, typer.Argument(help=", ".join(GROUPS), autocompletion=complete_group)
    ] = "sweeps",
    as_json: Json = False,
) -> None:
    """List the available sweeps, models, methods, schemes, evaluations, …

    \b
    Examples:
      harness list sweeps
      harness list methods
    """
    from harness.config.locations import list_names

    entries = list_names(group)
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.title}".rstrip())


@app.command(cls=RunsCommand)
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="check only this model: a name, a folder or a hub id", metavar="MODEL"),
    ] = None,
    runs: Runs = "runs",
    as_json: Json = False,
) -> None:
    """Check this machine (packages, cores, memory, disk, GPUs, Ray, permissions) or a model; exit code 1 if anything is wrong.

    \b
    Examples:
      harness doctor
      harness doctor path/to/model
    """
    from harness.cli.doctor import examine, examine_model, render

    found = examine(runs) if model is None else examine_model(model)
    next_command = "run demo" if model is None else f"plan model={model} method=rtn scheme=w4"
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
    else:
        print(render(found, f"ready   harness {next_command}"))
    raise typer.Exit(int(any(each.level == "wrong" for each in found)))


def _again(command: str, sweep: str | None, overrides: list[str] | None) -> str:
    return f"harness {command} {shlex.join(word for word in (sweep, *(overrides or [])) if word)}"
