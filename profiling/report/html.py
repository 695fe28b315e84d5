"""report.html: one file with its styles, scripts and numbers, which asks the network for nothing."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from profiling.output.errors import ReportError
from profiling.output.units import plain
from profiling.report import tables
from profiling.report.charts import charts
from profiling.report.plot import Chart
from profiling.report.tables import Record
from profiling.report.timeline import telemetry_table

HERE = Path(__file__).parent
STATUSES = {
    "measured": "seen on this machine",
    "modelled": "calculated",
    "quoted": "said by somebody else",
    "unavailable": "not known, with the reason",
}
SECTIONS = {
    "account": "From ideal to measured",
    "next": "What to do next",
    "phases": "Phases of the process",
    "roofline": "Roofline",
    "timeline": "Clocks, power, activity",
    "kernels": "Kernels",
    "floors": "Floors and levers",
    "learning": "Learning curve",
    "lacks": "What this account lacks",
    "environment": "Run and environment",
}
"""Headings, which the navigation repeats."""
HEAD = ("preset", "device", "dtype", "ops", "data_identity", "epochs", "batch_size", "seed", "git_sha", "date")
"""Entries of `run` below the headline."""
WARNINGS = {
    "official": None,
    "synthetic": ("SYNTHETIC IMAGES.", "Accuracies of this run say nothing about CIFAR-10."),
    "copy": ("A COPY OF CIFAR-10,", "not the official files: accuracies are not comparable with published ones."),
}
"""By the identity of the data."""


def render_html(report: Record) -> str:
    """The page of a report that `profiling.report.build` returned; the same text for the same report."""
    drawn = charts(report)
    return template("report.html.jinja").render(
        **assets(drawn),
        report=report,
        charts={chart.key: chart for chart in drawn},
        tables=tables,
        telemetry=telemetry_table(report),
        head=head(report),
        data_warning=data_warning(report),
        statuses=STATUSES,
        sections=SECTIONS,
    )


def head(report: Record) -> list[tuple[str, str]]:
    """Names and values of the known entries of HEAD."""
    run = report["run"]
    known = [(name.replace("_", " "), plain(run[name])) for name in HEAD if run[name] is not None]
    return [(name, value[:12] if name == "git sha" else value) for name, value in known]


def data_warning(report: Record) -> tuple[str, str] | None:
    """A warning about images that are not the official ones."""
    unknown = ("IMAGES OF UNKNOWN ORIGIN.", "Accuracies are not comparable with published ones.")
    return WARNINGS.get(report["run"]["data_identity"], unknown)


def assets(drawn: Sequence[Chart]) -> dict[str, Any]:
    """The parts that every page has. Raises ReportError where plotly, which draws its charts, is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ReportError(f"there is no page: {error}; pip install -e . and run the command again") from None
    script = (HERE / "report.js").read_text(encoding="utf-8")
    plotly = get_plotlyjs()
    return {
        "policy": _policy(script, plotly),
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "plotly": Markup(plotly if any(chart.data for chart in drawn) else ""),
        "data": _json([asdict(chart) for chart in drawn if chart.data]),
    }


@cache
def template(name: str) -> Template:
    """A template of this folder, in which every text is escaped and a missing name is an error."""
    loader = FileSystemLoader(HERE)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(name)


def _json(value: Any) -> Markup:
    """JSON that no text in it can end the script element of."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII, so U+2028 is an escape already
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def _policy(*scripts: str) -> str:
    """A content security policy: these scripts and no others, styles of the page, nothing from anywhere."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'"
