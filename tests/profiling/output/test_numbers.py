import pytest

from profiling.output.numbers import Number, measured, modelled, quoted, unavailable


@pytest.mark.parametrize("make", [measured, modelled, quoted])
def test_a_figure_carries_its_status(make):
    assert make(1.5, "s", "a clock").status == make.__name__


def test_unavailable_is_null_and_never_zero():
    assert unavailable("W", "no driver").to_json("power") == {
        "value": None,
        "unit": "W",
        "status": "unavailable",
        "source": "no driver",
        "label": "power",
    }


@pytest.mark.parametrize(
    "parts",
    [
        (0, "W", "unavailable", "no driver"),
        (None, "W", "measured", "a sensor"),
        (1, "W", "guessed", "x"),
        (1, "W", "quoted", ""),
    ],
    ids=["zero_for_unknown", "null_for_measured", "unknown_status", "no_source"],
)
def test_a_figure_that_hides_something_is_refused(parts):
    with pytest.raises(ValueError, match=r"cannot be|expected one of|needs its source"):
        Number(*parts)
