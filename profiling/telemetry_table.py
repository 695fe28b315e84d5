"""What the device's sensors said while it trained, in a table."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from profiling.content import Cell, Row, Table
from profiling.quantities import MISSING, show
from profiling.untrusted import Record, number, part, plain, rows, text


def telemetry_table(report: Record) -> Table:
    """What the sensors said during training, or during the whole run where it is not known when that was.

    It has no rows where there is a reason for the lack of all of them.
    """
    timeline = part(report, "timeline")
    if text(timeline, "reason"):
        return Table((), [], frozenset())
    samples, names = part(timeline, "samples"), part(timeline, "fields")
    inside = _during_training(samples.get("t_s"), rows(timeline, "phases"))
    lines = []
    for key in names:
        label, unit = text(part(names, key), "label") or key, text(part(names, key), "unit")
        values = samples.get(key)
        kept = [v for i, v in enumerate(values) if inside(i) and v is not None] if isinstance(values, list) else []
        numbers = [v for v in kept if isinstance(v, int | float) and not isinstance(v, bool)]
        if numbers:
            three = (min(numbers), statistics.median(numbers), max(numbers))
            cells = tuple(Cell(show(value, unit)) for value in three)
            lines.append(Row((Cell(label), *cells), "measured", f"{len(numbers)} samples of the driver"))
        elif kept:
            lines.append(Row((Cell(label, _words(kept)), *[Cell("")] * 3), "measured", "the driver"))
        else:
            lines.append(Row((Cell(label), *[Cell(MISSING)] * 3), "unavailable", "no sample"))
    for key, reason in part(timeline, "unavailable").items():
        lines.append(Row((Cell(key), *[Cell(MISSING)] * 3), "unavailable", plain(reason)))
    return Table(("sensor", "lowest", "median", "highest"), lines)


def _during_training(times: Any, phases: Sequence[Record]) -> Callable[[int], bool]:
    """Whether a sample, by its index, was taken in a phase called training; all were where these are not known."""
    windows = [
        (p["start_s"], p["end_s"])
        for p in phases
        if text(p, "name") == "training" and number(p, "start_s") is not None and number(p, "end_s") is not None
    ]
    if not isinstance(times, list) or not windows:
        return lambda index: True
    inside = [isinstance(t, int | float) and any(start <= t <= end for start, end in windows) for t in times]
    return lambda index: index < len(inside) and inside[index]


def _words(values: Sequence[Any]) -> str:
    """How often each word occurs in lists of words."""
    words = Counter(plain(word) for value in values for word in (value if isinstance(value, list) else [value]))
    said = [f"{word} in {show(count / len(values), 'share')} of the samples" for word, count in words.most_common()]
    return "; ".join(said) or "none in any sample"
