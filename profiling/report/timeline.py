"""The timeline: what the device's sensors reported under the run's phases, as a record, a chart and a table."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from profiling.device.nvml import GpuSample
from profiling.output.units import MISSING, SAME, plain, scale, show
from profiling.report.plot import Chart, axis, clip, colour, cut, layout, line, margin, trace
from profiling.report.tables import Cell, Record, Row, Table
from profiling.run.telemetry import Telemetry

FIELDS = {
    "sm_clock_mhz": ("SM clock", "MHz"),
    "memory_clock_mhz": ("memory clock", "MHz"),
    "power_w": ("power", "W"),
    "temperature_c": ("temperature", "°C"),
    "kernel_running": ("time in which some kernel ran", "share"),
    "sm_active": ("SMs active", "share"),
    "tensor_active": ("tensor cores active", "share"),
    "dram_active": ("memory bandwidth used", "share"),
}
"""Fields of `GpuSample` that are drawn -> (name, unit)."""

MOST_SAMPLES = 2000
"""Points that a chart needs; where there are more samples, neighbours are averaged."""


def timeline_record(phases: dict[str, Any] | None, telemetry: Telemetry) -> dict[str, Any]:
    """Seconds from the run's start; fields that no sample has are unavailable, with the reason."""
    start_ns = phases["start_ns"] if phases else (telemetry.samples[0].t_ns if telemetry.samples else 0)
    together = max(1, -(-len(telemetry.samples) // MOST_SAMPLES))
    groups = [telemetry.samples[i : i + together] for i in range(0, len(telemetry.samples), together)]
    drawn = {name: [_mean(group, name) for group in groups] for name in FIELDS}
    known = {name: values for name, values in drawn.items() if any(v is not None for v in values)}
    missing = {name: telemetry.unavailable.get(name, "no sample has it") for name in FIELDS if name not in known}
    return {
        "phases": [
            {"name": p["name"], "start_s": (p["start_ns"] - start_ns) / 1e9, "end_s": (p["end_ns"] - start_ns) / 1e9}
            for p in (phases or {"phases": []})["phases"]
        ],
        "samples": {"t_s": [(_mean(group, "t_ns") - start_ns) / 1e9 for group in groups], **known} if known else {},
        "fields": {name: {"label": FIELDS[name][0], "unit": FIELDS[name][1]} for name in known},
        "unavailable": missing,
        "reason": None if known else telemetry.reason or "there are no samples",
    }


def _mean(samples: list[GpuSample], field: str) -> float | None:
    """The mean of the samples that have the field: activity has fewer than the rest."""
    known = [value for s in samples if (value := getattr(s, field)) is not None]
    return sum(known) / len(known) if known else None


def timeline_chart(report: Record) -> Chart:
    """The sensors' series under the run's phases, one panel for each unit."""
    record = report["timeline"]
    samples, fields = record["samples"], record["fields"]
    times = [round(t, 4) for t in samples.get("t_s", ())]
    series: dict[str, list[tuple[str, list[Any]]]] = {}
    for key in fields:
        values = samples[key]
        if any(_is_number(value) for value in values):
            unit = SAME.get(fields[key]["unit"], fields[key]["unit"])
            series.setdefault(unit, []).append((fields[key]["label"], values))
    if not series:
        return Chart("timeline", "Timeline", reason=record["reason"])
    data: list[dict[str, Any]] = []
    axes: dict[str, Any] = {}
    panel = 1 / len(series)
    for i, (unit, members) in enumerate(series.items()):
        number_of = "" if i == 0 else str(i + 1)
        top = 1 - i * panel
        largest = max(abs(v) for _, values in members for v in values if _is_number(v))
        factor, shown_unit = scale(largest, unit)
        axes[f"yaxis{number_of}"] = axis(
            clip(shown_unit, 12),
            domain=[top - panel * 0.7, top],
            rangemode="normal" if unit == "°C" else "tozero",
            nticks=5,
        )
        axes[f"legend{number_of}"] = {"orientation": "h", "x": 0, "y": top, "yanchor": "bottom", "font": {"size": 11}}
        for j, (label, values) in enumerate(members):
            data.append(
                trace(
                    "scatter",
                    x=times,
                    y=[float(f"{v * factor:.5g}") if _is_number(v) else None for v in values],
                    mode="lines",
                    name=clip(label, 40),
                    line=line(f"series-{j % 4 + 1}", 1.4),
                    yaxis=f"y{number_of}",
                    legend=f"legend{number_of}",
                    showlegend=True,
                    hovertemplate=f"{clip(label, 40)} %{{y:.4~g}} {clip(shown_unit, 12)}, measured<extra></extra>",
                )
            )
    last = axes[f"yaxis{len(series)}" if len(series) > 1 else "yaxis"]
    last["domain"] = [0.0, last["domain"][1]]
    shapes, wide, few = _shades(record["phases"])
    whole = layout(
        xaxis=axis("seconds since the process began", anchor=f"y{len(series)}" if len(series) > 1 else "y"),
        **axes,
        hovermode="x",
        hoversubplots="axis",
        shapes=shapes,
        annotations=wide,
        margin=margin(left=56, top=44),
    )
    narrow = {"annotations": few}
    return Chart("timeline", "Timeline", 130 * len(series) + 90, data, whole, narrow, says=_says(series))


def _says(series: Mapping[str, Sequence[tuple[str, Sequence[Any]]]]) -> str:
    ranges = []
    for unit, members in series.items():
        for label, values in members:
            known = [v for v in values if _is_number(v)]
            ranges.append(cut(f"{cut(label, 40)} {show(min(known), unit)} to {show(max(known), unit)}", 80))
    return f"Curves of the sensors over the run: {', '.join(ranges)}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _shades(phases: Sequence[Record]) -> tuple[list[dict], list[dict], list[dict]]:
    """A shade for each stretch of training; the names of the phases with room for them, on a page and on a phone."""
    span = max((p["end_s"] for p in phases), default=0.0) or 1.0
    behind = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below", "line": {"width": 0}}
    shapes = [
        {**behind, "x0": p["start_s"], "x1": p["end_s"], "fillcolor": colour("shade")}
        for p in phases
        if p["name"] == "training"
    ]
    wide: list[dict] = []
    narrow: list[dict] = []
    for start, end, name in _stretches(phases):
        place = {"x": (start + end) / 2, "y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 24, "showarrow": False}
        for labels, width_px in ((wide, 900), (narrow, 290)):
            letters = int(width_px * (end - start) / span / 6.5)
            if letters >= min(len(name), 6):
                labels.append({**place, "text": clip(name, letters), "font": {"size": 11, "color": colour("soft")}})
    return shapes, wide, narrow


def _stretches(phases: Sequence[Record]) -> list[tuple[float, float, str]]:
    """(start, end, name) of each phase; the epochs, in which training alternates with others, are one."""
    of_training = [i for i, phase in enumerate(phases) if phase["name"] == "training"]
    first, last = (of_training[0], of_training[-1]) if of_training else (len(phases), len(phases))
    alone = [(p["start_s"], p["end_s"], p["name"]) for p in [*phases[:first], *phases[last + 1 :]]]
    epochs = phases[first : last + 1]
    if not epochs:
        return alone
    names = dict.fromkeys(phase["name"] for phase in epochs)
    return [*alone, (epochs[0]["start_s"], epochs[-1]["end_s"], ", ".join(names))]


def telemetry_table(report: Record) -> Table:
    """The sensors' ranges during training, or during the whole run where its phases are not known.

    It has no rows where one reason explains the lack of all of them.
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
    """Whether the sample of an index was taken in a phase called training; True without such a phase."""
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
