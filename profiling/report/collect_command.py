"""`python -m profiling collect`: a run that has ended is profiled in a pass of its own, and its report is drawn.

`train.py --profile` ends with the same; this is for a run that was trained without, or whose pass was interrupted. The
seconds of single steps and the GPU's clocks are those of the run itself: without --profile nobody wrote them down, and
the report says that it lacks them.
"""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from profiling import ROOT
from profiling.device import ncu
from profiling.output.errors import CommandError, ReportError
from profiling.output.files import read_json, write_json
from profiling.report import command as report_command
from profiling.run.collect import RECORDS, record_failure, run_pass

if TYPE_CHECKING:
    from profiling.device.ceilings import Ceilings
    from profiling.output.terminal import Terminal

PROFILE_PASS = [sys.executable, str(ROOT / "train.py"), "--profile-pass"]
MEASURE_CEILINGS = [sys.executable, "-m", "profiling", "device"]
ENDED = ("complete", "target missed")


def run(folder: Path, data_dir: Path | None, synthetic: bool, terminal: "Terminal") -> int:
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
    if data_dir is None and summary.get("data_identity") == "synthetic":
        synthetic = True
    data = ["--synthetic"] if synthetic else ["--data-dir", str((data_dir or Path("data")).absolute())]
    error = profile(folder, device, dtype, data, terminal)
    if error:
        raise ReportError(f"the run could not be profiled: {error}")
    return 0


def profile(
    out: Path,
    device: str,
    dtype: str,
    data: list[str],
    terminal: "Terminal",
    counters: bool = False,
    ceilings: "Ceilings | None" = None,
) -> str | None:
    """Account for the run in `out`: a profiled pass in a fresh process, then report.html, .md and .json.

    `device` and `dtype` are the run's, as "cuda" and "float16"; `data` are train.py's words for its data. With
    `counters`, Nsight Compute reads the GPU's in a pass more. Without `ceilings` this device's are measured. Whatever
    fails is warned of and said in the report; the run stands. Returns why the profiled pass failed, None if it did not.
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
        report_command.run(out, False, terminal)
    except ReportError as refused:
        terminal.warn(f"{refused}; try again with python -m profiling report {out}")
    return error
