"""What a reproduction has come to: its table, its picture, its sentences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.study import Plot, Table
from profiling.plot import Chart, axis, clip, colour, escape, layout, margin, trace
from profiling.records import read_json

Row = dict[str, Any]
DONE, FAILED, LATE, LEFT, UNAVAILABLE = "done", "failed", "out of time", "left", "unavailable"
PAINTS = {DONE: "term-convolution", FAILED: "warn", LATE: "series-2", LEFT: "series-4"}


def sentences(rows: Sequence[Row], device: str) -> list[str]:
    """What was done and what it found, what is left, what cannot be had here."""
    of = {status: [row for row in rows if row["status"] == status] for status in (*PAINTS, UNAVAILABLE)}
    possible = len(rows) - len(of[UNAVAILABLE])
    spent_s = sum(row["seconds"] or 0.0 for row in rows)
    said = [f"On {device} {len(of[DONE])} of {possible} steps are done, in {spent_s / 60:.0f} min."]
    said += [f"{row['name']}: {row['found'].rstrip('.')}." for row in of[DONE] if row["found"]]
    for status, words in ((FAILED, "Failed"), (LATE, "Out of time"), (LEFT, "Not begun")):
        if of[status]:
            named = [f"{r['name']} ({r['found'].rstrip('.')})" if r["found"] else r["name"] for r in of[status]]
            said.append(f"{words}: {'; '.join(named)}.")
    for reason in dict.fromkeys(row["found"] for row in of[UNAVAILABLE]):
        named = ", ".join(row["name"] for row in of[UNAVAILABLE] if row["found"] == reason)
        said.append(f"Unavailable here, {named}: {reason}.")
    return said


def table(rows: Sequence[Row]) -> Table:
    """A row for each step."""
    cells = [[r["name"], r["status"], "" if r["seconds"] is None else f"{r['seconds']:.0f}", r["found"]] for r in rows]
    return Table("The steps", ["step", "status", "s", "found"], cells, ["", "", "measured", ""])


def plot(rows: Sequence[Row]) -> Plot:
    """The seconds of each step that was begun, in their order."""
    begun = [row for row in rows if row["seconds"] is not None]
    if not begun:
        return Plot("seconds", "Where the budget went", Chart("seconds", "seconds", reason="no step was begun"))
    places = list(range(len(begun)))
    bars = trace(
        "bar",
        x=[row["seconds"] for row in begun],
        y=places,
        orientation="h",
        width=0.62,
        marker={"color": [colour(PAINTS[row["status"]]) for row in begun]},
        hovertext=[escape(f"{row['name']}: {row['seconds']:.0f} s, {row['status']}") for row in begun],
        hoverinfo="text",
    )
    names = [clip(row["name"] if row["status"] == DONE else f"{row['name']}, {row['status']}", 32) for row in begun]
    rows_axis = {
        "range": [len(begun) - 0.4, -0.6],
        "tickvals": places,
        "ticktext": names,
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
    }
    whole = layout(
        xaxis=axis("seconds", rangemode="tozero", fixedrange=True),
        yaxis=rows_axis,
        hovermode="closest",
        margin=margin(left=10),
    )
    chart = Chart("seconds", "seconds of each step", 26 * len(begun) + 70, [bars], whole)
    return Plot("seconds", "Where the budget went", chart)


def data_identity(out: Path) -> str | None:
    """Of the images that the runs in `out` were trained on; None where none has come so far."""
    for path in sorted(out.glob("*/summary.json")) + sorted(out.glob("*/run-*/summary.json")):
        try:
            identity = read_json(path).get("data_identity")
        except (OSError, ValueError, AttributeError):
            continue
        if identity:
            return str(identity)
    return None
