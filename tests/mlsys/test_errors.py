"""Errors: a tree that is drawn as it is, and messages that give nothing away."""

from __future__ import annotations

import inspect
import re

import pytest

from mlsys import errors
from mlsys.errors import (
    InvalidRequest,
    MlsysError,
    TooManyRuns,
    Unavailable,
    redacted,
)

PUBLIC = [
    value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception) and not name.startswith("_")
]


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^[ │├└─]*([A-Z]\w+Error|[A-Z]\w+)(?:  |$)", errors.__doc__, re.M)

    assert sorted(drawn) == sorted(kind.__name__ for kind in PUBLIC)


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_every_error_has_a_message_and_facts_for_machines(kind: type[MlsysError]) -> None:
    error = kind("It went wrong.", row=7)

    assert isinstance(error, MlsysError)
    assert str(error) == "It went wrong."
    assert error.members == {"row": 7}


def test_what_passes_says_when_to_try_again() -> None:
    assert Unavailable("no answer", retry_after=30).retry_after == 30
    assert TooManyRuns("busy").retry_after > 0
    assert "retry_after" not in Unavailable("no answer").members


def test_a_malformed_value_is_a_value_error_too() -> None:
    assert issubclass(InvalidRequest, ValueError)


def test_values_are_taken_out_of_a_message() -> None:
    said = redacted("could not convert 'Braund, Mr. Owen' to 22.5", ["Braund, Mr. Owen", 22.5])

    assert said == "could not convert '…' to …"


def test_a_value_inside_a_word_is_left_alone() -> None:
    assert redacted("male is not in female, males, e-male", ["male"]) == (
        "… is not in female, males, e-…"
    )


def test_the_longest_value_goes_first() -> None:
    assert redacted("abc def", ["abc", "abc def"]) == "…"


def test_missing_and_empty_values_take_nothing_out() -> None:
    assert redacted("None is empty", [None, ""]) == "None is empty"


def test_values_are_no_patterns() -> None:
    assert redacted("a+b and aab", ["a+b", "(", ".*"]) == "… and aab"


@pytest.mark.parametrize(
    "path", ["/srv/app/model.py", "/usr/lib/python3.12/site-packages/x.so", "/home/me@work/a-b+c"]
)
def test_paths_of_the_server_are_taken_out(path: str) -> None:
    assert redacted(f'File "{path}", line 3') == 'File "…", line 3'


def test_a_fraction_is_no_path() -> None:
    assert redacted("3/4 of a/b") == "3/4 of a/b"


def test_a_long_message_is_cut() -> None:
    assert len(redacted("x" * 10_000)) == 500
    assert redacted("  It ends here.  ") == "It ends here"
