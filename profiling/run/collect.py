"""The records of a profiled run in RUN/records, and the pass under the profiler that comes after it.

The run is timed without a profiler: its phases, the starts of its steps, and the driver's samples, which a process of
its own takes. Then a fresh process takes one profiling session: later sessions of a process lose kernels, and a process
is slower after one. Nothing here fails a run: a record that cannot be collected is missing, and the account says so.
"""

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from profiling import ROOT
from profiling.device.environment import gpu_uuid
from profiling.output.files import replacing, write_json
from profiling.run import telemetry
from profiling.run.clock import Clock, StepClock

VERSION = 1
WAIT_STEPS, WARM_UP_STEPS, ACTIVE_STEPS = 3, 10, 20
"""Steps of the profiled pass: not profiled, profiled and dropped, recorded. Many are dropped, since CUPTI loses kernels
where a session begins (pytorch/pytorch#192021)."""
CPU_WARM_UP_STEPS = 3
"""Fewer without CUPTI, where a step may take seconds."""
EAGER_STEP = 2
"""Index of the eager step among the recorded ones: not the first, since the others are compared with it, and among the
replays, so that it has their clocks."""

PATIENCE_S = 1800
"""Seconds that a pass may take."""

PROFILE_PASS = [sys.executable, str(ROOT / "train.py"), "--profile-pass"]
"""The command of a profiled pass, before the folder of its run."""
RECORDS = "records"


class Collection:
    """The records of a timed run on `device`: `steps` wraps its epochs, `finish` is called at its end."""

    def __init__(self, out: Path, device: torch.device, warn: Callable[[str], None]):
        self.folder, self.warn = out / RECORDS, warn
        with contextlib.suppress(OSError):  # what cannot be written is warned of at the end
            self.folder.mkdir(parents=True, exist_ok=True)
        self.steps = StepClock(device)
        uuid = gpu_uuid(device) if device.type == "cuda" else None
        self.telemetry = telemetry.start(uuid, self.folder / "telemetry.jsonl")

    def finish(self, clock: Clock) -> None:
        """End the telemetry; write phases and steps. `clock` has been stopped."""
        self.telemetry.stop()
        phases = [phase._asdict() for phase in clock.phases]
        end_ns = clock.start_ns + clock.wall_ns()
        record = {"version": VERSION, "start_ns": clock.start_ns, "end_ns": end_ns, "phases": phases}
        for name, value in (("phases", lambda: record), ("steps", self.steps.to_json)):
            try:
                write_json(self.folder / f"{name}.json", value())
            except (OSError, RuntimeError) as error:  # RuntimeError: events of a device that has failed
                self.warn(f"{self.folder}: {error}; the report will lack the {name}")


def run_pass(what: str, command: list[str], folder: Path, warn: Callable[[str], None]) -> str | None:
    """Run `command` in `folder`; warn, and return why, where it fails."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, cwd=folder, text=True, timeout=PATIENCE_S, **streams)
        # Kineto announces its sessions there too.
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("USDT:")]
        error = None if done.returncode == 0 else f"exit code {done.returncode}: {(lines or ['no word'])[-1][:500]}"
    except subprocess.TimeoutExpired:
        error = f"it was not done after {PATIENCE_S} s"
    except OSError as refused:
        error = str(refused)
    if error:
        warn(f"{what} failed, {error}; the report will lack its figures")
    return error


def record_trace(
    steps: Iterator[int],
    device: torch.device,
    folder: Path,
    about: dict[str, Any],
    eagerly: Callable[[], contextlib.AbstractContextManager] | None = None,
    active: int = ACTIVE_STEPS,
) -> None:
    """Profile `steps`, which trains a step at a time and yields the images of each.

    Where steps are replayed, one more is recorded among them within `eagerly()`: only that one tells which operation
    launched a kernel, and the kernels that a replay should hold (`profiling.account.cross_check`).
    Writes trace.json.gz and profile.json to `folder`; `about` is the environment. Raises OSError where it cannot.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])

    def save(session: Any) -> None:
        with replacing(folder / "trace.json.gz") as new:
            session.export_chrome_trace(str(new))

    clock, images = StepClock(device), []
    warm_up = WARM_UP_STEPS if device.type == "cuda" else CPU_WARM_UP_STEPS
    before, recorded = WAIT_STEPS + warm_up, active + (1 if eagerly else 0)
    plan = schedule(wait=WAIT_STEPS, warmup=warm_up, active=recorded, repeat=1)
    if eagerly:
        # The unrecorded first step too: it takes the searches and allocations of an eager step.
        steps = _with_eager(steps, {0, before + EAGER_STEP}, eagerly)
    with profile(activities=activities, schedule=plan, on_trace_ready=save, record_shapes=True) as session:
        for number, count in enumerate(clock.each(steps), start=1):
            images.append(count)
            if number == before and device.type == "cuda":
                torch.cuda.synchronize(device)  # no kernel of an earlier step within the recorded ones
            if number == before + recorded:
                clock.end_epoch()  # before the session ends, which takes longer than a step
                break
            session.step()
    record = {"version": VERSION, "eager_step": EAGER_STEP if eagerly else None, "error": None, "environment": about}
    times = {"step_images": images[before:], "step_ns": clock.durations_ns()[before:]}
    write_json(folder / "profile.json", record | times)


def _with_eager(
    steps: Iterator[int], numbers: set[int], eagerly: Callable[[], contextlib.AbstractContextManager]
) -> Iterator[int]:
    """`steps`; those whose index is in `numbers` run within `eagerly()`."""
    for number in itertools.count():
        with eagerly() if number in numbers else contextlib.nullcontext():
            images = next(steps, None)
        if images is None:
            return
        yield images


def record_failure(folder: Path, error: str) -> None:
    """Record that the profiled pass failed; ignored if the disk is full."""
    nothing = {"version": VERSION, "eager_step": None, "step_images": [], "step_ns": [], "environment": None}
    with contextlib.suppress(OSError):
        write_json(folder / "profile.json", nothing | {"error": error})
