"""`python -m profiling report`: the report of a profiled run, made anew from its records."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiling.account.terms import RESIDUAL_LIMIT
from profiling.output.errors import InconsistentError, ReportError
from profiling.report.build import residual_share, write
from profiling.run.collect import RECORDS

if TYPE_CHECKING:
    from profiling.output.terminal import Terminal


def run(folder: Path, strict: bool, terminal: "Terminal") -> int:
    """Write the report into `folder` and say what it says; the exit code. A page that cannot be drawn is a warning.

    Raises ReportError where the run cannot be read or the report not written, InconsistentError if `strict`.
    """
    try:
        report, missing = write(folder)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {folder}: {error}; an older one is intact") from None
    say(report, folder / ("report.md" if missing else "report.html"), terminal)
    if missing:
        older = "; the report.html there is an older one" if (folder / "report.html").exists() else ""
        terminal.warn(f"{missing}: python -m profiling report {folder}, here or where a copy of it is{older}")
    if strict:
        _require_consistent(report)
    return 0


def say(report: dict[str, Any], file: Path, terminal: "Terminal") -> None:
    """The report in sentences, the file that it is in, and where its trace can be looked at."""
    for line in report["doubts"]:
        terminal.warn(line)
    terminal.say(report["headline"], "bold")
    for line in (*report["sentences"], report["assumption"]):
        terminal.say(line)
    for line in report["lacks"]:
        terminal.warn(line)
    terminal.say(f"report: {file}")
    trace = file.parent / RECORDS / "trace.json.gz"
    if trace.exists():
        terminal.say(f"trace: {trace}, which opens in ui.perfetto.dev")


def _require_consistent(report: dict[str, Any]) -> None:
    share = residual_share(report)
    if report["status"] != "complete":
        raise InconsistentError("the account is incomplete or in doubt; the lines above say why")
    if share is None or share > RESIDUAL_LIMIT:
        seen = "no residual" if share is None else f"{share:.1%}"
        raise InconsistentError(
            f"the account leaves {seen} of training unexplained, expected at most {RESIDUAL_LIMIT:.0%}"
        )
