"""What the device's sensors said while it trained, in a table."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from profiling.output.units import MISSING, plain, show
from profiling.report.tables import Cell, Record, Row, Table


def telemetry_table(report: Record) -> Table:
    """What the sensors said during training, or during the whole run where it is not known when that was.

    It has no rows where there is a reason for the lack of all of them.
    """
    timeline = report["timeline"]
    if timeline["reason"]:
        return Table((), [], frozenset())
    samples, names = timeline["samples"], timeline["fields"]
    inside = _during_training(samples["t_s"], timeline["phases"])
    lines = []
    for key in names:
        label, unit = names[key]["label"], names[key]["unit"]
        kept = [v for i, v in enumerate(samples[key]) if inside(i) and v is not None]
        numbers = [v for v in kept if isinstance(v, int | float)]
        if numbers:
            three = (min(numbers), statistics.median(numbers), max(numbers))
            cells = tuple(Cell(show(value, unit)) for value in three)
            lines.append(Row((Cell(label), *cells), "measured", f"{len(numbers)} samples of the driver"))
        elif kept:
            lines.append(Row((Cell(label, _words(kept)), *[Cell("")] * 3), "measured", "the driver"))
        else:
            lines.append(Row((Cell(label), *[Cell(MISSING)] * 3), "unavailable", "no sample"))
    for key, reason in timeline["unavailable"].items():
        lines.append(Row((Cell(key), *[Cell(MISSING)] * 3), "unavailable", reason))
    return Table(("sensor", "lowest", "median", "highest"), lines)


def _during_training(times: Sequence[float], phases: Sequence[Record]) -> Callable[[int], bool]:
    """Whether a sample, by its index, was taken in a phase called training; all were where these are not known."""
    windows = [(p["start_s"], p["end_s"]) for p in phases if p["name"] == "training"]
    if not windows:
        return lambda index: True
    inside = [any(start <= t <= end for start, end in windows) for t in times]
    return inside.__getitem__


def _words(values: Sequence[Any]) -> str:
    """How often each word occurs in lists of words."""
    words = Counter(plain(word) for value in values for word in (value if isinstance(value, list) else [value]))
    said = [f"{word} in {show(count / len(values), 'share')} of the samples" for word, count in words.most_common()]
    return "; ".join(said) or "none in any sample"
