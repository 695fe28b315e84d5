"""What a report says, before it is known on what it will be written: tiles and tables of text, with their provenance.

The input is what `profiling.report.build` returned: values may be null and texts hostile, but nothing else than agreed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from profiling.output.units import MISSING, TIMES, column, plain, show, significant, split

Record = dict[str, Any]

MOST = 300
"""Kernels of a table or a chart; report.json has them all."""


@dataclass(frozen=True)
class Tile:
    """A key figure. `number` is MISSING where there is none, and then `source` is the reason.

    `spread` says between which values it lies, where that is known.
    """

    label: str
    number: str
    unit: str
    status: str
    source: str
    exact: str
    spread: str = ""


@dataclass(frozen=True)
class Cell:
    """`text`, with `under` in small print below it; `bar` is a length in 0..1 to draw beside it, 1 if it is `over`."""

    text: str
    under: str = ""
    bar: float | None = None
    over: bool = False


@dataclass(frozen=True)
class Row:
    """`status` and `source` are those of all its numbers; `child` is a part of the row above."""

    cells: tuple[Cell, ...]
    status: str = ""
    source: str = ""
    child: bool = False

    @property
    def provenance(self) -> str:
        """Where its numbers come from."""
        return provenance(self.status, self.source)


@dataclass(frozen=True)
class Table:
    """`texts` are the columns that are text, by index; `total` is below a rule; `omitted` more rows are not here."""

    columns: tuple[str, ...]
    rows: list[Row]
    texts: frozenset[int] = field(default_factory=lambda: frozenset({0}))
    total: Row | None = None
    omitted: int = 0


def provenance(status: str, source: str) -> str:
    """`status: source`, as far as known."""
    return ": ".join(filter(None, (status, source)))


def tiles(report: Record) -> list[Tile]:
    """The key figures, in the report's order. An accuracy keeps four digits: 94 % is what it is compared with."""
    found = []
    for key, figure in report["figures"].items():
        value, unit = figure["value"], figure["unit"]
        shown, shown_unit = split(value, unit, 4 if "accuracy" in key else 3)
        exact = "" if value is None else f"{value!r} {unit}".strip()
        status = "unavailable" if value is None else figure["status"]
        found.append(
            Tile(figure["label"], shown, shown_unit, status, figure["source"], exact, figure.get("spread") or "")
        )
    return found


def phases(report: Record) -> Table:
    """Level 1: phases of the process, which add up to its wall clock."""
    records = report["phases"]
    wall = _sum(records, "ns")
    times, unit = column([*(phase["ns"] for phase in records), wall], "ns")
    lines = [
        _row(phase, "ns", Cell(phase["name"]), Cell(time), _share(phase, wall))
        for phase, time in zip(records, times[:-1], strict=True)
    ]
    end = Row((Cell("process"), Cell(times[-1]), Cell("")), _status(wall), "the sum of its phases")
    return Table(("phase", f"time, {unit}", "share, %"), lines, total=end if lines else None)


def terms(report: Record) -> Table:
    """Level 2, the terms of the training phase, those first from which most can be recovered."""
    ordered: list[tuple[Record, Record]] = []  # a term or a part of it, and the term
    for term in sorted(report["terms"], key=lambda term: -term["recoverable_ns"]):
        ordered += [(term, term), *((piece, term) for piece in term.get("parts", ()))]
    total = _sum(report["terms"], "ns")
    times, unit = column([*(record["ns"] for record, _ in ordered), total], "ns")
    gains, _ = column([*(record.get("recoverable_ns") for record, _ in ordered), total], "ns")
    lines = []
    for (record, term), time, gain in zip(ordered, times[:-1], gains[:-1], strict=True):
        cells = (
            Cell(record["name"], record.get("note") or ""),
            Cell(time),
            _share(record, total),
            Cell(gain if record.get("recoverable_ns") else ""),
            Cell(record.get("what_if", "")),
        )
        lines.append(_row(term, "ns", *cells, child=record is not term))
    end = Row((Cell("training"), Cell(times[-1]), Cell(""), Cell(""), Cell("")), _status(total), "the sum of its terms")
    columns = ("term", f"time, {unit}", "share, %", f"recoverable, {unit}", "what if")
    return Table(columns, lines, frozenset({0, 4}), end if lines else None)


def article(report: Record) -> Table:
    """The same terms of the article's run."""
    record = report["article"]
    records, total = record["terms"], record["total_ns"]
    times, unit = column([*(term["ns"] for term in records), total], "ns")
    lines = [
        _row(term, "ns", Cell(term["name"], term.get("note") or ""), Cell(time), _share(term, total))
        for term, time in zip(records, times[:-1], strict=True)
    ]
    end = Row((Cell("training and evaluation"), Cell(times[-1]), Cell("")), "quoted", record["title"])
    return Table(("term", f"time, {unit}", "share, %"), lines, total=end if lines else None)


def longest_first(report: Record, key: str) -> list[Record]:
    """The kernels, or with "layers" the convolutions' passes; the MOST that take longest."""
    return sorted(report[key], key=lambda record: -record["ns_per_step"])[:MOST]


def details(record: Record) -> str:
    """Of a kernel or a layer: its op, its shape, and what Nsight Compute counted in it."""
    dram, tensor = record.get("dram_bytes"), record.get("tensor_active")
    counted = [f"{show(dram, 'B')} of DRAM counted"] if dram is not None else []
    counted += [f"tensor cores {show(tensor, 'share')} active"] if tensor is not None else []
    op = record["op"] if record["op"] != record["name"] else ""
    return " · ".join(filter(None, (op, record["shape"], *counted)))


def kernels(report: Record, key: str = "kernels") -> Table:
    """The kernels, or with "layers" the convolutions' passes, the longest first."""
    records = longest_first(report, key)
    times, time_unit = _column(records, "ns_per_step", "ns")
    flops, flops_unit = _column(records, "flops_per_s", "FLOP/s", like=_first(records, "flops_per_s"))
    moved, moved_unit = _column(records, "bytes_per_s", "B/s", like=_first(records, "bytes_per_s"))
    longest = max((record["share"] for record in records), default=0)
    shares, _ = _column(records, "share", "share")
    roofs, _ = _column(records, "roof_fraction", "share")
    lines = [
        _row(
            record,
            "ns_per_step",
            Cell(record["name"], details(record)),
            Cell(times[i]),
            Cell(shares[i], bar=_length(record["share"], longest)),
            Cell(_count(record["calls_per_step"])),
            Cell(flops[i]),
            Cell(moved[i]),
            Cell(record.get("bound") or MISSING),
            _of_roof(roofs[i], record["roof_fraction"]),
            Cell(record["category"]),
        )
        for i, record in enumerate(records)
    ]
    columns = (
        "kernel" if key == "kernels" else "layer and pass",
        f"time a step, {time_unit}",
        "share, %",
        "calls a step",
        flops_unit or "FLOP/s",
        moved_unit or "B/s",
        "bound",
        "of roof, %",
        "category",
    )
    return Table(columns, lines, frozenset({0, 6, 8}), omitted=len(report[key]) - len(records))


def _of_roof(shown: str, fraction: float | None) -> Cell:
    return Cell(shown, bar=_length(fraction, 1.0), over=fraction is not None and fraction > 1.005)


def roofs(report: Record) -> Table:
    """What bounds every kernel of this device."""
    record = report["roofs"]
    lines = [
        _row(row, "value", Cell(row["label"]), Cell(show(row["value"], unit)))
        for key, unit in (("compute", "FLOP/s"), ("bandwidth", "B/s"))
        for row in record[key]
    ]
    return Table(("roof", "rate"), lines)


def floors(report: Record) -> Table:
    """What the run could take at best, by passes over memory."""
    records = report["floors"]
    times, unit = _column(records, "ns", "ns")
    longest = max((record["ns"] for record in records), default=0)
    lines = [
        Row(
            (
                Cell(record["name"]),
                Cell(_count(record["passes"])),
                Cell(time, bar=_length(record["ns"], longest)),
                Cell(record["note"]),
            ),
            "modelled",
            "each kernel takes the longer of its arithmetic and its bytes",
        )
        for record, time in zip(records, times, strict=True)
    ]
    return Table(("implementation", "passes", f"time, {unit}", "what it does"), lines, frozenset({0, 3}))


def levers(report: Record) -> Table:
    """The factors between the article's 256 s and this run, and their product."""
    records = report["levers"]
    logs = [record["log"] for record in records]
    factors = [record["factor"] for record in records]
    product = None if None in factors else math.prod(factors)
    shown = [MISSING if factor is None else significant(factor) for factor in (*factors, product)]
    shown_logs, _ = column([*logs, None if None in logs else sum(logs)], "", 3)
    largest = max((abs(log) for log in logs if log is not None), default=0.0)
    bars = [_length(log, largest) for log in logs]
    lines = [
        _row(record, "factor", Cell(record["name"]), Cell(shown[i]), Cell(shown_logs[i], bar=bars[i]))
        for i, record in enumerate(records)
    ]
    cells = (Cell("256 s / this run"), Cell(shown[-1]), Cell(shown_logs[-1]))
    end = Row(cells, _status(product, "modelled"), "the product of the factors; logarithms add up")
    return Table(("lever", f"factor, {TIMES}", "logarithm"), lines, total=end if lines else None)


def epochs(report: Record) -> Table:
    """The learning curve."""
    records = report["epochs"]
    names = {  # the column, its key in the log, unit and digits
        "learning rate": ("learning_rate", "", 4),
        "loss": ("train_loss", "", 4),
        "accuracy, %": ("train_accuracy", "share", 5),
        "test loss": ("test_loss", "", 4),
        "test accuracy, %": ("test_accuracy", "share", 5),
        "images/s": ("images_per_s", "", 4),
        "training so far, s": ("train_s", "", 4),
    }
    values = [_column(records, *of)[0] for of in names.values()]
    counts = [_count(record["epoch"]) for record in records]
    lines = [
        Row(tuple(map(Cell, cells)), "measured", "the timed run's log.jsonl")
        for cells in zip(counts, *values, strict=True)
    ]
    return Table(("epoch", *names), lines, frozenset())


def unplaced(report: Record) -> str:
    """How many kernels have no place on a roofline, and their share of the time, as a sentence; "" if all have."""
    out = [row for row in report["kernels"] if not (row["intensity"] and row["flops_per_s"])]
    if not out:
        return ""
    share = show(_sum(out, "share"), "share")
    return (
        f"Not shown are {len(out)} of {len(report['kernels'])} kernels, {share} of the time: copies and casts, which "
        "do no arithmetic, and kernels whose bytes or FLOPs are not known."
    )


def environment(report: Record) -> list[tuple[str, str]]:
    """The run and where it took place, name by name."""
    run, place = report["run"], report["environment"]
    said = {"version", "device", "git_sha", "git_dirty", "date"}  # of the run
    pairs = [*run.items(), *((k, v) for k, v in place.items() if k not in said)]
    return [(key.replace("_", " ").removeprefix("packages "), plain(value)) for key, value in pairs]


def lacks(report: Record) -> list[str]:
    """What the account lacks, and each figure that is unavailable with its reason."""
    missing = [f"{tile.label}: {tile.source}" for tile in tiles(report) if tile.status == "unavailable"]
    return report["doubts"] + report["lacks"] + missing


def _row(record: Record, key: str, *cells: Cell, child: bool = False) -> Row:
    """A row about a record, which is unavailable where `record[key]` is not known."""
    status = record["status"] if record.get(key) is not None else "unavailable"
    return Row(cells, status, record["source"], child)


def _status(value: float | None, status: str = "measured") -> str:
    return "unavailable" if value is None else status


def _sum(records: Sequence[Record], key: str) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for value in (record.get(key) for record in records) if value is not None]
    return sum(known) if known else None


def _column(
    records: Sequence[Record], key: str, unit: str, digits: int = 4, like: float | None = None
) -> tuple[list[str], str]:
    return column([record.get(key) for record in records], unit, digits, like)


def _first(records: Sequence[Record], key: str) -> float | None:
    """Of the longest kernel of which it is known."""
    return next((value for value in (record.get(key) for record in records) if value), None)


def _share(record: Record, total: float | None) -> Cell:
    value = record["ns"]
    if value is None or not total:
        return Cell(MISSING)
    return Cell(column([value / total], "share")[0][0], bar=_length(value, total))


def _length(value: float | None, whole: float) -> float | None:
    return None if value is None or value < 0 or not whole else min(value / whole, 1.0)


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{int(value):,}" if value == int(value) else significant(value)
