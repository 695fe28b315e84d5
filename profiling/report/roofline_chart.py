"""The roofline: how fast kernels and layers were, below how fast the device could have let them be."""

import math
from typing import Any

from profiling.output.units import show
from profiling.report.plot import (
    CLEAR,
    PAINT,
    Chart,
    axis,
    clip,
    colour,
    cut,
    escape,
    layout,
    line,
    margin,
    outline,
    trace,
)
from profiling.report.tables import Record, details, longest_first, provenance

LARGEST_POINT_PX = 32


def roofline(report: Record) -> Chart:
    """FLOP/s over FLOPs per byte, both logarithmic, below what was measured and what the data sheet says.

    Kernels and layers with FLOPs and bytes are points; their area is the time that they take. Of a ring the FLOPs are
    modelled, so many for each element.
    """
    chart = Chart("roofline", "Roofline", reason="no kernel with known FLOPs and bytes, and no roof")
    groups = {key: [row for row in longest_first(report, key) if _placed(row)] for key in ("kernels", "layers")}
    points = [row for group in groups.values() for row in group]
    roofs = _roofs(report["roofs"])
    if not points and not roofs:
        return chart
    counted = [row for row in groups["kernels"] if min(row.get(key) or 0 for key in ("flops", "dram_bytes")) > 0]
    x = [row["intensity"] for row in points] + [rate / bandwidth for rate, bandwidth, _, _ in roofs]
    x += [row["flops"] / row["dram_bytes"] for row in counted]
    y = [row["flops_per_s"] for row in points] + [rate for rate, _, _, _ in roofs]
    left, right = min(x) / 3, max(x) * 8
    bottom, top = min([*y, *(left * bandwidth for _, bandwidth, _, _ in roofs)]) / 2, max(y) * 4
    longest = max((row["ns_per_step"] for row in points), default=0) or 1
    data = [_roof(roof, left, right) for roof in roofs]
    first = next((group for group, members in groups.items() if members), "")
    for group, members in groups.items():
        for category in dict.fromkeys(row["category"] for row in members):
            inside = [row for row in members if row["category"] == category]
            data.append(
                trace(
                    "scatter",
                    x=[row["intensity"] for row in inside],
                    y=[row["flops_per_s"] for row in inside],
                    mode="markers",
                    name=clip(category or "no category", 30),
                    meta=group,
                    visible=group == first,
                    showlegend=True,
                    marker={
                        "size": [row["ns_per_step"] for row in inside],
                        "sizemode": "area",
                        "sizeref": 2 * longest / LARGEST_POINT_PX**2,
                        "sizemin": 3,
                        "color": colour(f"term-{PAINT.get(category, 'other')}"),
                        "opacity": 0.72,
                        "symbol": [_symbol(row, group) for row in inside],
                        "line": outline("paper", [2 if row.get("per_element") else 1 for row in inside]),
                    },
                    hovertext=[_of_kernel(row) for row in inside],
                    hoverinfo="text",
                )
            )
    if counted:
        data.append(_counted(counted, first == "kernels"))
    whole = layout(
        xaxis=axis("FLOP per byte", type="log", range=[math.log10(left), math.log10(right)], tickformat="~g", dtick=1),
        yaxis=axis("FLOP/s", type="log", range=[math.log10(bottom), math.log10(top)], tickformat="~s", dtick=1),
        hovermode="closest",
        annotations=_roof_labels(roofs, left),
        # inside, at the foot of the compute roof: no kernel that does well is there
        legend={"x": 1, "xanchor": "right", "y": 0, "yanchor": "bottom", "itemsizing": "constant", "bgcolor": CLEAR},
        margin=margin(left=56),
    )
    shown = tuple(group for group, members in groups.items() if members)
    # on a phone the slope has no room for its label, which the tables and the tips have too
    narrow = {"annotations": whole["annotations"][:1]}
    return Chart(
        "roofline",
        "Roofline",
        480,
        data,
        whole,
        narrow,
        groups=shown,
        says=_says(groups[first] if first else [], roofs),
    )


def _says(points: list[Record], roofs: list[tuple[float, float, str, str]]) -> str:
    said = "FLOP/s over FLOP per byte, below no known roof"
    if roofs:
        rate, bandwidth, *_ = roofs[0]
        said = f"FLOP/s over FLOP per byte, below {show(rate, 'FLOP/s')} and {show(bandwidth, 'B/s')}"
    if not points:
        return f"Roofline: {said}."
    row = max(points, key=lambda row: row["ns_per_step"])
    at = f"{show(row['flops_per_s'], 'FLOP/s')} at {show(row['intensity'], 'FLOP/B')}"
    of_roof = "" if row["roof_fraction"] is None else f", {show(row['roof_fraction'], 'share')} of its roof"
    return f"Roofline: {said}; the longest, {cut(row['name'], 60)}, reached {at}{of_roof}."


def _symbol(row: Record, group: str) -> str:
    return ("circle" if group == "kernels" else "diamond") + ("-open" if row.get("per_element") else "")


def _of_kernel(row: Record) -> str:
    speed = f"{show(row.get('flops_per_s'), 'FLOP/s')}, {show(row.get('bytes_per_s'), 'B/s')}"
    roof = (
        f"{show(row.get('roof_fraction'), 'share')} of the roof ({escape(row.get('bound') or '') or 'bound unknown'})"
    )
    time = f"{show(row.get('ns_per_step'), 'ns')} a step, {show(row.get('share'), 'share')}"
    source = escape(provenance(row["status"], row["source"]))
    where = escape(details(row))
    return "<br>".join(filter(None, (f"<b>{escape(row['name'])}</b>", where, speed, roof, time, f"<i>{source}</i>")))


def _placed(row: Record) -> bool:
    return (row["intensity"] or 0) > 0 and (row["flops_per_s"] or 0) > 0


def _counted(kernels: list[Record], visible: bool) -> dict[str, Any]:
    """Where the bytes that the hardware counted put a kernel; those of the operation put its filled point."""
    return trace(
        "scatter",
        x=[row["flops"] / row["dram_bytes"] for row in kernels],
        y=[row["flops_per_s"] for row in kernels],
        mode="markers",
        name="by counted bytes",
        meta="kernels",
        visible=visible,
        showlegend=True,
        marker={"size": 8, "symbol": "x-thin", "line": outline("ink", 1.4)},
        hovertext=[f"{_of_kernel(row)}<br><i>bytes: counted by Nsight Compute</i>" for row in kernels],
        hoverinfo="text",
    )


def _roofs(record: Record) -> list[tuple[float, float, str, str]]:
    """(FLOP/s, bytes/s, status, provenance) of each compute roof, with the best bandwidth known in the same way."""
    found = []
    for roof in record["compute"]:
        status, rate = roof["status"], roof["value"]
        best = max((row for row in record["bandwidth"] if row["status"] == status), key=lambda row: row["value"])
        if rate > 0 and best["value"] > 0:
            lines = [f"<b>{escape(roof['label'])}: {show(rate, 'FLOP/s')}</b>", escape(roof["source"])]
            lines += [
                f"<b>{escape(best['label'])}: {show(best['value'], 'B/s')}</b>",
                escape(best["source"]),
            ]
            found.append((rate, best["value"], status, "<br>".join([*lines, f"<i>{escape(status)}</i>"])))
    return sorted(found)


def _roof(roof: tuple[float, float, str, str], left: float, right: float) -> dict[str, Any]:
    rate, bandwidth, status, said = roof
    x = [left, rate / bandwidth, right]
    style = line("ink", 1.6) if status == "measured" else line("faint", 1.2, "dash")
    y = [left * bandwidth, rate, rate]
    return trace("scatter", x=x, y=y, mode="lines", line=style, hovertext=[said] * 3, hoverinfo="text")


def _roof_labels(roofs: list[tuple[float, float, str, str]], left: float) -> list[dict[str, Any]]:
    """Above the highest roof, where no kernel should be: its flat part and its slope, and those below it."""
    if not roofs:
        return []
    rates, bandwidths = [], []
    for rate, bandwidth, status, _ in reversed(roofs):
        what = "data sheet" if status == "quoted" else clip(status, 20)
        rates.append(f"{what} {show(rate, 'FLOP/s')}")
        bandwidths.append(f"{what} {show(bandwidth, 'B/s')}")
    rate, steepest = roofs[-1][0], max(bandwidth for _, bandwidth, _, _ in roofs)
    style = {"showarrow": False, "yanchor": "bottom", "xanchor": "right", "font": {"size": 11, "color": colour("soft")}}
    flat = {"x": 1, "xref": "paper", "y": math.log10(rate), "align": "right", "yshift": 2}
    middle = math.sqrt(left * rate / steepest)
    slope = {"x": math.log10(middle), "y": math.log10(middle * steepest), "align": "right", "xshift": -6}
    return [
        {**style, **flat, "text": "<br>".join(dict.fromkeys(rates))},
        {**style, **slope, "text": "<br>".join(dict.fromkeys(bandwidths))},
    ]
