"""The timeline: what the device's sensors said under the run's phases."""

from collections.abc import Mapping, Sequence
from typing import Any

from profiling.output.units import SAME, scale, show
from profiling.report.plot import Chart, axis, clip, colour, cut, layout, line, margin, trace
from profiling.report.tables import Record

SAMPLES = 400
"""Buckets of a series of samples, in each of which the lowest and the highest are drawn."""


def timeline(report: Record) -> Chart:
    """The sensors' series under the run's phases, one panel for each unit."""
    record = report["timeline"]
    samples, fields = record["samples"], record["fields"]
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
            x, y = thin(samples["t_s"], values)
            data.append(
                trace(
                    "scatter",
                    x=x,
                    y=[None if v is None else float(f"{v * factor:.5g}") for v in y],
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


def thin(times: Sequence[Any], values: Sequence[Any], buckets: int = SAMPLES) -> tuple[list[float], list[Any]]:
    """At most two samples of each bucket, the lowest and the highest, in their order; None where there is none."""
    pairs = [(t, v if _is_number(v) else None) for t, v in zip(times, values, strict=True)]
    if len(pairs) <= 2 * buckets:
        kept = pairs
    else:
        kept = []
        for i in range(buckets):
            inside = pairs[i * len(pairs) // buckets : (i + 1) * len(pairs) // buckets]
            known = [pair for pair in inside if pair[1] is not None]
            low_high = {min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])} if known else inside[:1]
            kept += sorted(low_high)
    return [round(t, 4) for t, _ in kept], [v for _, v in kept]


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
