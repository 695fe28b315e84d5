"""report.md: what the page says, as sentences and tables that can be read as they are."""

import re
from collections.abc import Iterable

from profiling.report import tables
from profiling.report.html import data_warning, head
from profiling.report.tables import Record, Row, Table
from profiling.report.timeline import telemetry_table

KERNELS = 30
"""Kernels that are listed; report.json has them all."""
LONGEST = 160
"""Letters of a cell or a name."""


def render_markdown(report: Record) -> str:
    """The report as GitHub's Markdown; the same text for the same report, in which nothing but its own is markup."""
    lines = [f"# {escape(report['title'])}", ""]
    if report["doubts"]:
        lines += ["> **IN DOUBT.** These figures cannot all be right.", ""]
        lines += [*(f"> - {escape(doubt, 1000)}" for doubt in report["doubts"]), ""]
    lines += [f"**{escape(report['headline'], 1000)}**", ""]
    lines += ["; ".join(f"{name} {escape(value)}" for name, value in head(report)), ""]
    warning = data_warning(report)
    if warning:
        lines += [f"> **{warning[0]}** {warning[1]}", ""]
    if report["lacks"]:
        lines += ["> **INCOMPLETE.** This account does not explain the whole run.", ""]
        lines += [*(f"> - {escape(lack, 1000)}" for lack in report["lacks"]), ""]
    tiles = tables.tiles(report)
    lines += ["## Key figures", ""]
    cells = [[tile.label, f"{tile.number} {tile.unit}", tile.status, tile.source] for tile in tiles]
    lines += grid(["figure", "value", "status", "source"], cells, {0, 2, 3}) or ["No figure is known.", ""]
    lines += section("From ideal to measured", tables.terms(report), "No term of this account is known.")
    title = report["article"]["title"]
    lines += section(escape(title), tables.article(report), "Its terms are not known.")
    lines += ["## What to do next", ""]
    lines += [f"{i}. {escape(said, 1000)}" for i, said in enumerate(report["sentences"], start=1)]
    lines += ["", escape(report["assumption"], 1000), ""]
    lines += section("Phases of the process", tables.phases(report), "No phases were recorded.")
    lines += section("Roofs", tables.roofs(report), "No roof is known.")
    reason = report["timeline"]["reason"] or ""
    sensors = telemetry_table(report)
    lines += section("Clocks, power, activity during training", sensors, f"Unavailable: {escape(reason, 1000)}.")
    kernels = tables.kernels(report)
    lines += section("Kernels", kernels, "No kernel was recorded.", KERNELS)
    layers = tables.kernels(report, "layers")
    lines += section("Convolution layers, pass by pass", layers, "No layer could be told apart.", KERNELS)
    lines += section("The least time, by passes over memory", tables.floors(report), "No bandwidth is known.")
    no_levers = escape(report["no_levers"], 1000)
    lines += section("From the article's 256 s to this run", tables.levers(report), f"Unavailable: {no_levers}.")
    lines += section("Learning curve", tables.epochs(report), "No epoch was logged.")
    lines += ["## What this account lacks", ""]
    lines += [f"- {escape(lack, 1000)}" for lack in tables.lacks(report)] or ["Nothing that it knows of."]
    lines += ["", "## Run and environment", ""]
    facts = [list(pair) for pair in tables.environment(report)]
    lines += grid(["name", "value"], facts, {0, 1}) or ["Not known.", ""]
    return "\n".join(lines).rstrip() + "\n"


def section(title: str, table: Table, missing: str, most: int | None = None) -> list[str]:
    """A heading and the table's first `most` rows, or what to say where it has none. `title` is Markdown."""
    shown = table.rows[:most]
    rows = [*shown, *filter(None, [table.total])]
    if not rows:
        return [f"## {title}", "", missing, ""]
    sources = list(dict.fromkeys(row.source for row in shown if row.source))
    apart = len(sources) > 1
    columns = [*table.columns, "status", *(["source"] if apart else [])]
    cells = [[*_cells(row), *([row.source] if apart else [])] for row in rows]
    lines = [f"## {title}", "", *grid(columns, cells, table.texts | {len(table.columns), len(table.columns) + 1})]
    more = len(table.rows) - len(shown) + table.omitted
    lines += [f"And {more} more, in report.json.", ""] if more else []
    return lines if apart or not sources else [*lines, f"Source: {escape(sources[0], 1000)}.", ""]


def grid(columns: Iterable[str], rows: Iterable[Iterable[str]], texts: Iterable[int]) -> list[str]:
    """A table whose columns are as wide as their widest cell, and an empty line; nothing where there are no rows."""
    head, body = [escape(name) for name in columns], [[escape(cell) for cell in row] for row in rows]
    if not body:
        return []
    widths = [max(3, *(len(row[i]) for row in [head, *body])) for i in range(len(head))]
    left = set(texts)

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [line(head), line(rule), *map(line, body), ""]


def escape(words: str, limit: int = LONGEST) -> str:
    """A text in one line in which nothing is markup: no HTML, link, emphasis, code, formula or table cell.

    An underscore within a word is none and stays as it is, so that names of kernels can be read.
    """
    words = " ".join(words.split())
    words = words if len(words) <= limit else words[: limit - 1] + "…"
    words = re.sub(r"([\\`*\[\]<>#|~$])", r"\\\1", words)
    words = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", words)
    words = re.sub(r"&(?=#?\w+;)", "&amp;", words)
    words = re.sub(r"(?i)(https?|ftp):(?=//)", r"\1&#58;", words)  # GitHub makes links of these, www. and addresses
    words = re.sub(r"(?i)(www)\.", r"\1&#46;", words).replace("@", "&#64;")
    return re.sub(r"^(\d*)([.)]|[-+=]+)(?=\s|$)", r"\1\\\2", words)


def _cells(row: Row) -> list[str]:
    first, *others = row.cells
    name = f"{first.text} ({first.under})" if first.under else first.text
    return ["· " + name if row.child else name, *(cell.text for cell in others), row.status]
