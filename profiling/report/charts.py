"""The report's charts: the waterfalls, the learning curve, and the list of all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from profiling.output.units import column, show
from profiling.report.plot import PAINT, Chart, axis, clip, colour, cut, escape, layout, line, margin, trace
from profiling.report.roofline_chart import roofline
from profiling.report.tables import Record, provenance
from profiling.report.timeline import timeline_chart

TARGET_ACCURACY = 0.94


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

    A negative term goes back. One that this run does not have leaves its row empty.
    `beside` another one, which names the rows, it names them only on a phone.
    """
    if not terms:
        return Chart(key, title, reason="no term of this account is known")
    of_key = {term["key"]: term for term in terms}
    total = sum(term["ns"] for term in terms)
    names, bars, end = [], [], 0.0
    for row_key, name in order.items():
        term = of_key.get(row_key)
        ns = term["ns"] if term else None
        names.append(term["name"] if term else name)
        bars.append((end, ns, PAINT.get(row_key, "other"), _of_term(term, total) if term else "not told apart here"))
        end += ns or 0
    bars.append((0.0, total, "total", f"<b>{escape(title)}</b><br>{show(total, 'ns')}"))
    labels, _ = column([ns for _, ns, _, _ in bars], "ns")
    seconds = [(ns or 0) / 1e9 for _, ns, _, _ in bars]
    starts = [start / 1e9 for start, _, _, _ in bars]
    ends = [max(start, start + length) for start, length in zip(starts, seconds, strict=True)]
    positions = list(range(len(bars)))
    steps_x: list[float | None] = []
    steps_y: list[float | None] = []
    for i in positions[:-1]:
        reached = starts[i] + seconds[i]
        steps_x += [reached, reached, None]
        steps_y += [i - 0.36, i + 1.36, None]
    data = [
        trace("scatter", x=steps_x, y=steps_y, mode="lines", line=line("rule", 1), hoverinfo="skip"),
        trace(
            "bar",
            x=seconds,
            y=positions,
            base=starts,
            orientation="h",
            width=0.72,
            marker={
                "color": [colour(f"term-{paint}") for _, _, paint, _ in bars],
                "pattern": {
                    "shape": ["/" if second < 0 else "" for second in seconds],
                    "fgcolor": colour("paper"),
                    "size": 6,
                },
            },
            hovertext=[hover for _, _, _, hover in bars],
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
    rows_axis = {
        "range": [len(bars) - 0.4, -0.6],
        "tickvals": positions,
        "ticktext": [*(escape(name, 22, 44) for name in names), "<b>sum</b>"],
        "automargin": True,
        "ticks": "",
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
        "tickfont": {"color": colour("ink"), "size": 10},
    }
    low, high = min(0.0, *starts, *ends), max(*ends, 1e-9)
    seconds_axis = axis("seconds", range=[low, high + 0.16 * (high - low)], fixedrange=True, nticks=6)
    roomy = axis("seconds", range=[low, high + 0.34 * (high - low)], fixedrange=True, nticks=4)
    longer = {"ticktext": [*(clip(name, 40) for name in names), "<b>sum</b>"], "showticklabels": not beside}
    longer["tickfont"] = {"color": colour("ink"), "size": 12}
    whole = layout(
        xaxis=seconds_axis, yaxis=rows_axis | longer, hovermode="y", bargap=0, margin=margin(left=10, right=4)
    )
    narrow = {"xaxis": roomy, "yaxis": rows_axis, "height": 30 * len(bars) + 56}  # a name may be two lines there
    largest = sorted(terms, key=lambda term: -abs(term["ns"]))[:3]
    parts = "; ".join(f"{cut(term['name'], 60)} {show(term['ns'], 'ns')}" for term in largest)
    says = f"Waterfall of {cut(title, 60)}, {show(total, 'ns')}; its largest terms are {parts}."
    return Chart(key, title, 24 * len(bars) + 56, data, whole, narrow, says=says)


def difference(compared: Record) -> Chart:
    """From run A's training to run B's by what each term gained or lost; see `profiling.report.compare.compare`."""
    first, last = compared["names"]
    start = {"key": "a", "name": first, "ns": compared["a_ns"], "status": "measured", "source": "run A"}
    gained = [
        {"key": row["key"], "name": row["name"], "ns": row["difference_ns"], "source": "B less A"}
        for row in compared["terms"]
    ]
    order = {term["key"]: term["name"] for term in [start, *gained]}
    return replace(waterfall("difference", last, [start, *gained], order), says=f"Waterfall: {compared['sentence']}")


def learning_curve(report: Record, key: str, names: dict[str, str]) -> Chart:
    """What the log says under the keys of `names`, over epochs; an accuracy in per cent."""
    log, of_share = report["epochs"], key == "accuracy"
    scale = 100 if of_share else 1
    data, said = [], []
    for (field, name), paint in zip(names.items(), ("series-2", "series-1"), strict=True):
        known = [row for row in log if row.get(field) is not None]
        if known:
            x, values = [row["epoch"] for row in known], [row[field] for row in known]
            style = {"line": line(paint, 2), "mode": "lines+markers", "marker": {"size": 4}}
            hover = [
                f"epoch {e}, {name}: {show(v, 'share' if of_share else '', 4)}" for e, v in zip(x, values, strict=True)
            ]
            y = [scale * value for value in values]
            said += dict.fromkeys((hover[0], hover[-1]))
            data.append(
                trace("scatter", x=x, y=y, name=name, showlegend=True, hovertext=hover, hoverinfo="text", **style)
            )
    if not data:
        return Chart(key, key, reason="no epoch was logged")
    shapes = []
    if of_share and max(max(curve["y"]) for curve in data) > scale * (TARGET_ACCURACY - 0.1):
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": scale * TARGET_ACCURACY, "y1": scale * TARGET_ACCURACY}
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
    ns = term["ns"]
    time = f"{show(ns, 'ns')}, {show(ns / total if total else None, 'share')} of all"
    pieces = [f"{escape(p['name'])}: {show(p['ns'], 'ns')}" for p in term.get("parts", ())]
    source = escape(provenance(term.get("status") or "", term.get("source") or ""))
    lines = [f"<b>{escape(term['name'])}</b>", time, *pieces, escape(term.get("note") or ""), f"<i>{source}</i>"]
    return "<br>".join(filter(None, lines))
