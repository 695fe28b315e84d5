"""Reading a report that may hold anything: values null or of another kind than agreed, lists empty, texts hostile."""

import math
import re
from typing import Any

Record = dict[str, Any]

_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control and bidirectional characters, halves of surrogate pairs, and what is no character at all."""
LONGEST = 1000
"""Letters of a text that are shown."""


def clean(value: Any) -> Any:
    """A copy fit to be shown: control, bidirectional and surrogate characters replaced, NaN and infinities None.

    Texts are cut after LONGEST letters.
    """
    if isinstance(value, str):
        whole = value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"
        return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", whole)
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rows(record: Record, key: str) -> list[Record]:
    """The records in the list `record[key]`; none where it is missing."""
    value = record.get(key)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def part(record: Record, key: str) -> Record:
    """The record `record[key]`; an empty one where it is missing."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def number(record: Record, key: str) -> float | int | None:
    """The number `record[key]`, or None."""
    value = record.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def text(record: Record, key: str) -> str:
    """`record[key]` as text; "" where it is missing."""
    return plain(record.get(key), "")


def texts(record: Record, key: str) -> list[str]:
    """The texts in the list `record[key]`."""
    value = record.get(key)
    return [plain(item) for item in value if item is not None] if isinstance(value, list) else []


def plain(value: Any, missing: str = "not known") -> str:
    """A value of the environment or of the configuration."""
    if value is None:
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10**5 else str(value)
