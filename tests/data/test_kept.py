"""Answers kept between processes: found again while nothing changed, asked again when anything did, never needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.data import kept
from harness.data.kept import Book, Stamp, stamp_of

OLD = Stamp("old", 0.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "code_stamp", lambda: OLD)
    return tmp_path / "cache"


def test_a_stamp_changes_with_names_sizes_and_times_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    file = folder / "inner" / "a.txt"
    file.write_text("one")
    os.utime(file, (100, 100))
    first = stamp_of([folder])
    assert stamp_of([folder]) == first and first.newest == 100 and first.is_settled
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_text("compiled")
    (folder / ".hidden").write_text("x")
    assert stamp_of([folder]) == first
    os.utime(file, (101, 101))
    second = stamp_of([folder])
    file.rename(folder / "inner" / "b.txt")
    third = stamp_of([folder])
    assert len({first.text, second.text, third.text, stamp_of([folder, tmp_path / "no"]).text}) == 4
    (folder / "new").write_text("")
    assert not stamp_of([folder]).is_settled  # it may change again within the clock's resolution


def test_an_answer_is_asked_for_once(own_cache: Path) -> None:
    asked: list[int] = []
    for _ in range(2):
        assert kept.answered("t", ["q", 1], [OLD], lambda: asked.append(1) or {"a": [1]}) == {
            "a": [1]
        }
    assert asked == [1]
    assert kept.answered("t", ["q", 2], [OLD], lambda: "other") == "other"
    for file in (own_cache / "answers").iterdir():
        file.write_text("damaged")
    assert kept.find("t", ["q", 1]) is None


def test_what_changed_just_now_and_a_cache_that_cannot_be_written_are_asked_again(
    own_cache: Path,
) -> None:
    fresh = stamp_of([Path(__file__)])
    now = Stamp(fresh.text, float("inf"))
    assert [kept.answered("t", 1, [now], lambda n=n: n) for n in (1, 2)] == [1, 2]
    own_cache.write_text("a file where the folder should be")
    assert [kept.answered("t", 1, [OLD], lambda n=n: n) for n in (1, 2)] == [1, 2]


def test_a_book_keeps_what_may_be_kept() -> None:
    book = Book("model", OLD)
    assert book.ask(["q"], list, lambda answer: not answer) == []
    assert book.ask(["r"], lambda: ["refused"], lambda answer: not answer) == ["refused"]
    book.save()
    again = Book("model", OLD)
    assert again.ask(["q"], lambda: ["asked"], bool) == []
    assert again.ask(["r"], lambda: ["asked"], bool) == ["asked"]
    assert Book("another", OLD).ask(["q"], lambda: 1, bool) == 1


def test_the_older_half_goes_when_there_are_too_many(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_ANSWERS", 10)
    for number in range(11):
        kept.keep("t", number, number)
        os.utime(kept._path("t", number), (number, number))
    kept.keep("t", 11, 11)
    left = [number for number in range(12) if kept.find("t", number) is not None]
    assert 5 <= len(left) <= 10 and 11 in left and 0 not in left
