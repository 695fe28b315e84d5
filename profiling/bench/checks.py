"""Every kernel of the benchmark run once and compared with float64, untimed.

Compiling takes most of the time, and a kernel that faults or hangs takes its process with it. So each op's variant has
a process of its own, a bounded number at a time. A process that dies costs the check that it died in, and a new one
goes on behind that; a process that is silent for too long is killed, and its other checks are not begun. This module,
run as a program, is such a process: it reads checks from stdin and writes a row for each to stdout.
"""

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels import jit, tiles
from kernels.contract import dtype_name
from kernels.conv_shape import parse
from profiling import ROOT
from profiling.bench import cases
from profiling.bench.case import Case, verified
from profiling.bench.measure import BATCH, QUICK_CPU_BATCH, lost
from profiling.bench.timing import first_line
from profiling.output.errors import NoDeviceError
from profiling.output.files import append_jsonl
from profiling.output.terminal import Terminal

SCHEMA = 1
RIGHT, WRONG, FAILED, UNKNOWN = "right", "wrong", "failed", "unknown"
LIMIT_S = {"cuda": 90.0, "cpu": 1800.0}
"""Between two results, with a process's start and compiling; the interpreter may take minutes for one."""
GPU_BYTES = 4 << 30
"""Memory of a process on a GPU: its context, and the largest case at the training batch in float64."""
SIGNAL_S = 0.2
"""A signal to the whole group may end a process before it reaches and cancels this one; no check is at fault then."""


class Check(NamedTuple):
    """A case by its name, at a number of images."""

    case: str
    images: int


def run(
    chosen: Sequence[Case],
    dtype: torch.dtype,
    terminal: Terminal,
    out: Path | None = None,
    jobs: int | None = None,
    images: int | None = None,
    limit_s: float | None = None,
) -> int:
    """`python -m profiling bench --check`: check every case, and report each check at once, by a line and a row.

    Rows are appended to `out`. `jobs` processes run at a time, 1 being this process itself, without a time limit;
    every check has `images` images and `limit_s` seconds. None is the device's default.

    Returns the exit code, 1 unless all were right. Raises NoDeviceError where the kernels cannot run; KeyboardInterrupt
    and SystemExit after the verdict on the checks so far; OSError where a row cannot be written.
    """
    device = _device()
    reason = jit.unavailable(device)
    if reason:
        raise NoDeviceError(f"--check runs the kernels: {reason}")
    known = {case.name: case for case in chosen}
    groups = planned(chosen, images_on(device) if images is None else (images,))
    total, found = sum(map(len, groups)), collections.Counter()

    def report(row: dict[str, Any]) -> None:
        found[row["status"]] += 1
        if out is not None:
            append_jsonl(out, row)
        said = row["status"] if row["error"] is None else f"{row['status']}: {row['error']}"
        tile = f"  ({tiles.Tile(**row['tile'])})" if row["error"] and row["tile"] else ""
        terminal.say(f"{row['case']:<50} {row['batch']:>4} images  {said}{tile}")

    def failure(one: Check, status: str, error: str) -> dict[str, Any]:
        return row(one, known, device, dtype, status, error)

    try:
        if jobs == 1:
            for one in one_after_another(groups, known, device, dtype):
                report(one)
        else:
            command = [sys.executable, "-m", "profiling.bench.checks", dtype_name(dtype)]
            Pool(command, jobs or slots(device), limit_s or LIMIT_S[device.type], report, failure).run(groups)
    finally:
        words = ", ".join(f"{found[status]} {status}" for status in (RIGHT, WRONG, FAILED, UNKNOWN))
        terminal.say(f"{found.total()} of {total} checks of {len(chosen)} cases on {device}: {words}")
    return 0 if found[RIGHT] == total else 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def planned(chosen: Sequence[Case], images: Sequence[int]) -> list[list[Check]]:
    """The checks of each process: those of an op and variant, all with few images before any with many."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for n in images:
        for case in chosen:
            groups.setdefault((case.op, case.variant), []).append(Check(case.name, n))
    return list(groups.values())


def images_on(device: torch.device) -> tuple[int, ...]:
    """Two, and on a GPU the training batch too: only that fills the grid and has other row tiles than an image."""
    return (QUICK_CPU_BATCH, BATCH) if device.type == "cuda" else (QUICK_CPU_BATCH,)


def slots(device: torch.device) -> int:
    """The processes at a time that the cores, and a GPU's memory, bear."""
    cores = os.cpu_count() or 1
    if device.type != "cuda":
        return cores
    return max(1, min(cores, torch.cuda.get_device_properties(device).total_memory // GPU_BYTES))


def check(one: Check, known: dict[str, Case], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Run a case's kernels; the row. For many images the device computes float64's result, in time."""
    case = known[one.case]
    judge = torch.device("cpu") if one.images <= QUICK_CPU_BATCH else device
    try:
        error = verified(case, device, dtype, one.images, judge)
        status = WRONG if error else RIGHT
    except Exception as raised:  # a compiler's or a launch's failure is the finding
        status, error = FAILED, first_line(raised)
    return row(one, known, device, dtype, status, error)


def one_after_another(
    groups: Sequence[list[Check]], known: dict[str, Case], device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """The rows of all checks in this process; after its device is lost the rest are unknown."""
    down = False
    for one in itertools.chain.from_iterable(groups):
        if down:
            yield row(one, known, device, dtype, UNKNOWN, "not begun: a check before it lost the device")
            continue
        found = check(one, known, device, dtype)
        down = found["status"] == FAILED and lost(device)
        yield found


def row(
    one: Check, known: dict[str, Case], device: torch.device, dtype: torch.dtype, status: str, error: str | None
) -> dict[str, Any]:
    """The record of a check: `status` is "right", "wrong", "failed", or "unknown" if it was not begun; `error` is the
    reason unless right. `tile` is a convolution's."""
    case, tile = known[one.case], None
    if case.op in tiles.OPS:
        tile = dataclasses.asdict(tiles.tile(case.op, parse(case.shape), dtype, tiles.gpu_of(device)))
    return {
        "schema": SCHEMA,
        "kind": "check",
        **{"case": case.name, "op": case.op, "variant": case.variant, "shape": case.shape},
        **{"dtype": dtype_name(dtype), "batch": one.images, "device": str(device), "tile": tile},
        **{"status": status, "error": error},
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@dataclasses.dataclass(frozen=True)
class Pool:
    """Processes that check: `command` starts one, at most `slots` run, each may be silent for `limit_s` seconds.

    `failure(check, status, error)` makes the row of a check that has none of its own.
    """

    command: Sequence[str]
    slots: int
    limit_s: float
    report: Callable[[dict[str, Any]], None]
    failure: Callable[[Check, str, str], dict[str, Any]]

    def run(self, groups: Sequence[list[Check]]) -> None:
        """Run every check of every group; `report` gets each row at once.

        Raises KeyboardInterrupt, or SystemExit of 143 for SIGTERM, after the end of all processes.
        """
        asyncio.run(self._all(groups))

    async def _all(self, groups: Sequence[list[Check]]) -> None:
        loop, me, terminated = asyncio.get_running_loop(), asyncio.current_task(), []
        loop.add_signal_handler(signal.SIGTERM, lambda: (terminated.append(True), me.cancel()))
        free = asyncio.Semaphore(self.slots)
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in sorted(groups, key=len, reverse=True):  # the longest must not begin last
                    tasks.create_task(self._group(list(group), free))
        except asyncio.CancelledError:
            if terminated:
                raise SystemExit(128 + signal.SIGTERM) from None
            raise
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # a disk that is full; the others were cancelled for it
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    async def _group(self, left: list[Check], free: asyncio.Semaphore) -> None:
        async with free:
            while left:
                await self._process(left)

    async def _process(self, left: list[Check]) -> None:
        """Run one process until it has done all that is `left`, or cannot go on; drops finished checks from `left`."""
        threads = str(max(1, (os.cpu_count() or 1) // self.slots))
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        with tempfile.TemporaryFile() as words:
            pipe = asyncio.subprocess.PIPE
            child = await asyncio.create_subprocess_exec(
                *self.command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=words
            )
            try:
                child.stdin.write(json.dumps(left).encode())
                child.stdin.close()
                while left:
                    async with asyncio.timeout(self.limit_s):  # wait_for of Python 3.11 may swallow a cancellation
                        line = await child.stdout.readline()
                    if not line:
                        break
                    found = json.loads(line)
                    left.pop(0)
                    self.report(found["row"])
                    if found["lost"]:
                        return  # the process ends itself, and another does the rest
                if left:
                    await child.wait()
                    await asyncio.sleep(SIGNAL_S)
                    reason = f"the process ended with {_end(child.returncode, words)}"
                    self.report(self.failure(left.pop(0), FAILED, reason))
            except TimeoutError:
                self.report(self.failure(left.pop(0), FAILED, f"no result within {self.limit_s:g} s"))
                for one in left:
                    self.report(self.failure(one, UNKNOWN, "not begun: a check of this op before it hung"))
                left.clear()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(10):  # a driver may not let go of it
                        await child.wait()


def _end(code: int, words: Any) -> str:
    """The signal or exit code of a process, and its last line on stderr."""
    words.seek(0)
    last = next((line for line in reversed(words.read().decode(errors="replace").splitlines()) if line.strip()), "")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{how}: {last.strip()[:200]}" if last else how


def _work(dtype: torch.dtype) -> None:
    """Run the checks on stdin, until the device is lost to this process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a compiler's output is no answer
    device, known = _device(), {case.name: case for case in cases.cases()}
    for one in itertools.starmap(Check, json.load(sys.stdin)):
        found = check(one, known, device, dtype)
        down = found["status"] == FAILED and lost(device)
        print(json.dumps({"row": found, "lost": down}), file=answers, flush=True)
        if down:
            os._exit(0)  # a lost device's memory cannot be freed


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    _work(getattr(torch, sys.argv[1]))
