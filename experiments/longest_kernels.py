"""What a step of a finished run is made of, the longest kernels first: python -m experiments.longest_kernels RUN ...

The words after RUN name its data, as for train.py. The run's steps are profiled in a process of their own, and of each
kernel the time in a step is written to RUN/kernels.json. What the profiler said is held against the run's own steps,
which had no profiler: where the sum of the kernels is not within 10 % of them, the list is marked as not to be trusted.
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import train
from profiling.collection import RECORDS, run_pass
from profiling.records import read_json, read_jsonl, write_json
from profiling.trace import Trace, read

LONGEST = 20
AGREE = 0.10
"""Of the timed step: CUPTI 13.0 loses and lengthens kernels of replayed graphs (pytorch/kineto#1165)."""


def step_ms(run: Path) -> float | None:
    """Milliseconds of a step of the run: the median of its epochs after the first, which warms up. None if unknown."""
    rows = read_jsonl(run / "log.jsonl")
    steps = [after["step"] - before["step"] for before, after in zip([{"step": 0}, *rows], rows, strict=False)]
    each = [1e3 * row["epoch_train_s"] / n for row, n in zip(rows, steps, strict=True) if n > 0]
    return statistics.median(each[1:] or each) if each else None


def longest(trace: Trace, about: dict[str, Any], timed_ms: float | None) -> dict[str, Any]:
    """The longest kernels of a mean recorded step; `about` is the pass's profile.json, `timed_ms` the run's own step.

    The step that was recorded eagerly, for the names of the operations, is left out.
    """
    steps, skipped = about.get("active_steps") or len(trace.steps), about.get("eager_steps") or 0
    ran = [kernel for kernel in trace.kernels if (index := trace.step_of(kernel)) is not None and index >= skipped]
    total, calls, seen = defaultdict(int), defaultdict(int), set()
    for kernel in ran:
        total[kernel.name] += kernel.end_ns - kernel.start_ns
        piece = kernel.kind == "cpu" and (kernel.name, kernel.correlation) in seen  # of an operation already counted
        calls[kernel.name] += not piece
        seen.add((kernel.name, kernel.correlation))
    sum_ms, lacks = sum(total.values()) / max(steps, 1) / 1e6, list(trace.lacks)
    if timed_ms and abs(sum_ms - timed_ms) > AGREE * timed_ms:
        lacks.append(f"its kernels sum to {sum_ms:.3f} ms a step, and the run's steps took {timed_ms:.3f}")
    order = sorted(total, key=lambda name: -total[name])[:LONGEST]
    return {
        "steps": steps,
        "sum_ms": sum_ms,
        "timed_ms": timed_ms,
        "kernels_a_step": sum(calls.values()) / max(steps, 1),
        "lacks": lacks,
        "kernels": [
            {"name": name, "us": total[name] / max(steps, 1) / 1e3, "calls": calls[name] / max(steps, 1)}
            for name in order
        ],
    }


def main() -> None:
    run, data = Path(sys.argv[1]).absolute(), sys.argv[2:]
    (run / RECORDS).mkdir(exist_ok=True)
    error = run_pass("the profiled pass", [*train.PROFILE_PASS, str(run), *data], train.ROOT, print)
    if error:
        sys.exit(1)
    trace, about = read(run / RECORDS / "trace.json.gz"), read_json(run / RECORDS / "profile.json")
    found = longest(trace, about, step_ms(run))
    write_json(run / "kernels.json", found)
    print(f"{len(found['kernels'])} kernels written to {run / 'kernels.json'}; lacks: {found['lacks'] or 'nothing'}")


if __name__ == "__main__":
    main()
