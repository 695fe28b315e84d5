"""The timeline: the device's sensors under the run's phases, as a chart and a table."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from profiling.account.timeline import FIELDS
from profiling.output.units import MISSING, scale, show
from profiling.report.plot import Chart, axis, clip, colour, cut, layout, line, margin, trace
from profiling.report.tables import Cell, Record, Row, Table

GAP = 5
"""Usual distances between a series' samples from which on a distance is a gap in its curve."""


def timeline_chart(report: Record) -> Chart:
    """The sensors' series under the run's phases, one panel for each unit."""
    record = report["timeline"]
    if record["reason"]:
        return Chart("timeline", "Timeline", reason=record["reason"])
    samples = record["samples"]
    panels: dict[str, list[tuple[str, list[float | None]]]] = {}
    for key, field in record["fields"].items():
        panels.setdefault(field["unit"], []).append((field["label"], samples[key]))
    data: list[dict[str, Any]] = []
    axes: dict[str, Any] = {}
    ranges: list[str] = []
    height = 1 / len(panels)
    for i, (unit, members) in enumerate(panels.items()):
        number = "" if i == 0 else str(i + 1)
        top = 1 - i * height
        known = [[value for value in values if value is not None] for _, values in members]
        factor, shown_unit = scale(max(abs(value) for values in known for value in values), unit)
        axes[f"yaxis{number}"] = axis(
            clip(shown_unit, 12),
            domain=[0.0 if i + 1 == len(panels) else top - height * 0.66, top],
            rangemode="normal" if unit == "°C" else "tozero",
            nticks=5,
        )
        axes[f"legend{number}"] = {"orientation": "h", "x": 0, "y": top, "yanchor": "bottom", "font": {"size": 10}}
        for j, ((label, values), seen) in enumerate(zip(members, known, strict=True)):
            ranges.append(cut(f"{cut(label, 40)} {show(min(seen), unit)} to {show(max(seen), unit)}", 80))
            x, y = _curve(samples["t_s"], values)
            data.append(
                trace(
                    "scatter",
                    x=x,
                    y=[None if v is None else float(f"{v * factor:.5g}") for v in y],
                    mode="lines",
                    name=clip(label, 40),
                    line=line(f"series-{j % 4 + 1}", 1.4),
                    yaxis=f"y{number}",
                    legend=f"legend{number}",
                    showlegend=True,
                    hovertemplate=f"{clip(label, 40)} %{{y:.4~g}} {clip(shown_unit, 12)}, measured<extra></extra>",
                )
            )
    shapes, wide, few = _shades(record["phases"])
    whole = layout(
        xaxis=axis("seconds since the process began", anchor=f"y{number}"),
        **axes,
        hovermode="x",
        hoversubplots="axis",
        shapes=shapes,
        annotations=wide,
        margin=margin(left=56, top=44),
    )
    says = f"Curves of the sensors over the run: {', '.join(ranges)}."
    two = {"entrywidth": 0.45, "entrywidthmode": "fraction"}  # a row, or they would lie on the panel above
    narrow = {"annotations": few} | {key: axes[key] | two for key in axes if key.startswith("legend")}
    return Chart("timeline", "Timeline", 130 * len(panels) + 90, data, whole, narrow, says=says)


def _curve(times: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """The samples that have a value: activity is sampled at a slower pace than the rest. A long gap stays a gap."""
    known = [(round(t, 4), value) for t, value in zip(times, values, strict=True) if value is not None]
    usual = statistics.median(b - a for (a, _), (b, _) in pairwise(known)) if len(known) > 1 else 0.0
    drawn: list[tuple[float, float | None]] = known[:1]
    for (before, _), (t, value) in pairwise(known):
        drawn += [(t, None), (t, value)] if t - before > GAP * usual else [(t, value)]
    return [t for t, _ in drawn], [value for _, value in drawn]


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
    samples = timeline["samples"]
    windows = [(p["start_s"], p["end_s"]) for p in timeline["phases"] if p["name"] == "training"]
    times = enumerate(samples["t_s"])
    inside = [i for i, t in times if not windows or any(start <= t <= end for start, end in windows)]
    lines = []
    for key, field in timeline["fields"].items():
        known = [samples[key][i] for i in inside if samples[key][i] is not None]
        three = [show(of(known), field["unit"]) for of in (min, statistics.median, max)] if known else [MISSING] * 3
        status, source = ("measured", f"{len(known)} samples of the driver") if known else ("unavailable", "no sample")
        lines.append(Row(tuple(map(Cell, (field["label"], *three))), status, source))
    for key, reason in timeline["unavailable"].items():
        lines.append(Row(tuple(map(Cell, (FIELDS[key][0], *[MISSING] * 3))), "unavailable", reason))
    return Table(("sensor", "lowest", "median", "highest"), lines)
