"""From the records in a run's folder to its report: a pure function of files, which works anywhere.

`build` reads, `write` puts report.json, report.md and report.html beside the records.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from profiling.account import analysis
from profiling.account.figures import figures
from profiling.account.run_folder import Run, read
from profiling.account.timeline import timeline
from profiling.output.errors import ReportError
from profiling.output.files import write_json, write_text
from profiling.output.forms import clean
from profiling.report.html import render_html
from profiling.report.markdown import render_markdown
from profiling.report.sentences import assumption, headline, sentences

VERSION = 1
OF_SUMMARY = ("preset", "data_identity", "data_source", "device", "dtype", "ops", "step", "epochs", "steps", "seed")


def build(folder: Path) -> dict[str, Any]:
    """The report of the run in `folder` as a record. Raises ReportError where there is no run."""
    run = read(folder)
    a = analysis.analyse(run)
    s = run.summary
    levers, no_levers = analysis.levers(run, a)
    report = {
        "version": VERSION,
        "title": f"{s['preset']} on {s['device']}",
        "status": "incomplete" if a.lacks or a.doubts else "complete",
        "doubts": a.doubts,
        "lacks": a.lacks,
        "run": {
            **{key: s[key] for key in OF_SUMMARY},
            "batch_size": run.config.get("batch_size"),
            "images": run.work["images"] if run.work else None,
            "git_sha": s["git_sha"],
            "dirty": run.environment.get("git_dirty"),
            "date": run.environment.get("date"),
            "status": s["status"],
            "on_gpu": run.environment["gpu"] is not None,
        },
        "environment": _flat(run.environment),
        "figures": figures(run, a),
        "phases": _phases(run),
        "terms": [term.to_json(a.evidence.training_ns) for term in a.terms],
        "article": analysis.article(run, a),
        "levers": levers,
        "no_levers": no_levers,
        "profiled": analysis.profiled(a),
        "floors": analysis.floors(a),
        "kernels": analysis.kernels(run, a),
        "layers": analysis.layers(a),
        "roofs": analysis.roofs(run, a),
        "timeline": timeline(run.phases, run.telemetry),
        "epochs": run.epochs,
    }
    report["headline"] = headline(report)
    report["sentences"] = sentences(report)
    report["assumption"] = assumption(report)
    return clean(report)


def write(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Build the report and put it into `folder`, each file whole or not at all. Raises ReportError and OSError.

    Returns the report, and why there is no page of it where that could not be drawn.
    """
    report = build(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render_markdown(report))
    try:
        page = render_html(report)
    except ReportError as error:
        return report, str(error)
    write_text(folder / "report.html", page)
    return report, None


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = str(item) if isinstance(item, list) else item
    return flat


def _phases(run: Run) -> list[dict[str, Any]]:
    totals = Counter()
    for phase in run.phases["phases"] if run.phases else ():
        totals[phase["name"]] += phase["end_ns"] - phase["start_ns"]
    source = "monotonic clock of the run; phases are exclusive and contiguous"
    return [{"name": name, "ns": ns, "status": "measured", "source": source} for name, ns in totals.items()]
