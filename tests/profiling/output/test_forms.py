"""Records are checked against their forms, and texts made fit to be shown."""

import math
import re

import pytest

from profiling.output.forms import COUNT, FACT, LONGEST, SHARE, clean, fit

FORM = {
    "version": 1,
    "name": str,
    "share?": SHARE,
    "rows": [{"n": COUNT}],
    "of": (str, None),
    "gpu": (None, {str: FACT}),
}
RIGHT = {"version": 1, "name": "a", "share": 0.5, "rows": [{"n": 0}], "of": None, "gpu": {"clock": 3, "ids": [1, "a"]}}


def test_a_fitting_record_is_returned_without_unnamed_entries():
    assert fit(RIGHT | {"more": [1]}, FORM, "a") == RIGHT
    assert fit({k: v for k, v in RIGHT.items() if k != "share"}, FORM, "a") == RIGHT | {"share": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "a.version is 2, expected 1"),
        ({"version": True}, "a.version is true, expected 1"),
        ({"name": 3}, "a.name is 3, expected a text"),
        ({"name": "\x1b[31m" * 9, "rows": None}, "a.rows is null, expected a list"),
        ({"share": 1.5}, "a.share is 1.5, expected a number from 0 to 1"),
        ({"share": True}, "a.share is true, expected a number"),
        ({"share": math.nan}, "a.share is nan, expected a number"),
        ({"share": "\x1b[31m"}, r"a.share is '\x1b[31m', expected a number"),
        ({"rows": [{"n": 1}, {"n": -1}]}, "a.rows[1].n is -1, expected a whole number from 0"),
        ({"rows": [{"n": 1.0}]}, "a.rows[0].n is 1.0, expected a whole number"),
        ({"rows": [{"n": 10**30}]}, "expected a whole number from 0 to 4.61169e+18"),
        ({"rows": [{}]}, "a.rows[0] has no n"),
        ({"rows": {}}, "a.rows is an object, expected a list"),
        ({"of": 1}, "a.of is 1, expected a text or null"),
        ({"gpu": {"a": {"b": {"c": {"d": 1}}}}}, "a.gpu.a.b is an object, expected"),
        ({"gpu": "yes"}, "a.gpu is 'yes', expected null or an object"),
    ],
)
def test_the_first_place_that_does_not_fit_is_named(change, said):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        fit(RIGHT | change, FORM, "a")
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "unfit",
    ["\0", "\x1b", "\x7f", "\x85", "\u202e", "\u2066", "\u200f", "\ud800", "\ufffe"],
    ids=["nul", "escape", "delete", "c1", "bidi_override", "isolate", "mark", "surrogate", "no_character"],
)
def test_unfit_characters_are_replaced(unfit):
    cleaned = clean({f"a{unfit}": [f"b{unfit}c"]})
    assert cleaned == {"a\ufffd": ["b\ufffdc"]} == fit({f"a{unfit}": [f"b{unfit}c"]}, {str: [str]}, "")
    str(cleaned).encode()  # a lone surrogate cannot be written to a file


def test_fitting_leaves_the_original_as_it_was():
    value = {"name": "größer\n\t<b>", "n": [1, 2.5, None, True, math.nan, math.inf], "l": "x" * 10**6}
    cleaned = clean(value)
    assert cleaned == {"name": "größer\n\t<b>", "n": [1, 2.5, None, True, None, None], "l": "x" * (LONGEST - 1) + "…"}
    assert value["l"] == "x" * 10**6
