import math

import pytest

from profiling.untrusted import LONGEST, clean, number, part, plain, rows, text, texts


@pytest.mark.parametrize(
    "unfit",
    ["\0", "\x1b", "\x7f", "\x85", "\u202e", "\u2066", "\u200f", "\ud800", "\ufffe"],
    ids=["nul", "escape", "delete", "c1", "bidi_override", "isolate", "mark", "surrogate", "no_character"],
)
def test_unfit_characters_are_replaced(unfit):
    cleaned = clean({f"a{unfit}": [f"b{unfit}c"]})
    assert cleaned == {"a\ufffd": ["b\ufffdc"]}
    str(cleaned).encode()  # a lone surrogate cannot be written to a file


def test_what_is_fit_stays():
    value = {"name": "größer\n\t<b>", "n": [1, 2.5, None, True]}
    assert clean(value) == value


def test_numbers_that_json_lacks_are_not_known():
    assert clean([math.nan, math.inf, -math.inf, 1.0]) == [None, None, None, 1.0]


def test_long_texts_are_cut():
    assert clean("x" * 10**6) == "x" * (LONGEST - 1) + "…"
    assert clean("x" * LONGEST) == "x" * LONGEST


def test_the_original_is_not_touched():
    value = {"a": ["\0"]}
    clean(value)
    assert value == {"a": ["\0"]}


@pytest.mark.parametrize("wrong", [None, 3, "text", {"a": 1}, [None, 3, "x"]], ids=str)
def test_a_list_of_records_that_is_something_else(wrong):
    assert rows({"key": wrong}, "key") == []


def test_a_record_that_is_something_else():
    assert part({"key": [1]}, "key") == {}
    assert part({"key": {"a": 1}}, "key") == {"a": 1}


@pytest.mark.parametrize("wrong", [None, "3", True, [3], {}], ids=str)
def test_a_number_that_is_something_else(wrong):
    assert number({"key": wrong}, "key") is None


def test_numbers_and_texts():
    record = {"n": 0, "t": "x", "l": ["a", None, 3], "none": None}
    assert number(record, "n") == 0
    assert text(record, "t") == "x"
    assert text(record, "none") == text(record, "absent") == ""
    assert texts(record, "l") == ["a", "3"]
    assert texts(record, "t") == []


def test_values_of_the_environment():
    assert [plain(v) for v in (None, True, False, 1_750_000, 3430, ["a", None])] == [
        "not known",
        "yes",
        "no",
        "1,750,000",
        "3430",
        "a, not known",
    ]
