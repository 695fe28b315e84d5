"""The content of a report, the same for HTML and Markdown: tiles and tables of text, with their provenance.

The input is what `profiling.report.build` returned, in which every name may be hostile.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
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
        exact = "" if value is None else f"{value!r} {unit}"
        label, status, source = figure["label"], figure["status"], figure["source"]
        found.append(Tile(label, shown, shown_unit, status, source, exact, figure.get("spread", "")))
    return found


def phases(report: Record) -> Table:
    """Level 1: phases of the process, which add up to its wall clock."""
    wall = sum(phase["ns"] for phase in report["phases"])
    return _shared("phase", report["phases"], wall, "process", "the sum of its phases")


def terms(report: Record) -> Table:
    """Level 2, the terms of the training phase, those first from which most can be recovered, each with its parts."""
    records: list[Record] = []
    for term in sorted(report["terms"], key=lambda term: -term["recoverable_ns"]):
        same = {"status": term["status"], "source": term["source"], "child": True}
        records += [term, *(part | same for part in term["parts"])]
    total = sum(term["ns"] for term in report["terms"])
    times, unit = column([*(record["ns"] for record in records), total], "ns")
    gains, _ = column([*(record.get("recoverable_ns") for record in records), total], "ns")
    columns = {
        "term": _names(records),
        f"time, {unit}": times[:-1],
        "share, %": _shares(records, total),
        f"recoverable, {unit}": [
            gain if record.get("recoverable_ns") else "" for record, gain in zip(records, gains, strict=False)
        ],
        "what if": [record.get("what_if", "") for record in records],
    }
    end = _total(("training", times[-1], "", "", ""), "the sum of its terms")
    return _table(records, columns, {0, 4}, end)


def article(report: Record) -> Table:
    """The same terms of the article's run."""
    record = report["article"]
    end = ("training and evaluation", record["title"], "quoted")
    return _shared("term", record["terms"], record["total_ns"], *end)


def longest_first(report: Record, key: str) -> list[Record]:
    """The kernels, or with "layers" the convolutions' passes; the MOST that take longest."""
    return sorted(report[key], key=lambda record: -record["ns_per_step"])[:MOST]


def details(record: Record) -> str:
    """The op of a kernel or a layer, its shape, and what Nsight Compute counted in it."""
    dram, tensor = record.get("dram_bytes"), record.get("tensor_active")
    counted = [f"{show(dram, 'B')} of DRAM counted"] if dram is not None else []
    counted += [f"tensor cores {show(tensor, 'share')} active"] if tensor is not None else []
    op = record["op"] if record["op"] != record["name"] else ""
    return " · ".join(filter(None, (op, record["shape"], *counted)))


def kernels(report: Record, key: str = "kernels") -> Table:
    """The kernels, or with "layers" the convolutions' passes, the longest first."""
    records = longest_first(report, key)
    times, time_unit = _column(records, "ns_per_step", "ns")
    flops, flops_unit = _rates(records, "flops_per_s", "FLOP/s")
    moved, moved_unit = _rates(records, "bytes_per_s", "B/s")
    shares, _ = _column(records, "share", "share")
    fractions, _ = _column(records, "roof_fraction", "share")
    columns = {
        "kernel" if key == "kernels" else "layer and pass": [Cell(r["name"], details(r)) for r in records],
        f"time a step, {time_unit}": times,
        "share, %": _barred(shares, [r["share"] for r in records]),
        "calls a step": [_count(r["calls_per_step"]) for r in records],
        flops_unit: flops,
        moved_unit: moved,
        "bound": [r["bound"] or MISSING for r in records],
        "of roof, %": _barred(fractions, [r["roof_fraction"] for r in records], 1.0),
        "category": [r["category"] for r in records],
    }
    return _table(records, columns, {0, 6, 8}, omitted=len(report[key]) - len(records))


def roofs(report: Record) -> Table:
    """The bounds of every kernel of this device."""
    records = [*report["roofs"]["compute"], *report["roofs"]["bandwidth"]]
    rates = [show(record["value"], record["unit"]) for record in records]
    return _table(records, {"roof": [record["label"] for record in records], "rate": rates})


def floors(report: Record) -> Table:
    """The least time of the run, by passes over memory."""
    same = {"status": "modelled", "source": "each kernel takes the longer of its arithmetic and its bytes"}
    records = [floor | same for floor in report["floors"]]
    times, unit = _column(records, "ns", "ns")
    columns = {
        "implementation": [record["name"] for record in records],
        "passes": [_count(record["passes"]) for record in records],
        f"time, {unit}": _barred(times, [record["ns"] for record in records]),
        "what it does": [record["note"] for record in records],
    }
    return _table(records, columns, {0, 3})


def levers(report: Record) -> Table:
    """The factors between the article's 256 s and this run, and their product."""
    records = report["levers"]
    logs = [record["log"] for record in records]
    product = math.prod(record["factor"] for record in records)
    *shown, last = column([*logs, sum(logs)], "", 3)[0]
    columns = {
        "lever": [record["name"] for record in records],
        f"factor, {TIMES}": [significant(record["factor"]) for record in records],
        "logarithm": _barred(shown, logs),
    }
    end = ("256 s / this run", significant(product), last)
    return _table(records, columns, total=_total(end, "the product of the factors; logarithms add up", "modelled"))


def epochs(report: Record) -> Table:
    """The learning curve."""
    records = [row | {"status": "measured", "source": "the timed run's log.jsonl"} for row in report["epochs"]]
    columns = {"epoch": [_count(record["epoch"]) for record in records]}
    for name, (key, unit, digits) in {
        "learning rate": ("learning_rate", "", 4),
        "loss": ("train_loss", "", 4),
        "accuracy, %": ("train_accuracy", "share", 5),
        "test loss": ("test_loss", "", 4),
        "test accuracy, %": ("test_accuracy", "share", 5),
        "images/s": ("images_per_s", "", 4),
        "training so far, s": ("train_s", "", 4),
    }.items():
        columns[name], _ = _column(records, key, unit, digits)
    return _table(records, columns, ())


def unplaced(report: Record) -> str:
    """A sentence on the kernels without a place on a roofline and their share of the time; "" if there are none."""
    out = [row for row in report["kernels"] if not (row["intensity"] and row["flops_per_s"])]
    if not out:
        return ""
    share = show(sum(row["share"] for row in out), "share")
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
    """The gaps of the account, and each unavailable figure with its reason."""
    missing = [f"{tile.label}: {tile.source}" for tile in tiles(report) if tile.status == "unavailable"]
    return report["doubts"] + report["lacks"] + missing


def _table(
    records: Sequence[Record],
    columns: Mapping[str, Sequence[str | Cell]],
    texts: Iterable[int] = (0,),
    total: Row | None = None,
    omitted: int = 0,
) -> Table:
    """A row for each record, with its status and source, of the cells that `columns` has below each heading."""
    rows = []
    for record, *texts_or_cells in zip(records, *columns.values(), strict=True):
        cells = tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in texts_or_cells)
        rows.append(Row(cells, record["status"], record["source"], record.get("child", False)))
    return Table(tuple(columns), rows, frozenset(texts), total if rows else None, omitted)


def _shared(
    heading: str, records: Sequence[Record], total: float, name: str, source: str, status: str = "measured"
) -> Table:
    """Times and their shares of `total`, which stands below them as `name`."""
    times, unit = column([*(record["ns"] for record in records), total], "ns")
    columns = {heading: _names(records), f"time, {unit}": times[:-1], "share, %": _shares(records, total)}
    return _table(records, columns, total=_total((name, times[-1], ""), source, status))


def _total(cells: Iterable[str], source: str, status: str = "measured") -> Row:
    return Row(tuple(map(Cell, cells)), status, source)


def _names(records: Sequence[Record]) -> list[Cell]:
    return [Cell(record["name"], record.get("note") or "") for record in records]


def _shares(records: Sequence[Record], total: float) -> list[Cell]:
    if not total:
        return [Cell(MISSING)] * len(records)
    shares = [record["ns"] / total for record in records]
    return [Cell(column([share], "share")[0][0], bar=_length(share)) for share in shares]


def _column(
    records: Sequence[Record], key: str, unit: str, digits: int = 4, like: float | None = None
) -> tuple[list[str], str]:
    return column([record[key] for record in records], unit, digits, like)


def _rates(records: Sequence[Record], key: str, unit: str) -> tuple[list[str], str]:
    """In the unit that suits the longest kernel that has a rate."""
    return _column(records, key, unit, like=next((record[key] for record in records if record[key]), None))


def _barred(texts: Sequence[str], values: Sequence[float | None], whole: float | None = None) -> list[Cell]:
    """Each text with its value as a bar, relative to `whole` or to the largest; a value above `whole` is marked."""
    whole = whole or max((abs(value) for value in values if value is not None), default=0) or 1.0
    lengths = [None if value is None else value / whole for value in values]
    return [
        Cell(text, bar=_length(length), over=length is not None and length > 1.005)
        for text, length in zip(texts, lengths, strict=True)
    ]


def _length(share: float | None) -> float | None:
    """A bar's length; None for a negative value."""
    return None if share is None or share < 0 else min(share, 1.0)


def _count(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else significant(value)
