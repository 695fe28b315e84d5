"""The report's charts: the waterfalls, the learning curve, and the list of all."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from profiling.output.numbers import TARGET_ACCURACY
from profiling.output.units import column, show
from profiling.report.plot import PAINT, Chart, axis, clip, colour, cut, escape, layout, line, margin, trace
from profiling.report.roofline_chart import roofline
from profiling.report.tables import Record, provenance
from profiling.report.timeline import timeline_chart


def charts(report: Record) -> list[Chart]:
    """All charts of a report, in the page's order."""
    ours, theirs = report["terms"], report["article"]["terms"]
    names = {term["key"]: term["name"] for term in [*theirs, *ours]}
    order = {term["key"]: names[term["key"]] for term in [*ours, *theirs]}
    return [
        waterfall("waterfall", "this run", ours, order),
        waterfall("article", report["article"]["title"], theirs, order, beside=True),
        roofline(report),
        timeline_chart(report),
        learning_curve(report, "loss", {"train_loss": "training", "test_loss": "test"}),
        learning_curve(report, "accuracy", {"train_accuracy": "training", "test_accuracy": "test"}),
    ]


def waterfall(key: str, title: str, terms: Sequence[Record], order: Mapping[str, str], beside: bool = False) -> Chart:
    """Terms as bars, each from where the one before ended, and their sum. A row for each key of `order`, and its name.

    A negative term goes back. A term that this run does not have leaves its row empty. `beside` another chart, which
    names the rows, it names them only on a phone.
    """
    if not terms:
        return Chart(key, title, reason="no term of this account is known")
    of_key = {term["key"]: term for term in terms}
    rows = [of_key.get(row, {"key": row, "name": name}) for row, name in order.items()]
    values = [row.get("ns", 0) for row in rows]
    *reached, total = itertools.accumulate(values, initial=0)
    lengths = [ns / 1e9 for ns in (*values, total)]
    starts = [ns / 1e9 for ns in (*reached, 0)]
    ends = [start + max(length, 0) for start, length in zip(starts, lengths, strict=True)]
    positions = list(range(len(lengths)))
    paints = [PAINT.get(row["key"], "other") for row in rows] + ["total"]
    labels, _ = column([*(row.get("ns") for row in rows), total], "ns")
    hovers = [_of_term(row, total) if "ns" in row else "not told apart here" for row in rows]
    steps_x = [x for ns in (*reached[1:], total) for x in (ns / 1e9, ns / 1e9, None)]
    steps_y = [y for i in range(len(rows)) for y in (i - 0.36, i + 1.36, None)]
    pattern = {"shape": ["/" if s < 0 else "" for s in lengths], "fgcolor": colour("paper"), "size": 6}
    data = [
        trace("scatter", x=steps_x, y=steps_y, mode="lines", line=line("rule", 1), hoverinfo="skip"),
        trace(
            "bar",
            x=lengths,
            y=positions,
            base=starts,
            orientation="h",
            width=0.72,
            marker={"color": [colour(f"term-{paint}") for paint in paints], "pattern": pattern},
            hovertext=[*hovers, f"<b>{escape(title)}</b><br>{show(total, 'ns')}"],
            hoverinfo="text",
        ),
        trace(
            "scatter",
            x=ends,
            y=positions,
            mode="text",
            text=[f" {label}" for label in labels],
            textposition="middle right",
            textfont={"color": colour("ink"), "size": 12},
            cliponaxis=False,
            hoverinfo="skip",
        ),
    ]
    names = [row["name"] for row in rows]
    rows_axis = {
        "range": [len(positions) - 0.4, -0.6],
        "tickvals": positions,
        "ticktext": [*(escape(name, 22, 44) for name in names), "<b>sum</b>"],
        "automargin": True,
        "ticks": "",
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
        "tickfont": {"color": colour("ink"), "size": 10},
    }
    longer = {
        "ticktext": [*(clip(name, 40) for name in names), "<b>sum</b>"],
        "showticklabels": not beside,
        "tickfont": {"color": colour("ink"), "size": 12},
    }
    low, high = min(0.0, *starts), max(*ends, 1e-9)
    seconds, roomy = (
        axis("seconds", range=[low, high + room * (high - low)], fixedrange=True, nticks=ticks)
        for room, ticks in ((0.16, 6), (0.34, 4))
    )
    whole = layout(xaxis=seconds, yaxis=rows_axis | longer, hovermode="y", bargap=0, margin=margin(left=10, right=4))
    narrow = {"xaxis": roomy, "yaxis": rows_axis, "height": 30 * len(positions) + 56}  # a name may be two lines there
    largest = sorted(terms, key=lambda term: -abs(term["ns"]))[:3]
    parts = "; ".join(f"{cut(term['name'], 60)} {show(term['ns'], 'ns')}" for term in largest)
    says = f"Waterfall of {cut(title, 60)}, {show(total, 'ns')}; its largest terms are {parts}."
    return Chart(key, title, 24 * len(positions) + 56, data, whole, narrow, says=says)


def difference(compared: Record) -> Chart:
    """From run A's training to run B's by what each term gained or lost; see `profiling.report.compare.compare`."""
    first, last = compared["names"]
    gained = [
        {"key": row["key"], "name": row["name"], "ns": row["difference_ns"], "status": "", "source": "B less A"}
        for row in compared["terms"]
    ]
    start = {"key": "a", "name": first, "ns": compared["a_ns"], "status": "measured", "source": "run A"}
    order = {term["key"]: term["name"] for term in [start, *gained]}
    return replace(waterfall("difference", last, [start, *gained], order), says=f"Waterfall: {compared['sentence']}")


def learning_curve(report: Record, key: str, names: dict[str, str]) -> Chart:
    """The log's values under the keys of `names`, over epochs; an accuracy in per cent."""
    log, of_share = report["epochs"], key == "accuracy"
    scale = 100 if of_share else 1
    data, said = [], []
    for (field, name), paint in zip(names.items(), ("series-2", "series-1"), strict=True):
        known = [(row["epoch"], row[field]) for row in log if row[field] is not None]
        if known:
            hover = [f"epoch {epoch}, {name}: {show(value, 'share' if of_share else '', 4)}" for epoch, value in known]
            said += dict.fromkeys((hover[0], hover[-1]))
            data.append(
                trace(
                    "scatter",
                    x=[epoch for epoch, _ in known],
                    y=[scale * value for _, value in known],
                    name=name,
                    showlegend=True,
                    hovertext=hover,
                    hoverinfo="text",
                    line=line(paint, 2),
                    mode="lines+markers",
                    marker={"size": 4},
                )
            )
    if not data:
        return Chart(key, key, reason="no epoch was logged")
    shapes = []
    target = scale * TARGET_ACCURACY
    if of_share and max(max(curve["y"]) for curve in data) > target - 10:
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": target, "y1": target}
        shapes = [{"type": "line", **ends, "line": line("faint", 1, "dot")}]
    whole = layout(
        xaxis=axis("epoch", tick0=0, dtick=max(1, 5 * round(len(log) / 35)), tickformat="d"),
        # with as many digits as tell its ticks apart, which a format of our own would cut
        yaxis=axis("", ticksuffix=" %" if of_share else "", exponentformat="none", nticks=6, automargin=True),
        hovermode="x",
        shapes=shapes,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin=margin(left=56, top=30),
    )
    return Chart(key, key, 280, data, whole, says=f"Curve of the {key}: {'; '.join(said)}.")


def _of_term(term: Record, total: float) -> str:
    time = f"{show(term['ns'], 'ns')}, {show(term['ns'] / total if total else None, 'share')} of all"
    pieces = [f"{escape(p['name'])}: {show(p['ns'], 'ns')}" for p in term.get("parts", ())]
    source = escape(provenance(term["status"], term["source"]))
    lines = [f"<b>{escape(term['name'])}</b>", time, *pieces, escape(term.get("note") or ""), f"<i>{source}</i>"]
    return "<br>".join(filter(None, lines))
