"""Nothing that is printed can fail for want of a character, and what the system refuses is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import terminal


def command(
    tmp_path: Path, *arguments: str, encoding: str = "utf-8", **variables: str
) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200", **variables}
    done = subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout.decode(encoding)


PLAN = ("plan", "demo", "scheme=w4", "cluster=local", "tracking=none")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r"])
def test_every_encoding_holds_a_plan(tmp_path: Path, encoding: str) -> None:
    code, text = command(tmp_path, *PLAN, encoding=encoding)
    assert code == 0 and "4 cells" in text and "Unicode" not in text
    if encoding == "ascii":
        assert "plan    4 cells - 0 done" in text


def test_a_marks_plain_character_keeps_columns_and_is_its_own() -> None:
    assert terminal.plain("≈ ↓ · † — ± Δ") == "~ v - ! - + D"
    assert terminal.plain("ünï → 模型 \udce9") == "uni > ?? ?"
    marks = [terminal.plain(mark) for mark in "≈≠±†Δ"]
    assert all(len(mark) == 1 for mark in marks) and len(set(marks)) == len(marks)


def test_names_too_long_and_settings_that_are_no_numbers_are_one_sentence(tmp_path: Path) -> None:
    for arguments in ((*PLAN[:2], f"runs={'a' * 300}"), (*PLAN[:2], f"data.root={'a' * 300}")):
        code, text = command(tmp_path, *arguments)
        assert code == 1 and "Traceback" not in text
        assert "too long" in text and "shorter" in text and "a" * 20 in text
    code, text = command(
        tmp_path, *PLAN, "method=gptq", "calibration=demo", "rounding.damping_fraction=nan"
    )
    assert code == 2 and "damping_fraction" in text and "nan" in text and "Traceback" not in text


def test_a_defect_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness import __main__ as entry

    def broken(**options: object) -> None:
        raise AttributeError("a defect")

    monkeypatch.setattr(entry, "app", broken)
    with pytest.raises(AttributeError):
        entry.main()

    def refused(**options: object) -> None:
        raise PermissionError(13, "Permission denied", "/there")

    monkeypatch.setattr(entry, "app", refused)
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "/there" in said and "permission denied" in said and "Traceback" not in said
    monkeypatch.setenv("HARNESS_DEBUG", "1")
    with pytest.raises(PermissionError):
        entry.main()
