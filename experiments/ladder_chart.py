"""The ladder's charts: a bar for each rung, and one for what each step changes, beside the article's."""

import statistics
from typing import Any

from experiments.study.folder import Plot
from profiling.report.plot import Chart, axis, clip, colour, escape, layout, margin, trace

Row = dict[str, Any]


def plots(ladder: Row) -> list[Plot]:
    """The time of each rung, and what each step changes, beside the article's."""
    able, device = [rung for rung in ladder["rungs"] if rung["reason"] is None], ladder["device"]
    times = Chart("ladder", "time of each rung", reason="no rung can run here")
    if able:
        first = able[0]["article_s"]
        times = _bars(
            "ladder",
            [rung["name"] for rung in able],
            [rung["percent_of_first"] for rung in able],
            [100 * rung["article_s"] / first if first and rung["article_s"] else None for rung in able],
            f"training and validation, % of {able[0]['name']}",
            [f"{rung['seconds_35_epochs']['median']:,.0f} s" for rung in able],
            device,
        )
    changes = Chart("steps", "what each step changes", reason="there are no two rungs to compare")
    if ladder["steps"]:
        changes = _bars(
            "steps",
            [step["to"] for step in ladder["steps"]],
            [step["percent"] for step in ladder["steps"]],
            [step["article_percent"] for step in ladder["steps"]],
            "change in the time of training and validation, % (negative is faster)",
            [step["verdict"] for step in ladder["steps"]],
            device,
        )
    return [
        Plot(
            "ladder",
            "The ladder",
            times,
            f"Bars: {device}, with the 95 % interval of the median over the turns; beside them the seconds for 35 "
            "epochs, extrapolated. Diamonds: the article's V100 (quoted).",
        ),
        Plot(
            "steps",
            "What each step changes",
            changes,
            "Against the rung before, turn by turn, with the 95 % interval of the median. Left of zero is faster. "
            "Diamonds: what the article credits it with (quoted).",
        ),
    ]


def _bars(
    key: str,
    names: list[str],
    spread: list[Row],
    quoted: list[float | None],
    title: str,
    labels: list[str],
    device: str,
) -> Chart:
    """Horizontal bars of `device` with intervals, the article's as diamonds, and a word behind each."""
    places, middles = list(range(len(names))), [s["median"] for s in spread]
    above = [s["high"] - s["median"] for s in spread]
    below = [s["median"] - s["low"] for s in spread]
    ends = [max(0.0, s["high"], q or 0.0) for s, q in zip(spread, quoted, strict=True)]
    low = min(0.0, *(s["low"] for s in spread), *(q for q in quoted if q is not None))
    beside = 0.015 * (max(ends) - low)  # of a diamond, which is wider than a bar's end
    ends = [end + beside * (q is not None and q >= end) for end, q in zip(ends, quoted, strict=True)]
    room = max(statistics.fmean([max(ends), -low]), 1e-9)
    errors = {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": colour("ink"),
        "thickness": 1.2,
        "width": 3,
    }
    data = [
        trace(
            "bar",
            x=middles,
            y=places,
            orientation="h",
            width=0.62,
            name=f"{clip(device, 48)} (measured)",
            showlegend=True,
            marker={"color": colour("term-convolution")},
            error_x=errors,
            hovertext=[f"{escape(n)}: {m:.3g}" for n, m in zip(names, middles, strict=True)],
            hoverinfo="text",
        ),
        trace(
            "scatter",
            x=quoted,
            y=places,
            mode="markers",
            name="the article's V100 (quoted)",
            showlegend=True,
            marker={"color": colour("series-2"), "symbol": "diamond", "size": 10},
            hoverinfo="x",
        ),
        trace(
            "scatter",
            x=ends,
            y=places,
            mode="text",
            text=[f"  {clip(label, 24)}" for label in labels],
            textposition="middle right",
            textfont={"color": colour("soft"), "size": 12},
            cliponaxis=False,
            hoverinfo="skip",
        ),
    ]
    rows = {
        "range": [len(names) - 0.4, -0.6],
        "tickvals": places,
        "ticktext": [clip(name, 24) for name in names],
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
        "tickfont": {"color": colour("ink"), "size": 12},
    }
    across = axis(title, range=[1.05 * low, max(ends) + 0.45 * room], fixedrange=True, nticks=8)
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    whole = layout(xaxis=across, yaxis=rows, hovermode="closest", legend=legend, margin=margin(left=10, top=30))
    return Chart(key, title, 34 * len(names) + 90, data, whole)
