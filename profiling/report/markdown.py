"""report.md: what the page says, as sentences and tables that can be read as they are."""

import re
from collections.abc import Iterable, Sequence

from profiling.report import tables
from profiling.report.html import data_warning, head
from profiling.report.tables import Record, Row, Table
from profiling.report.timeline import telemetry_table

KERNELS = 30
"""Kernels that are listed; report.json has them all."""
LONGEST, LONG = 160, 1000
"""Letters of a cell or a name, and of a sentence."""


def render_markdown(report: Record) -> str:
    """The report as GitHub's Markdown; the same text for the same report, in which nothing but its own is markup."""
    lines = [f"# {escape(report['title'])}", ""]
    lines += warned("**IN DOUBT.** These figures cannot all be right.", report["doubts"])
    lines += [f"**{escape(report['headline'], LONG)}**", ""]
    lines += ["; ".join(f"{name} {escape(value)}" for name, value in head(report)), ""]
    if warning := data_warning(report):
        lines += [f"> **{warning[0]}** {warning[1]}", ""]
    lines += warned("**INCOMPLETE.** This account does not explain the whole run.", report["lacks"])
    tiles = [[tile.label, f"{tile.number} {tile.unit}", tile.status, tile.source] for tile in tables.tiles(report)]
    lines += ["## Key figures", "", *grid(["figure", "value", "status", "source"], tiles, {0, 2, 3})]
    lines += section("From ideal to measured", tables.terms(report), "No term of this account is known.")
    lines += section(escape(report["article"]["title"]), tables.article(report), "Its terms are not known.")
    lines += ["## What to do next", ""]
    lines += [f"{i}. {escape(said, LONG)}" for i, said in enumerate(report["sentences"], start=1)]
    lines += ["", escape(report["assumption"], LONG), ""]
    lines += section("Phases of the process", tables.phases(report), "No phases were recorded.")
    lines += section("Roofs", tables.roofs(report), "No roof is known.")
    reasons = [
        f"Unavailable: {escape(why or '', LONG)}." for why in (report["timeline"]["reason"], report["no_levers"])
    ]
    lines += section("Clocks, power, activity during training", telemetry_table(report), reasons[0])
    lines += section("Kernels", tables.kernels(report), "No kernel was recorded.", KERNELS)
    layers = tables.kernels(report, "layers")
    lines += section("Convolution layers, pass by pass", layers, "No layer could be told apart.", KERNELS)
    lines += section("The least time, by passes over memory", tables.floors(report), "No bandwidth is known.")
    lines += section("From the article's 256 s to this run", tables.levers(report), reasons[1])
    lines += section("Learning curve", tables.epochs(report), "No epoch was logged.")
    lines += ["## What this account lacks", ""]
    lines += [f"- {escape(lack, LONG)}" for lack in tables.lacks(report)] or ["Nothing that it knows of."]
    lines += ["", "## Run and environment", "", *grid(["name", "value"], tables.environment(report), {0, 1})]
    return "\n".join(lines).rstrip() + "\n"


def warned(title: str, said: list[str]) -> list[str]:
    """A warning and its points; nothing without points."""
    return [f"> {title}", "", *(f"> - {escape(line, LONG)}" for line in said), ""] if said else []


def section(title: str, table: Table, missing: str, most: int | None = None) -> list[str]:
    """A heading and the table's first `most` rows, or `missing` where it has none. `title` is Markdown."""
    if not table.rows:
        return [f"## {title}", "", missing, ""]
    shown = table.rows[:most]
    sources = list(dict.fromkeys(row.source for row in shown))
    apart = len(sources) > 1
    columns = [*table.columns, "status", "source"][: None if apart else -1]
    cells = [[*_cells(row), row.status, row.source] for row in [*shown, *filter(None, [table.total])]]
    lines = [f"## {title}", "", *grid(columns, cells, table.texts | {len(table.columns), len(table.columns) + 1})]
    more = len(table.rows) - len(shown) + table.omitted
    lines += [f"And {more} more, in report.json.", ""] if more else []
    return lines if apart else [*lines, f"Source: {escape(sources[0], LONG)}.", ""]


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: Iterable[int]) -> list[str]:
    """A table with columns as wide as their widest cell, and an empty line. Cells beyond `columns` are left out."""
    body = [[escape(cell) for cell in row[: len(columns)]] for row in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*body, strict=True)]
    left = set(texts)
    lines = [
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in body
    ]
    lines.insert(1, ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


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
    return ["· " + name if row.child else name, *(cell.text for cell in others)]
