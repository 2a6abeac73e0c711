"""The commands as a person meets them: output, exit codes, messages without traceback, completion, start-up without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import harness
from harness.cli import commands, completion, doctor
from harness.config import overrides
from harness.core.cell import cell_key
from harness.core.errors import HarnessError
from harness.core.sweep import Sweep
from harness.execution.coordination import Coordination
from harness.execution.driver import run as run_sweep
from harness.storage.store import Store
from harness.storage.sweep_state import SweepState

RUNNER = CliRunner()
GRID = (
    "model=demo",
    "method=rtn",
    "scheme=w4",
    "evaluations=demo_perplexity",
    "evaluations.limit=2",
)


def invoke(*words: str) -> tuple[int, str]:
    """Exit code and output of a command, errors as `main` prints them."""
    result = RUNNER.invoke(commands.app, list(words))
    if isinstance(result.exception, HarnessError):
        return result.exception.exit_code, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def local(tmp_path: Path) -> list[str]:
    return [
        f"runs={tmp_path / 'runs'}",
        "tracking=none",
        "device=cpu",
        "cluster=local",
        "cluster.workers=1",
    ]


def test_help_names_every_command() -> None:
    code, out = invoke("--help")
    assert code == 0
    for name in ("plan", "run", "status", "table", "show", "publish", "ui", "list", "doctor"):
        assert name in out


def test_help_has_exit_codes_and_every_command_an_example() -> None:
    _, out = invoke("--help")
    assert all(f"\n   {number}" in out for number in (0, 1, 2, 3, 130)), out
    names = [
        command.name or command.callback.__name__ for command in commands.app.registered_commands
    ]
    assert len(names) >= 14
    for name in names:
        code, out = invoke(name, "--help")
        assert code == 0 and f"  harness {name}" in out.partition("Examples:")[2], name


def test_the_version() -> None:
    code, out = invoke("--version")
    assert code == 0 and out == f"harness {harness.__version__}\n"


def test_plan_run_status_show(tmp_path: Path) -> None:
    code, out = invoke("plan", *GRID, *local(tmp_path))
    assert code == 0 and "2 cells · 0 done · 2 to do" in out
    assert out.splitlines()[-1].startswith("next    harness run model=demo")
    code, out = invoke("run", *GRID, *local(tmp_path))
    assert code == 0 and "done    2 of 2 cells" in out
    code, out = invoke("status", *GRID, *local(tmp_path))
    assert code == 0 and "2 of 2 cells done" in out
    key = Store(tmp_path / "runs").cell_keys()[0]
    code, out = invoke("show", key[:10], "--runs", str(tmp_path / "runs"))
    assert code == 0 and key in out and "harness run model=demo" in out
    ancestry = out.partition("\nancestry\n")[2].partition("\n\n")[0]
    for part in (
        "weights 5fad06c6",
        "demo_perplexity: perplexity, version",
        "provenance/",
        "cpu on ",
        "code  ",
        "seed  ",
    ):
        assert part in ancestry, part
    code, out = invoke("plan", *GRID, *local(tmp_path))
    # all is done
    assert code == 0 and out.splitlines()[-1].startswith("next    harness table model=demo")


@pytest.mark.parametrize(
    "form,sign", [("md", "| "), ("latex", "\\begin{tabular}"), ("csv", ","), ("html", "<table>")]
)
def test_table_in_every_format(tmp_path: Path, form: str, sign: str) -> None:
    code, out = invoke("table", "demo", "--format", form, *local(tmp_path))
    assert code == 0 and sign in out


def test_tables_are_chosen_by_name(tmp_path: Path) -> None:
    assert invoke("table", "demo", "--table", "demo", *local(tmp_path))[0] == 0
    code, out = invoke("table", "demo", "--table", "dmeo", *local(tmp_path))
    assert code == 2 and 'did you mean "demo"' in out
    code, out = invoke("table", "demo", "--format", "markdow", *local(tmp_path))
    assert code == 2 and "latex" in out


@pytest.mark.parametrize(
    "words,code,named",
    [
        (("plan",), 2, "harness list sweeps"),
        (("plan", "dmeo"), 2, "demo"),
        (("run", "model=demo", "method=gtpq", "scheme=w4"), 2, 'did you mean "gptq"'),
        (("run", "model=demo", "method=rtn", "scheme=w4g96"), 3, "group size 96"),
        (("show", "ffff"), 1, "holds no cells"),
        (("list", "methds"), 2, "methods"),
    ],
)
def test_what_is_wrong_has_its_exit_code(
    tmp_path: Path, words: tuple[str, ...], code: int, named: str
) -> None:
    extra = (
        local(tmp_path)
        if words[0] == "run"
        else ["--runs", str(tmp_path / "runs")]
        if words[0] == "show"
        else []
    )
    found, out = invoke(*words, *extra)
    assert found == code and named in out


def test_errors_come_without_a_traceback_unless_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "plan", "no_such_sweep"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("ConfigError: ")
        and "Traceback" not in done.stderr
    )
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HARNESS_DEBUG": "1"}
    )
    assert done.returncode != 0 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("list",),
        ("list", "methods"),
        ("status", "demo"),
        ("table", "demo"),
        ("doctor", "--help"),
    ],
)
def test_commands_that_look_need_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom harness.__main__ import app\n"
        "try:\n    app(sys.argv[1:], standalone_mode=False)\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules or 'mlflow' in sys.modules)"
    )
    extra = [f"runs={tmp_path}"] if words[0] in ("status", "table") else []
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *extra], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_plan_made_before_and_a_finished_run_import_neither_torch_nor_mlflow(
    tmp_path: Path,
) -> None:
    """What was answered before is kept; a finished sweep whose outputs are current is not written again."""
    words = [*GRID, *local(tmp_path)]
    words[words.index("tracking=none")] = "tracking=sqlite"
    assert invoke("run", *words)[0] == 0
    invoke("plan", *words)
    code = (
        "import sys\nfrom harness.data import kept\nkept.SETTLED_SECONDS = -1\n"
        "from harness.__main__ import app\n"
        "try:\n    app(sys.argv[1:], standalone_mode=False)\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'mlflow', 'hydra', 'pandas'} & sys.modules.keys() or 'light')"
    )
    written = (tmp_path / "runs" / "reports").iterdir().__next__().stat().st_mtime_ns
    for command in ("plan", "run", "run"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, *words], capture_output=True, text=True
        )
        assert "2 of 2 cells" in done.stdout or "2 done" in done.stdout, done
    assert done.stdout.splitlines()[-1] == "light", done
    assert (tmp_path / "runs" / "reports").iterdir().__next__().stat().st_mtime_ns == written


def test_a_wrong_place_exits_with_1_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words in (
        ("plan", *GRID, f"runs={tmp_path / 'file'}"),
        ("plan", *GRID, "--runs", str(tmp_path / "file" / "below")),
        ("report", "demo", f"runs={tmp_path / 'typo'}"),
        ("publish", "--runs", str(tmp_path / "typo")),
        ("publish", f"runs={tmp_path / 'typo'}"),
    ):
        code, out = invoke(*words)
        assert code == 1 and "runs=" in out, (words, out)
    assert invoke("ui", "--port", "80000")[0] == 2
    assert invoke("plan", *GRID, f"runs={tmp_path / 'new'}")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cancelled_grid_goes_on_with_the_command_that_began_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    command = "harness run model=demo method=rtn scheme=w4"
    SweepState(store, "grid-1", {"0" * 64: "demo · rtn · w4"}, command=command).end()
    code, out = invoke("cancel", "grid-1", f"runs={tmp_path / 'runs'}")
    assert code == 0 and f"{command} goes on with it" in out and "run grid-1" not in out
    code, out = invoke("status", "grid-1", "--runs", str(tmp_path / "runs"))
    assert code == 0 and command in out and out.startswith("stopped grid-1")


def test_completion_knows_sweeps_keys_and_values() -> None:
    assert "demo" in dict(completion.complete_sweep("de"))
    assert "method=" in dict(completion.complete_sweep("met"))
    assert "scheme=w4g32" in dict(completion.complete_override("scheme=w4g"))
    assert "method=rtn,gptq" in dict(completion.complete_override("method=rtn,g"))
    assert "method=rtn,rtn" not in dict(completion.complete_override("method=rtn,"))
    assert dict(completion.complete_override("inputs=f")) == {"inputs=full_precision": ""}
    assert list(completion.complete_override("runs=")) == []
    assert completion.complete_group("me") == ["methods"]
    assert completion.complete_group("tu") == ["tunings"]
    assert dict(completion.complete_override("tuning=qlo")).keys() == {"tuning=qlora"}
    assert "tuning=" in dict(completion.complete_override("tun"))
    assert "evaluations=[demo,demo_facts" in dict(
        completion.complete_override("evaluations=[demo,demo_f")
    )
    assert "+model=demo" in dict(completion.complete_override("+model=de"))
    assert dict(completion.complete_override("fail_fast=t")) == {"fail_fast=true": ""}
    assert dict(completion.complete_override("model.dtype=b")) == {}
    assert dict(completion.complete_override("calibration.packing=w")) == {
        "calibration.packing=window": ""
    }


@pytest.mark.parametrize(
    "words, place, expected",
    [
        ("harness run method = gp", 4, "gptq"),
        ("harness run demo method =", 4, "rtn"),
        ("harness table demo scheme = w4,w3g12", 5, "w4,w3g128"),
        ("harness list tun", 2, "tunings"),
    ],
)
def test_bash_completes_values_behind_an_equals_sign(words: str, place: int, expected: str) -> None:
    """bash breaks words at "=" and replaces what follows it alone."""
    code = "import sys; sys.argv = ['harness']; from harness.__main__ import main; main()"
    environment = {
        **os.environ,
        "_HARNESS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(place),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert expected in ran.stdout.split(), ran


def test_completion_knows_cells(
    demo_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", "baseline=false")
    run_sweep(sweep)
    monkeypatch.chdir(tmp_path)
    key = cell_key(sweep.cells[0])
    assert dict(completion.complete_key(key[:3])) == {key[:12]: sweep.cells[0].title}


def test_every_group_can_be_listed() -> None:
    for group in completion.GROUPS:
        code, out = invoke("list", group)
        assert code == 0 and out.strip(), group


def test_the_first_word_may_be_an_override(tmp_path: Path) -> None:
    assert overrides.split_arguments("demo", ["a=b"]) == ("demo", ["a=b"])
    assert overrides.split_arguments("a=b", ["c=d"]) == (None, ["a=b", "c=d"])
    assert overrides.split_arguments(None, None) == (None, [])
    odd = tmp_path / "a=b.yaml"
    odd.write_text("")
    assert overrides.split_arguments(str(odd), []) == (str(odd), [])


def test_doctor_finds_this_machine_well(tmp_path: Path) -> None:
    found = doctor.examine(str(tmp_path / "runs"))
    assert not [each for each in found if each.level == "wrong"], doctor.render(found)
    assert {"python", "torch", "cores", "memory", "disk", "runs", "configs"} <= {
        each.subject for each in found
    }
    assert not (tmp_path / "runs").exists()  # it leaves nothing behind


def test_doctor_looks_at_a_model(tiny_model: Callable[..., Path]) -> None:
    assert {each.level for each in doctor.examine_model("demo")} == {"ok"}
    folder = tiny_model("llama")
    (folder / "tokenizer.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 128}))
    found = doctor.examine_model(str(folder))
    text = doctor.render(found)
    assert sum(each.level == "wrong" for each in found) == 2
    assert all(fact in text for fact in ("no tokenizer", "[96, 64]", "[128, 64]", str(folder)))
    missing = doctor.examine_model(str(folder / "nowhere"))
    assert [each.level for each in missing] == ["wrong"]


@pytest.mark.parametrize("model,code", [("demo", 0), ("no-such-model", 1)])
def test_the_exit_code_of_doctor_says_whether_a_model_can_be_used(model: str, code: int) -> None:
    assert RUNNER.invoke(commands.app, ["doctor", model]).exit_code == code


def test_doctor_names_what_is_wrong_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor.provenance, "versions", lambda: {"torch": "1.0"})
    monkeypatch.setattr(doctor, "count_cores", lambda: 1 / 0)
    found = {each.subject: each for each in doctor.examine(str(tmp_path / "file"))}
    assert (
        found["torch"].level == "note"
        and found["ray"].level == "wrong"
        and found["runs"].level == "wrong"
    )
    assert found["cores"].level == "wrong"  # a broken check is a finding, not an end
    assert "repair these" in doctor.render(found.values())


def test_cancel_leaves_a_note_for_whoever_runs_it(tmp_path: Path) -> None:
    runs = ("--runs", str(tmp_path / "runs"))
    assert invoke("run", *GRID, *local(tmp_path))[0] == 0
    store = Store(tmp_path / "runs")
    key = store.cell_keys()[0]
    code, out = invoke("cancel", key[:10], *runs)
    assert code == 0 and key[:12] in out and store.is_cancelled(key)
    (sweep,) = store.sweep_names()
    code, out = invoke("cancel", sweep, *runs)
    assert code == 0 and f"sweep {sweep} ends" in out and store.is_cancelled(sweep)
    code, out = invoke("cancel", "zzzz", *runs)
    assert code == 1 and 'starts with "zzzz"' in out


def test_what_to_type_next_names_a_file_that_lies_elsewhere(tmp_path: Path) -> None:
    """`harness run FILE` of a file outside sweeps/ ends with a command that finds it."""
    file = tmp_path / "mine.yaml"
    file.write_text("# Mine\nmodel: demo\nmethod: none\nevaluations: [demo_perplexity]\n")
    code, out = invoke("run", str(file), "evaluations.limit=2", *local(tmp_path))
    (words,) = [
        line.removeprefix("next    harness ").partition("   ·")[0].split()
        for line in out.splitlines()
        if "next " in line
    ]
    assert code == 0 and words[:2] == ["table", str(file)]
    code, out = invoke(*words)
    assert code == 0 and "none" in out


def test_only_a_running_sweep_gets_another_priority(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    code, out = invoke("prioritize", "mine", "3", "--runs", str(runs))
    assert code == 2 and 'no running sweep "mine"' in out and "priority=3" in out
    with Coordination(Store(runs), "mine", 1) as control:
        code, out = invoke("prioritize", "mine", "3", "--runs", str(runs))
        assert code == 0 and Store(runs).asked_priority("mine") == 3
        control._refreshed = -float("inf")
        control.refresh()
        assert control.priority == 3


def test_gc_says_what_would_go_and_deletes_it_only_then(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    orphan = runs / "checkpoints" / ("0" * 64)
    orphan.mkdir(parents=True)
    (orphan / "block-0.safetensors").write_bytes(b"x" * 2000)
    for path in (orphan / "block-0.safetensors", orphan):
        os.utime(path, (0, 0))  # what is young may belong to somebody
    code, out = invoke("gc", "--dry-run", "--runs", str(runs))
    assert code == 0 and "1 leftovers" in out and "nothing was deleted" in out and orphan.is_dir()
    code, out = invoke("gc", "--runs", str(runs))
    assert code == 0 and "freed" in out and not orphan.exists()
    assert invoke("gc", "--runs", str(runs))[1].startswith("0 leftovers")


def test_a_budget_is_read_and_a_tiny_one_leaves_cells_out(tmp_path: Path) -> None:
    code, out = invoke("run", "--budget", "soon", *GRID, *local(tmp_path))
    assert code == 2 and "soon" in out
    code, out = invoke("run", "--budget", "0.001s", *GRID, *local(tmp_path))
    assert code == 1 and "2 of 2 cells" not in out and "resume  harness run model=demo" in out
    code, out = invoke("run", "--budget", "8h", *GRID, *local(tmp_path))
    assert code == 0 and "done    2 of 2 cells" in out
