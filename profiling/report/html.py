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
from profiling.report.charts import charts, difference
from profiling.report.compare import signed
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
"""Of `run`, what stands below the headline."""


def render_html(report: Record) -> str:
    """The page of a report that `profiling.report.build` returned; the same text for the same report."""
    drawn = charts(report)
    phases = tables.phases(report)
    return _template("report.html.jinja").render(
        **assets(drawn),
        charts={chart.key: chart for chart in drawn},
        statuses=STATUSES,
        sections=SECTIONS,
        title=report["title"],
        headline=report["headline"],
        article_title=report["article"]["title"],
        run=head(report),
        data_warning=data_warning(report),
        doubts=report["doubts"],
        lacks=report["lacks"],
        all_lacks=tables.lacks(report),
        tiles=tables.tiles(report),
        terms=tables.terms(report),
        sentences=report["sentences"],
        assumption=report["assumption"],
        phases=phases,
        phase_unit=phases.columns[1].rpartition(" ")[2],
        phase_kinds=[_phase_kind(i, row) for i, row in enumerate(phases.rows)],
        kernels=tables.kernels(report),
        layers=tables.kernels(report, "layers"),
        unplaced=tables.unplaced(report),
        telemetry=telemetry_table(report),
        floors=tables.floors(report),
        levers=tables.levers(report),
        no_levers=report["no_levers"],
        epochs=tables.epochs(report),
        environment=tables.environment(report),
    )


def head(report: Record) -> list[tuple[str, str]]:
    """What stands below the headline: of the run, what is known."""
    run = report["run"]
    known = [(name.replace("_", " "), plain(run[name])) for name in HEAD if run.get(name) is not None]
    return [(name, value[:12] if name == "git sha" else value) for name, value in known]


def render_comparison(compared: Record, addresses: Sequence[str | None] = (None, None)) -> str:
    """The page of what `compare.compare` returned; `addresses` are those of the two runs' own pages."""
    chart = difference(compared)
    training = {"name": "training", "a_ns": compared["a_ns"], "b_ns": compared["b_ns"]}
    phases = [{**phase, "name": f"phase {phase['name']}"} for phase in compared["phases"]]
    return _template("compare.html.jinja").render(
        **assets([chart]),
        chart=chart,
        names=compared["names"],
        titles=compared["titles"],
        addresses=addresses,
        doubts=compared["doubts"],
        figures=compared["figures"],
        sentence=compared["sentence"],
        uncertainty=compared["uncertainty"],
        differs=compared["differs"],
        rows=[
            {
                "name": row["name"],
                "a": f"{row['a_ns'] / 1e9:.3f}",
                "b": f"{row['b_ns'] / 1e9:.3f}",
                "difference": signed(row["b_ns"] - row["a_ns"]),
            }
            for row in [training, *compared["terms"], *phases]
        ],
    )


def assets(drawn: Sequence[Chart]) -> dict[str, Any]:
    """What every page brings with it. Raises ReportError where plotly, which draws its charts, is not installed."""
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
        "data": Markup(_json([asdict(chart) for chart in drawn if chart.data])),
    }


def data_warning(report: Record) -> tuple[str, str] | None:
    """What to know about images that are not the official ones."""
    identity = report["run"]["data_identity"]
    if identity == "official":
        return None
    return {
        "synthetic": ("SYNTHETIC IMAGES.", "Accuracies of this run say nothing about CIFAR-10."),
        "copy": ("A COPY OF CIFAR-10,", "not the official files: accuracies are not comparable with published ones."),
    }.get(identity, ("IMAGES OF UNKNOWN ORIGIN.", "Accuracies are not comparable with published ones."))


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["zip"] = zip
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


def _phase_kind(index: int, row: tables.Row) -> str:
    """The name of a phase's colour."""
    return "training" if row.cells[0].text == "training" else str(index % 2)
