"""Samples a GPU into a file until its standard input closes: python -m profiling.run.sampler UUID PATH [--period-ms 25]

It is a process of its own, because a thread would take the interpreter from a training loop that launches kernels. The
run holds the other end of the pipe, which closes when the run closes it or dies. Imports no torch.

The file is JSON lines. First {"version", "uuid", "gpu", "period_ms", "unavailable": {field: reason}, "reason": null, or
why there is nothing to sample}; then samples, each complete on its own; at last {"end": why}.
"""

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiling.device import nvml
from profiling.output.files import append_jsonl

PERIOD_MS = 25.0
NICENESS = 5
"""The run goes first where cores are short."""
STOPPED = "stopped"
NO_GPU = "none"
"""The UUID of a run that is not on a GPU."""


def header(
    uuid: str | None, gpu: str | None, period_ms: float, unavailable: dict[str, str], reason: str | None = None
) -> dict[str, Any]:
    """The first row. With a `reason` there are no samples, and no field is available."""
    unavailable = dict.fromkeys(nvml.FIELDS, reason) if reason else unavailable
    about = {"version": 1, "uuid": uuid, "gpu": gpu, "period_ms": period_ms}
    return about | {"unavailable": unavailable, "reason": reason}


def record(sample: Callable[[], nvml.GpuSample], first: dict[str, Any], path: Path, stopped: threading.Event) -> None:
    """Append to `path` the header `first`, a sample each period, and a last row that says why it ended.

    It ends when `stopped` is set, when the process that started this one is gone, and when a row cannot be written.
    Raises OSError where not even the header can be.
    """
    append_jsonl(path, first)
    parent, period_ns, before = os.getppid(), max(round(first["period_ms"] * 1e6), 1), None
    why, due_ns = STOPPED, time.monotonic_ns()
    while not stopped.wait(max(due_ns - time.monotonic_ns(), 0) / 1e9):
        if os.getppid() != parent:  # a forked child of the run may still hold the pipe
            why = "the run's process is gone"
            break
        try:
            size = path.stat().st_size
            append_jsonl(path, sample()._asdict())
            before = size
        except Exception as error:  # a full disk or anything else: the reader learns it
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            break
        late_ns = max(time.monotonic_ns() - due_ns, 0)
        due_ns += period_ns * (1 + late_ns // period_ns)
    try:
        append_jsonl(path, {"end": why})
    except OSError:  # on a full disk the last sample, which begins at byte `before`, makes room
        with contextlib.suppress(OSError):
            if before is not None:
                os.truncate(path, before)
                append_jsonl(path, {"end": why})


def stdin_closes() -> threading.Event:
    """An event that is set when standard input is at its end."""
    closed = threading.Event()

    def wait() -> None:
        with contextlib.suppress(OSError):  # it was never open
            # Not sys.stdin: a daemon thread inside its lock would keep the interpreter from ending.
            while os.read(0, 4096):
                pass
        closed.set()

    threading.Thread(target=wait, daemon=True).start()
    return closed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uuid", help=f'"GPU-...", or "{NO_GPU}"')
    parser.add_argument("path", type=Path)
    parser.add_argument("--period-ms", type=float, default=PERIOD_MS)
    arguments = parser.parse_args()
    stopped = stdin_closes()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    uuid = None if arguments.uuid == NO_GPU else arguments.uuid
    path, period_ms = arguments.path, arguments.period_ms
    try:
        gpu = nvml.Gpu(uuid)
    except nvml.UnavailableError as error:
        append_jsonl(path, header(uuid, None, period_ms, {}, reason=str(error)))
        return 0
    record(gpu.sample, header(uuid, gpu.name, period_ms, gpu.unavailable), path, stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
