"""Numbers as people read them."""

import pytest

from profiling.output.units import MISSING, TIMES, column, plain, scale, show, significant, split

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (38.6, "s", "38.6 s"),
        (256.34, "s", "256 s"),
        (1234.5, "s", "1,234 s"),
        (9.996, "s", "10.0 s"),
        (0.9996, "s", "1.00 s"),
        (0.0421, "s", "42.1 ms"),
        (1.2e-6, "s", "1.20 µs"),
        (6_110_000_000, "ns", "6.11 s"),
        (4.82e15, "FLOP", "4.82 PFLOP"),
        (999.9e9, "B/s", "1.00 TB/s"),
        (0.151, "share", "15.1 %"),
        (3.97, "share", "397 %"),
        (1.031, "ratio", f"1.03 {TIMES}"),
        (24123, "images", "24,123 images"),
        (-0.0123, "s", f"{MINUS}12.3 ms"),
        (0, "s", "0 s"),
        (None, "s", MISSING),
        (5e-324, "s", f"4.94e{MINUS}315 ns"),
        (1e300, "quaggas", "1.00e+300 quaggas"),
    ],
)
def test_a_number_as_people_read_it(value, unit, shown):
    assert show(value, unit).replace("\xa0", " ") == shown


def test_number_and_unit_apart():
    assert split(1.2e12, "FLOP/s") == ("1.20", "TFLOP/s")
    assert split(0.9407, "share", 4) == ("94.07", "%")
    assert split(None, "s") == (MISSING, "")
    assert significant(float("inf")) == MISSING
    factor, unit = scale(2.5e9, "B")
    assert (2.5e9 * factor, unit) == (2.5, "GB")


@pytest.mark.parametrize(
    ("values", "unit", "texts", "shown"),
    [
        ([4.87e9, 6.33e8, -14e6, None, 0], "ns", ["4.870", "0.633", f"{MINUS}0.014", MISSING, "0.000"], "s"),
        ([256e9, 1.24e9], "ns", ["256.0", "1.2"], "s"),
        ([314e3, 2e3], "ns", ["314.0", "2.0"], "µs"),
        ([7.14e14, 5.49e12], "FLOP/s", ["714.0", "5.5"], "TFLOP/s"),
        ([0.5, 0.001, 0.0001, -0.0001], "share", ["50.0", "0.1", "<0.1", f"{MINUS}<0.1"], "%"),
        ([None], "B/s", [MISSING], "B/s"),
        ([], "ns", [], "s"),
    ],
)
def test_a_column_has_one_unit_and_one_number_of_decimals(values, unit, texts, shown):
    assert column(values, unit) == (texts, shown)


def test_one_absurd_value_makes_no_zeros_of_the_others_and_stays_short():
    assert column([3.3e14, 7.62e10, 5.1e9], "FLOP/s", like=7.62e10) == (["330,000.00", "76.20", "5.10"], "GFLOP/s")
    texts, _ = column([1e300, 1.0], "s")
    assert max(map(len, texts)) < 12


def test_values_of_a_configuration():
    values = {None: "not known", True: "yes", 123456: "123,456", 12345: "12345", "a": "a"}
    assert {value: plain(value) for value in values} == values
    assert plain([False, 1]) == "no, 1"
