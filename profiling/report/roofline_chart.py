"""The roofline: how fast kernels and layers were, below how fast the device could have let them be."""

import math
from typing import Any, NamedTuple

from profiling.output.units import show
from profiling.report.plot import CLEAR, PAINT, Chart, axis, clip, colour, cut, escape, layout, line, margin, trace
from profiling.report.tables import Record, details, longest_first, provenance

LARGEST_POINT_PX = 32


class Roof(NamedTuple):
    """A compute roof and the best bandwidth known in the same way; `said` is their provenance as markup."""

    flops_per_s: float
    bytes_per_s: float
    status: str
    said: str


def roofline(report: Record) -> Chart:
    """FLOP/s over FLOPs per byte, both logarithmic, below what was measured and what the data sheet says.

    Kernels and layers with FLOPs and bytes are points; their area is the time that they take. The FLOPs of a ring are
    modelled, a few for each element. A cross is a kernel by the bytes that the hardware counted.
    """
    groups = {key: [row for row in longest_first(report, key) if _placed(row)] for key in ("kernels", "layers")}
    shown = tuple(group for group, members in groups.items() if members)
    points = [row for group in shown for row in groups[group]]
    roofs = _roofs(report["roofs"])
    if not points and not roofs:
        return Chart("roofline", "Roofline", reason="no kernel with known FLOPs and bytes, and no roof")
    longest = max((row["ns_per_step"] for row in points), default=0) or 1
    data = []
    for group in shown:
        for category in dict.fromkeys(row["category"] for row in groups[group]):
            inside = [row for row in groups[group] if row["category"] == category]
            marker = {
                "size": [row["ns_per_step"] for row in inside],
                "sizemode": "area",
                "sizeref": 2 * longest / LARGEST_POINT_PX**2,
                "sizemin": 3,
                "color": colour(f"term-{PAINT.get(category, 'other')}"),
                "opacity": 0.72,
                "symbol": [_symbol(row, group) for row in inside],
                "line": {"color": colour("paper"), "width": [2 if row["per_element"] else 1 for row in inside]},
            }
            data.append(_points(inside, group, group == shown[0], clip(category, 30), marker))
    counted = [row | {"intensity": row["flops"] / row["dram_bytes"]} for row in groups["kernels"] if row["dram_bytes"]]
    if counted:
        marker = {"size": 8, "symbol": "x-thin", "line": {"color": colour("ink"), "width": 1.4}}
        data.append(_points(counted, "kernels", True, "by counted bytes", marker, "bytes: counted by Nsight Compute"))
    x = [value for points in data for value in points["x"]] + [roof.flops_per_s / roof.bytes_per_s for roof in roofs]
    y = [value for points in data for value in points["y"]] + [roof.flops_per_s for roof in roofs]
    left, right = min(x) / 3, max(x) * 8
    bottom, top = min([*y, *(left * roof.bytes_per_s for roof in roofs)]) / 2, max(y) * 4
    whole = layout(
        xaxis=axis("FLOP per byte", type="log", range=[math.log10(left), math.log10(right)], tickformat="~g", dtick=1),
        yaxis=axis("FLOP/s", type="log", range=[math.log10(bottom), math.log10(top)], tickformat="~s", dtick=1),
        hovermode="closest",
        annotations=_roof_labels(roofs, left),
        # inside, at the foot of the compute roof: no kernel that does well is there
        legend={"x": 1, "xanchor": "right", "y": 0, "yanchor": "bottom", "itemsizing": "constant", "bgcolor": CLEAR},
        margin=margin(left=56),
    )
    # on a phone the slope has no room for its label, which the tables and the tips have too
    narrow = {"annotations": whole["annotations"][:1]}
    says = _says(groups[shown[0]] if shown else [], roofs)
    data = [*(_roof(roof, left, right) for roof in roofs), *data]
    return Chart("roofline", "Roofline", 480, data, whole, narrow, shown, says=says)


def _says(points: list[Record], roofs: list[Roof]) -> str:
    below = "no known roof"
    if roofs:
        below = f"{show(roofs[0].flops_per_s, 'FLOP/s')} and {show(roofs[0].bytes_per_s, 'B/s')}"
    said = f"Roofline: FLOP/s over FLOP per byte, below {below}"
    if not points:
        return f"{said}."
    row = max(points, key=lambda row: row["ns_per_step"])
    at = f"{show(row['flops_per_s'], 'FLOP/s')} at {show(row['intensity'], 'FLOP/B')}"
    of_roof = "" if row["roof_fraction"] is None else f", {show(row['roof_fraction'], 'share')} of its roof"
    return f"{said}; the longest, {cut(row['name'], 60)}, reached {at}{of_roof}."


def _placed(row: Record) -> bool:
    """Whether it has a place on logarithmic axes."""
    return (row["intensity"] or 0) > 0 and (row["flops_per_s"] or 0) > 0


def _points(
    rows: list[Record], group: str, visible: bool, name: str, marker: dict[str, Any], note: str = ""
) -> dict[str, Any]:
    return trace(
        "scatter",
        x=[row["intensity"] for row in rows],
        y=[row["flops_per_s"] for row in rows],
        mode="markers",
        name=name,
        meta=group,
        visible=visible,
        showlegend=True,
        marker=marker,
        hovertext=[_of_kernel(row, note) for row in rows],
        hoverinfo="text",
    )


def _symbol(row: Record, group: str) -> str:
    return ("circle" if group == "kernels" else "diamond") + ("-open" if row["per_element"] else "")


def _of_kernel(row: Record, note: str) -> str:
    bound = escape(row["bound"] or "") or "bound unknown"
    pieces = (
        f"<b>{escape(row['name'])}</b>",
        escape(details(row)),
        f"{show(row['flops_per_s'], 'FLOP/s')}, {show(row['bytes_per_s'], 'B/s')}",
        f"{show(row['roof_fraction'], 'share')} of the roof ({bound})",
        f"{show(row['ns_per_step'], 'ns')} a step, {show(row['share'], 'share')}",
        f"<i>{escape(provenance(row['status'], row['source']))}</i>",
        note and f"<i>{note}</i>",
    )
    return "<br>".join(filter(None, pieces))


def _roofs(record: Record) -> list[Roof]:
    """The lowest first."""
    found = []
    for compute in record["compute"]:
        same = [row for row in record["bandwidth"] if row["status"] == compute["status"]]
        bandwidth = max(same, key=lambda row: row["value"])
        lines = []
        for row in (compute, bandwidth):
            lines += [f"<b>{escape(row['label'])}: {show(row['value'], row['unit'])}</b>", escape(row["source"])]
        said = "<br>".join([*lines, f"<i>{escape(compute['status'])}</i>"])
        found.append(Roof(compute["value"], bandwidth["value"], compute["status"], said))
    return sorted(found)


def _roof(roof: Roof, left: float, right: float) -> dict[str, Any]:
    x = [left, roof.flops_per_s / roof.bytes_per_s, right]
    y = [left * roof.bytes_per_s, roof.flops_per_s, roof.flops_per_s]
    style = line("ink", 1.6) if roof.status == "measured" else line("faint", 1.2, "dash")
    return trace("scatter", x=x, y=y, mode="lines", line=style, hovertext=[roof.said] * 3, hoverinfo="text")


def _roof_labels(roofs: list[Roof], left: float) -> list[dict[str, Any]]:
    """Above the highest roof, where no kernel should be: its flat part and its slope, and those below it."""
    if not roofs:
        return []
    named = [("data sheet" if roof.status == "quoted" else roof.status, roof) for roof in reversed(roofs)]
    rates = [f"{name} {show(roof.flops_per_s, 'FLOP/s')}" for name, roof in named]
    bandwidths = [f"{name} {show(roof.bytes_per_s, 'B/s')}" for name, roof in named]
    rate, steepest = roofs[-1].flops_per_s, max(roof.bytes_per_s for roof in roofs)
    style = {"showarrow": False, "yanchor": "bottom", "xanchor": "right", "font": {"size": 11, "color": colour("soft")}}
    flat = {"x": 1, "xref": "paper", "y": math.log10(rate), "align": "right", "yshift": 2}
    middle = math.sqrt(left * rate / steepest)
    slope = {"x": math.log10(middle), "y": math.log10(middle * steepest), "align": "right", "xshift": -6}
    return [
        {**style, **flat, "text": "<br>".join(dict.fromkeys(rates))},
        {**style, **slope, "text": "<br>".join(dict.fromkeys(bandwidths))},
    ]
