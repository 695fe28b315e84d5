"""What a step of a finished run is made of, the longest kernels first: python -m experiments.longest_kernels RUN ...

The words after RUN name its data, as for train.py. The run's steps are profiled in a process of their own, and of each
kernel the time in a step, of those steps that `profiling.account.cross_check` believes, is written to RUN/kernels.json.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.study.arguments import Parser
from profiling.account.attribution import per_step
from profiling.account.cross_check import judge
from profiling.account.trace import Trace, read
from profiling.output.files import read_json, read_jsonl, write_json
from profiling.report.command import PROFILE_PASS, ROOT
from profiling.run.collect import RECORDS, run_pass

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


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("data", nargs=argparse.REMAINDER, help="train.py's words for its images, as --synthetic")
    arguments = parser.parse_args()
    run, data = arguments.run.absolute(), arguments.data
    if not (run / "summary.json").is_file():
        parser.fail(f"{arguments.run} is not the folder of a run: it has no summary.json; name one that train.py wrote")
    (run / RECORDS).mkdir(exist_ok=True)
    error = run_pass("the profiled pass", [*PROFILE_PASS, str(run), *data], ROOT, print)
    if error:
        sys.exit(1)
    trace, about = read(run / RECORDS / "trace.json.gz"), read_json(run / RECORDS / "profile.json")
    found = longest(trace, about, step_ms(run))
    write_json(run / "kernels.json", found)
    print(f"{len(found['kernels'])} kernels written to {run / 'kernels.json'}; lacks: {found['lacks'] or 'nothing'}")


if __name__ == "__main__":
    main()
