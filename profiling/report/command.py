"""`python -m profiling report` and `collect`: the report of a run from its records; the records of one without any.

`report` makes the report of a profiled run anew. `collect` profiles a run that has ended in a pass of its own, then
reports. `train.py --profile` ends with the same; `collect` is for a run that was trained without, or whose pass was
interrupted. The seconds of single steps and the GPU's clocks are those of the run itself: without --profile they were
not recorded, and the report says that it lacks them.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from profiling import ROOT
from profiling.account.terms import RESIDUAL_LIMIT
from profiling.device import ncu
from profiling.device.ceilings import Ceilings
from profiling.output.errors import CommandError, InconsistentError, ReportError
from profiling.output.files import read_json, write_json
from profiling.output.terminal import Terminal
from profiling.report.build import write
from profiling.run.collect import PROFILE_PASS, RECORDS, record_failure, run_pass

MEASURE_CEILINGS = [sys.executable, "-m", "profiling", "device"]
ENDED = ("complete", "target missed")


def run(folder: Path, strict: bool, terminal: Terminal) -> int:
    """Write the report into `folder` and say what it says; the exit code. A page that cannot be drawn is a warning.

    Raises ReportError where the run cannot be read or the report not written, InconsistentError if `strict`.
    """
    try:
        report, missing = write(folder)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {folder}: {error}; an older one is intact") from None
    for line in report["doubts"]:
        terminal.warn(line)
    terminal.say(report["headline"], "bold")
    for line in (*report["sentences"], report["assumption"]):
        terminal.say(line)
    for line in report["lacks"]:
        terminal.warn(line)
    terminal.say(f"report: {folder / ('report.md' if missing else 'report.html')}")
    trace = folder / RECORDS / "trace.json.gz"
    if trace.exists():
        terminal.say(f"trace: {trace}, which opens in ui.perfetto.dev")
    if missing:
        older = "; the report.html there is an older one" if (folder / "report.html").exists() else ""
        terminal.warn(f"{missing}: python -m profiling report {folder}, here or where a copy of it is{older}")
    if strict:
        _require_consistent(report)
    return 0


def _require_consistent(report: dict[str, Any]) -> None:
    if report["status"] != "complete":
        raise InconsistentError("the account is incomplete or in doubt; the lines above say why")
    total = sum(t["ns"] for t in report["terms"])
    share = next((abs(t["ns"]) / total for t in report["terms"] if t["key"] == "residual" and total), None)
    if share is None or share > RESIDUAL_LIMIT:
        seen = "no residual" if share is None else f"{share:.1%}"
        raise InconsistentError(
            f"the account leaves {seen} of training unexplained, expected at most {RESIDUAL_LIMIT:.0%}"
        )


def collect(folder: Path, data_dir: Path | None, synthetic: bool, terminal: Terminal) -> int:
    """Profile the run in `folder` on its data, or on what is named instead; the exit code.

    Raises ReportError where there is no run, none that has ended, or no pass succeeds, and CommandError for a
    contradiction.
    """
    if synthetic and data_dir:
        raise CommandError("--synthetic and --data-dir contradict each other; give one of them")
    try:
        summary, config = (read_json(folder / f"{name}.json") for name in ("summary", "config"))
        status, dtype, device = summary["status"], summary["dtype"], config["device"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ReportError(f"{folder} is not the folder of a run: expected its summary.json and config.json") from None
    if status not in ENDED:
        raise ReportError(f"the run in {folder} has not ended ({status}): first python train.py --resume {folder}")
    data = ["--data-dir", str((data_dir or Path("data")).absolute())]
    if synthetic or (data_dir is None and summary.get("data_identity") == "synthetic"):
        data = ["--synthetic"]
    error = profile(folder, device, dtype, data, terminal)
    if error:
        raise ReportError(f"the run could not be profiled: {error}")
    return 0


def profile(
    out: Path,
    device: str,
    dtype: str,
    data: list[str],
    terminal: Terminal,
    counters: bool = False,
    ceilings: Ceilings | None = None,
) -> str | None:
    """Account for the run in `out`: a profiled pass in a fresh process, then report.html, .md and .json.

    `device` and `dtype` are the run's, as "cuda" and "float16"; `data` are train.py's words for its data. With
    `counters`, Nsight Compute reads the GPU's in a pass more. Without `ceilings` this device's are measured. A failure
    is warned of and said in the report; the run stands. Returns why the profiled pass failed, None if it did not.
    """
    out, folder = out.absolute(), out.absolute() / RECORDS
    with contextlib.suppress(OSError):  # the report says what could not be written
        folder.mkdir(exist_ok=True)
    terminal.say("profiling: a pass of its own in a fresh process ...")
    error = run_pass("the profiled pass", [*PROFILE_PASS, str(out), *data], ROOT, terminal.warn)
    if error:
        record_failure(folder, error)
    if ceilings:
        with contextlib.suppress(OSError):
            write_json(folder / "ceilings.json", ceilings.to_json())
    else:
        terminal.say("measuring what this device sustains, about a minute ...")
        words = ["--device", device, "--dtype", dtype, "--out", str(folder / "ceilings.json")]
        run_pass("the measurement of ceilings", [*MEASURE_CEILINGS, *words], ROOT, terminal.warn)
    reason = ncu.probe() if counters else None
    if reason:
        terminal.warn(f"no counters: {reason}")
    elif counters:
        command = ncu.command([*PROFILE_PASS, str(out), "--ncu", *data], folder / "ncu.csv")
        run_pass("the pass under ncu", command, ROOT, terminal.warn)
    try:
        run(out, False, terminal)
    except ReportError as refused:
        terminal.warn(f"{refused}; try again with python -m profiling report {out}")
    return error
