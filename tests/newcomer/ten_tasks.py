"""Ten tasks of a newcomer on a fresh clone, timed: `make tasks`.

    python tests/newcomer/ten_tasks.py [--clone DIR] [--venv DIR] [--only N,...]

It types only what README shows: every command is looked up there first, with README's placeholders for names of one's own. Pages
are opened in a headless Chromium, LaTeX is compiled where it is installed. Prints a row per task with its limit and what was seen;
exit code 1 if a limit is missed. A task whose tool is missing says so and counts as open.

--clone DIR    where to clone to; a clone that is there, with its environment and results, is used again
--venv DIR     an environment that has the dependencies, used instead of installing them (that time is then not counted)
--only N,...   these tasks alone
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browser import CHROMIUM, Page, browser  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


class Open(Exception):
    """A task that cannot be done here, and why."""


class Missed(Exception):
    """A task that did not end as README says."""


@dataclass
class Newcomer:
    """Somebody with a clone, a shell in it, and README."""

    clone: Path
    seen: dict[str, str] = field(default_factory=dict)

    def type(self, shown: str, ok: bool | None = True, **names: str) -> str:
        """Type a command of README with names in place of its placeholders; returns what is printed.

        ok: whether it ends well; None: either. Raises Missed where README does not show it, or where it ends otherwise.
        """
        pattern = r"\s+".join(map(re.escape, shown.split()))
        if not re.search(pattern, README):
            raise Missed(f"README does not show: {shown}")
        return self.shell(fill(shown, names), ok)

    def shell(self, command: str, ok: bool | None = True) -> str:
        """Run a command in the clone with the environment that README activates."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.clone,
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        out = done.stdout + done.stderr
        if ok is not None and ok != (done.returncode == 0):
            raise Missed(f"{command}: exit code {done.returncode}: {out[-600:]}")
        return out

    def environment(self) -> dict[str, str]:
        """Of a shell after `source .venv/bin/activate`."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {**kept, "PATH": f"{self.clone / '.venv' / 'bin'}{os.pathsep}{kept['PATH']}"}


def fill(shown: str, names: dict[str, str]) -> str:
    """A command with names in place of placeholders."""
    for placeholder, name in names.items():
        shown = shown.replace(placeholder, name)
    return shown


# -- the tasks: each returns what was seen -------------------------------------------------------------------------------------


def from_clone_to_table(person: Newcomer) -> str:
    """make demo on the fresh clone."""
    out = person.type("make demo")
    (table,) = re.findall(r"^\*\*Perplexity.*?\n\n((?:\|.*\n)+)", out, re.MULTILINE)[:1]
    shown = [line for line in README.splitlines() if re.match(r"\| (none|rtn|gptq|awq) ", line)]
    made = [line for line in table.splitlines() if re.match(r"\| (none|rtn|gptq|awq) ", line)]
    person.seen["run"] = out
    equal = sum(a == b for a, b in zip(shown, made, strict=True))
    if equal < len(shown):
        raise Missed(f"{len(shown) - equal} of {len(shown)} rows differ from README's")
    return f"all {equal} rows are README's"


def plan_of_a_study(person: Newcomer) -> str:
    """What would run, without weights."""
    out = person.type("harness plan llama3_8b_ptq", ok=None)
    if not out.startswith("plan ") or "Traceback" in out:
        raise Missed(out[-400:])
    return f"{len(out.splitlines())} lines"


def own_model_to_latex(person: Newcomer) -> str:
    """README's two commands with a folder and a text of one's own."""
    folder = person.clone / "mine"
    folder.mkdir(exist_ok=True)
    shutil.copytree(
        person.clone / "harness" / "data" / "demo" / "model", folder / "model", dirs_exist_ok=True
    )
    text = " ".join(f"A text of one's own has word {n} and word {n * n}." for n in range(4000))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    names = {"path/to/folder": "mine/model", "text.txt": "mine/text.txt"}
    commands = [
        line
        for line in README.splitlines()
        if line.startswith("harness ") and "path/to/folder" in line
    ]
    run, table = commands
    person.type(run, **names)
    latex = person.type(table, **names)
    if r"\toprule" not in latex or "GPTQ" not in latex:
        raise Missed(latex[-400:])
    if shutil.which("pdflatex") is None:
        return "LaTeX in one try; not compiled: pdflatex is not installed"
    paper = (
        "\\documentclass[twocolumn]{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
        f"{latex}\\end{{document}}\n"
    )
    (folder / "paper.tex").write_text(paper, encoding="utf-8")
    person.shell("cd mine && pdflatex -interaction=nonstopmode -halt-on-error paper.tex")
    return "LaTeX in one try; compiles in two columns"


WRONG = (  # what somebody types -> what should run after at most one answer
    "harness plan demo method=gtpq",
    "harness plan demo schema=w4",
    "harness plan dmeo",
    "harness plan demo evaluations=demo_perplexty",
    "harness plan demo scheme=w4g",
)


def from_wrong_to_right(person: Newcomer) -> str:
    """Each wrong input again, with the first name or command that the answer suggests."""
    tries = []
    for wrong in WRONG:
        answer = person.shell(wrong, ok=False)
        right = corrected(wrong, answer)
        if right is None:
            raise Missed(f"{wrong}: no suggestion in: {answer[-300:]}")
        person.shell(right)
        tries.append(right)
    return f"{len(tries)} wrong inputs, each right at the second try"


def corrected(wrong: str, answer: str) -> str | None:
    """The command with the wrong word replaced by the answer's first suggestion."""
    match = re.search(r'did you mean "?([\w.:]+)"?', answer)
    if match is None:
        return None
    suggestion = match.group(1)
    words = shlex.split(wrong)
    quoted = next((q for q in re.findall(r'"([^"]+)"', answer) if any(q in w for w in words)), "")
    candidates = [w for w in words[2:] if quoted and quoted in w] or words[-1:]
    return shlex.join([w.replace(quoted, suggestion) if w in candidates else w for w in words])


def a_cell(person: Newcomer) -> str:
    """Everything about the best 3-bit cell."""
    rows = list(csv.DictReader(io.StringIO(person.shell("harness table demo --format csv"))))
    best = min(
        (row for row in rows if row["bits"] == "3"), key=lambda row: float(row["perplexity"])
    )
    person.seen["key"] = best["cell_key"][:12]
    out = person.type("harness show <key>", **{"<key>": person.seen["key"]})
    if "harness run" not in out or best["cell_key"] not in out:
        raise Missed(out[-400:])
    return f"{best['method']} {best['bits']} bits, with the command that reproduces it"


def findings_of_the_demo(person: Newcomer) -> str:
    """Which findings of the studies hold."""
    out = person.type("harness findings demo")
    answers = re.findall(r"^ +ours +(holds|does not hold|cannot tell yet)", out, re.MULTILINE)
    if not answers or "cannot tell yet" in answers:
        raise Missed(out[-400:])
    return f"{answers.count('holds')} of {len(answers)} hold"


@contextmanager
def mlflow(person: Newcomer) -> Iterator[str]:
    """`harness ui` while the block runs; yields its first line's address."""
    if "harness ui" not in README:
        raise Missed("README does not show: harness ui")
    process = subprocess.Popen(
        ["harness", "ui"],
        cwd=person.clone,
        env=person.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        executable=shutil.which("harness", path=person.environment()["PATH"]),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "http://" in line:
                yield line[line.index("http://") :].split()[0]
                return
        raise Missed("harness ui ended")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def opened(page: Page, address: str, script: str, seconds: float = 120.0) -> None:
    page.open("about:blank")
    page.call("Page.navigate", url=address)
    page.wait(script, seconds)


def best_in_mlflow(person: Newcomer) -> str:
    """From the link that the run printed to the best 3-bit method: one click, rows best first."""
    if CHROMIUM is None:
        raise Open("needs Chromium")
    summary = person.seen.get("run") or person.shell("harness run demo")
    address = re.findall(r"http://127\.0\.0\.1:\d+/#\S+", summary)[-1]
    with mlflow(person), browser() as page:
        page.size(1700, 1000)
        link = "[...document.querySelectorAll('a')].find(a => a.textContent.startsWith('cells, best first'))"
        opened(page, address, f"!!{link}")
        opened(page, page.run(f"{link}.href"), "true")  # as a click does, in a tab of its own
        names = (
            "[...document.querySelectorAll('a[href*=\"/runs/\"]')].map(a => a.textContent.trim())"
            ".filter(t => / · w3/.test(t))"
        )
        page.wait(f"{names}.length > 0")
        best = page.run(names)[0]
    return f"1 click: {best}"


def best_in_the_report(person: Newcomer) -> str:
    """The report's filter of 3 bits and its rows by perplexity: two clicks."""
    person.type("harness report llama3_8b_ptq", llama3_8b_ptq="demo")
    if CHROMIUM is None:
        raise Open("needs Chromium")
    with browser() as page:
        page.size(1300, 900)
        page.open((person.clone / "runs" / "reports" / "demo.html").as_uri())
        page.click("[data-filter=bits] label:has([value='3'])")
        page.click("#table-demo thead th:nth-child(5) button")
        row = page.run(
            "[...document.querySelectorAll('#table-demo tbody tr')].find(r => !r.hidden).innerText"
        )
    if not row.split()[0].startswith(("awq", "gptq")):
        raise Missed(row)
    return f"2 clicks: {' '.join(row.split()[:3])}"


def interrupted_and_continued(person: Newcomer) -> str:
    """Ctrl-C, then the same command: nothing that was done is repeated."""
    shown = "harness run demo rounding=rtn,gptq scheme=w4g32,w3g32"
    if shown not in README:
        raise Missed(f"README does not show: {shown}")
    command = f"{shown} seed=1"  # cells of its own: the demo's are done
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=person.clone,
        env=person.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("made  "):
            process.send_signal(signal.SIGINT)
            pressed = time.monotonic()
            break
    else:
        raise Missed("".join(lines)[-400:])
    rest = process.stdout.read()
    answered = time.monotonic() - pressed
    if process.wait(60) != 130 or "resume" not in rest:
        raise Missed(rest[-400:])
    made = {line.split("   ")[1].strip() for line in lines if line.startswith("made  ")}
    again = person.shell(command)
    repeated = [name for name in made if f"made    {name}" in again]
    if repeated:
        raise Missed(f"made again: {repeated}")
    return f"ended {answered:.1f} s after Ctrl-C; the second run made what was left"


def in_python(person: Newcomer) -> str:
    """README's lines of Python, as a script."""
    (block,) = re.findall(r"```python\n(import harness.*?)```", README, re.DOTALL)
    (person.clone / "readme.py").write_text(block, encoding="utf-8")
    out = person.shell("python readme.py")
    return f"{len(out.splitlines())} lines printed"


TASKS: tuple[tuple[str, Callable[[Newcomer], str], float], ...] = (  # with seconds that it may take
    ("from clone to table", from_clone_to_table, 300),
    ("the plan of a study", plan_of_a_study, 60),
    ("findings of the demo", findings_of_the_demo, 30),
    ("all about one cell", a_cell, 30),
    ("own model to LaTeX in one try", own_model_to_latex, 180),
    ("wrong input to right command in two tries", from_wrong_to_right, 120),
    ("from the printed link to the best 3-bit method in MLflow", best_in_mlflow, 120),
    ("the best 3-bit method in the report", best_in_the_report, 60),
    ("interrupted and continued", interrupted_and_continued, 180),
    ("the same in Python", in_python, 180),
)


def borrow(venv: Path, place: Path) -> None:
    """Programs at `place` that run those of another environment on the clone that `place` lies in."""
    (place / "bin").mkdir(parents=True, exist_ok=True)
    start = f"#!/bin/sh\nPYTHONPATH={shlex.quote(str(place.parent))} exec {shlex.quote(str(venv / 'bin' / 'python'))}"
    for name, words in (("python", ""), ("harness", " -m harness")):
        (place / "bin" / name).write_text(f'{start}{words} "$@"\n', encoding="utf-8")
        (place / "bin" / name).chmod(0o755)
    (place / ".installed").touch()


def main() -> int:
    """Do the tasks, print the table, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clone", type=Path)
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--only", default="", help="numbers of tasks, from 1")
    chosen = parser.parse_args()
    place = (chosen.clone or Path(tempfile.mkdtemp(prefix="newcomer-")) / "clone").resolve()
    if not place.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    person = Newcomer(place)
    if chosen.venv is not None:
        borrow(chosen.venv.absolute(), place / ".venv")
    numbers = {int(n) for n in chosen.only.split(",") if n} or set(range(1, len(TASKS) + 1))
    failed = False
    print(f"in {place}\n\n| task | limit | took | seen |\n|---|---|---|---|", flush=True)
    for number, (name, task, limit) in enumerate(TASKS, start=1):
        if number not in numbers:
            continue
        began = time.monotonic()
        try:
            seen, missed = task(person), False
        except Open as reason:
            seen, missed = f"open: {reason}", False
        except (Missed, AssertionError) as reason:
            seen, missed = f"MISSED: {reason}", True
        seconds = time.monotonic() - began
        late = seconds > limit
        failed |= missed or late
        shown = " ".join(seen.split())
        print(
            f"| {number}. {name} | {limit:.0f} s | {seconds:.0f} s{' LATE' if late else ''} | {shown} |",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
