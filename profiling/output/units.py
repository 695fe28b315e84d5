"""Numbers as people read them: three significant digits, an SI prefix, a real minus sign."""

import math
from collections.abc import Sequence
from typing import Any

MISSING = "—"
"""Stands for an unknown number."""

LARGE = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
PREFIXED = {"FLOP", "FLOP/s", "FLOP/B", "B", "B/s", "W", "J", "Hz"}
TIMES = "\N{MULTIPLICATION SIGN}"
SAME = {"bytes": "B", "seconds": "s", "ratio": TIMES, "x": TIMES, "fraction": "share", "1/s": "/s"}
"""Other spellings that records use."""


def significant(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, but never a rounded integer part; thousands are separated.

    Below 0.001 and from 1e12 on with an exponent; MISSING if it is not finite.
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else MISSING
    if not 1e-3 <= abs(value) < 1e12:
        return f"{value:.{digits - 1}e}".replace("-", "\N{MINUS SIGN}")
    places = digits - 1 - math.floor(math.log10(abs(value)))
    # 9.996 has two digits more than 10.0, to which it rounds
    if places > 0 and abs(round(value, places)) >= 10 ** (digits - places):
        places -= 1
    return f"{value:,.{max(places, 0)}f}".replace("-", "\N{MINUS SIGN}")


def scale(value: float, unit: str) -> tuple[float, str]:
    """(factor, unit) in which `value` reads well.

    FLOP, bytes and the like take an SI prefix from kilo on, seconds below one become ms, us or ns, a share becomes per
    cent; another unit is kept.
    """
    unit = SAME.get(unit, unit)
    if unit == "share":
        return 100.0, "%"
    if unit in ("s", "ns"):
        factor = 1e-9 if unit == "ns" else 1.0
        size, prefix = next(((s, p) for s, p in SMALL if value * factor >= 0.9995 * s), SMALL[-1])
        return (factor / size, f"{prefix}s") if value else (factor, "s")
    if unit in PREFIXED:
        size, prefix = next(((s, p) for s, p in LARGE if value >= 0.9995 * s), (1.0, ""))
        return 1 / size, prefix + unit
    return 1.0, unit


def split(value: float | int | None, unit: str, digits: int = 3) -> tuple[str, str]:
    """The number and its unit apart: (1.2e12, "FLOP/s") is ("1.20", "TFLOP/s"), (0.151, "share") is ("15.1", "%").

    Integers in a unit that takes no prefix are exact. None is (MISSING, "").
    """
    if value is None:
        return MISSING, ""
    factor, shown = scale(abs(value), unit)
    if isinstance(value, int) and shown == SAME.get(unit, unit) and abs(value) < 1e12:
        return f"{value:,}".replace("-", "\N{MINUS SIGN}"), shown
    return significant(value * factor, digits), shown


def show(value: float | int | None, unit: str, digits: int = 3) -> str:
    """The number with its unit, on one line."""
    number, unit = split(value, unit, digits)
    return f"{number}\N{NO-BREAK SPACE}{unit}" if unit else number


def column(
    values: Sequence[float | int | None], unit: str, digits: int = 4, like: float | None = None
) -> tuple[list[str], str]:
    """(texts, unit) of numbers in a column: one unit, prefix and number of decimals for all.

    The largest gets `digits` digits, a share as 100 % would; or `like` does, if the largest is not typical. A number
    that would round to zero is "<" the smallest that would not, behind a minus if negative. None is MISSING.
    """
    typical = like or max((abs(value) for value in values if value is not None), default=0.0)
    factor, shown = scale(typical, unit)
    if typical * factor >= 1e12:
        return [MISSING if v is None else significant(v * factor) for v in values], shown
    whole = 100.0 if shown == "%" else max(typical * factor, 1.0)
    places = max(digits - 1 - math.floor(math.log10(whole)), 0)

    def written(value: float | int | None) -> str:
        if value is None:
            return MISSING
        number = value * factor
        if value and abs(number) < 0.5 * 10**-places:
            return f"<{10**-places:.{places}f}" if value > 0 else f"\N{MINUS SIGN}<{10**-places:.{places}f}"
        return f"{number:,.{places}f}".replace("-", "\N{MINUS SIGN}") if abs(number) < 1e12 else significant(number)

    return [written(value) for value in values], shown


def plain(value: Any, missing: str = "not known") -> str:
    """The text of a value of the environment or the configuration."""
    if value is None:
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10**5 else str(value)
