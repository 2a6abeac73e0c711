"""Texts for readers: short lists, names of files, settings."""

from __future__ import annotations

from harness.core.text import file_name, letters_and_digits, settings_text, short_list


def test_a_short_list_counts_what_it_leaves_out() -> None:
    assert short_list(["a", "b"], 2) == "a, b"
    assert short_list(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_names_of_files_and_names_to_compare() -> None:
    assert file_name("arc_easy/acc (5 shots)") == "arc_easy-acc-5-shots-"
    assert letters_and_digits("SliM-LLM+") == letters_and_digits("slim_llm") == "slimllm"


def test_settings_are_written_for_readers() -> None:
    settings = (
        ("documents", None),
        ("length", 2048),
        ("special_tokens", True),
        ("chat", False),
        ("separator", "\n\n"),
        ("include", ""),
        ("source", "hub:a/b"),
        ("tasks", ("x", None, True)),
        ("revisions", (("a/b", "12ab"), ("c/d", None))),
    )
    assert settings_text(settings) == (
        r'length 2048, special_tokens yes, chat no, separator "\n\n", include "", source hub:a/b, '
        "tasks [x, none, yes], revisions (a/b 12ab)"
    )
    assert settings_text(()) == ""
