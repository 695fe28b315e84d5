"""The longest kernels of a finished run's step: python -m experiments longest-kernels RUN ...

The words after RUN name its data, as for train.py. The run's steps are profiled in a process of their own, and of each
kernel the time in a step, of those steps that `profiling.account.cross_check` believes, is written to RUN/kernels.json.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study.folder import Request
from model.errors import RunError, UsageError
from profiling import ROOT
from profiling.account.attribution import per_step
from profiling.account.cross_check import judge
from profiling.account.trace import Trace, read
from profiling.output.files import read_json, read_jsonl, write_json
from profiling.run.collect import PROFILE_PASS, RECORDS, run_pass

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

LONGEST = 20


def step_ms(run: Path) -> float | None:
    """Milliseconds of a step of the run: the median of its epochs after the first, which warms up. None if unknown."""
    rows = read_jsonl(run / "log.jsonl")
    steps = [after["step"] - before["step"] for before, after in zip([{"step": 0}, *rows], rows, strict=False)]
    each = [1e3 * row["epoch_train_s"] / n for row, n in zip(rows, steps, strict=True) if n > 0]
    return statistics.median(each[1:] or each) if each else None


def longest(trace: Trace, profile: dict[str, Any], timed_ms: float | None) -> dict[str, Any]:
    """The longest kernels of a mean step that is believed; `profile` is records/profile.json.

    `timed_ms` is the run's own step, without a profiler, None if that is not known.
    """
    judged = judge(trace, profile, timed_ms and 1e6 * timed_ms)
    seen = per_step(judged.trace) if judged.trace else None
    steps = seen.steps if seen else 1
    total, calls = defaultdict(float), defaultdict(float)
    for key, time in seen.total.by_kernel.items() if seen else ():
        total[key.name] += time.own_ns / steps / 1e3
        calls[key.name] += time.calls / steps
    order = sorted(total, key=lambda name: -total[name])[:LONGEST]
    return {
        "source": judged.source,
        "sum_ms": sum(total.values()) / 1e3,
        "timed_ms": timed_ms,
        "kernels_a_step": sum(calls.values()),
        "lacks": [*judged.lacks, *(judged.trace.lacks if judged.trace else ())],
        "kernels": [{"name": name, "us": total[name], "calls": calls[name]} for name in order],
    }


def check(request: Request, folder: Path, data: Sequence[str] = ()) -> None:
    """Raise UsageError for a folder that is no run's."""
    if not (folder / "summary.json").is_file():
        raise UsageError(f"{folder} is not the folder of a run: it has no summary.json; name one that train.py wrote")


def run(
    request: Request, terminal: "Terminal", interrupts: "Interrupts", folder: Path, data: Sequence[str] = ()
) -> dict[str, Any]:
    """Profile the run's steps; write RUN/kernels.json and return it. Raises RunError where the pass fails."""
    where = folder.absolute()
    (where / RECORDS).mkdir(exist_ok=True)
    error = run_pass("the profiled pass", [*PROFILE_PASS, str(where), *data], ROOT, terminal.say)
    if error:
        raise RunError(f"no kernels: {error}")
    trace, about = read(where / RECORDS / "trace.json.gz"), read_json(where / RECORDS / "profile.json")
    found = longest(trace, about, step_ms(where))
    write_json(where / "kernels.json", found)
    lacks = found["lacks"] or "nothing"
    terminal.say(f"{len(found['kernels'])} kernels written to {where / 'kernels.json'}; lacks: {lacks}")
    return found
