"""Numbers carry their provenance."""

import pytest

from profiling.output.numbers import Number, measured, modelled, quoted, unavailable


def test_a_number_carries_its_status():
    for make in (measured, modelled, quoted):
        assert make(1.5, "s", "a clock") == Number(1.5, "s", make.__name__, "a clock")
    record = {"value": None, "unit": "W", "status": "unavailable", "source": "no driver", "label": "power"}
    assert unavailable("W", "no driver").to_json("power") == record


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((0, "W", "unavailable", "no driver"), "cannot be"),
        ((None, "W", "measured", "a sensor"), "cannot be"),
        ((1, "W", "guessed", "x"), "expected one of"),
        ((1, "W", "quoted", ""), "needs its source"),
    ],
    ids=["zero_for_unknown", "null_for_measured", "unknown_status", "no_source"],
)
def test_a_number_that_hides_something_is_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        Number(*parts)
