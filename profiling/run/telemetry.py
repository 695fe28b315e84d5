"""The GPU during a run: start and stop the process that samples it, and read its file.

Collection must cost a run no more than a moment: nothing here raises, or waits for long. `read` says in words what is
missing from the file, whose rows `profiling.run.sampler` describes. Imports no torch.
"""

import contextlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from profiling import ROOT
from profiling.device import nvml
from profiling.device.nvml import GpuSample
from profiling.output import numbers
from profiling.output.files import append_jsonl, read_bytes
from profiling.output.forms import COUNT, NUMBER, fit
from profiling.output.numbers import Number
from profiling.run import sampler

STOP_S = 2.0
"""The sampler may take so long to end before it is killed."""
KILL_S = 0.5
"""A process that waits inside a driver cannot be killed; it is left to the system."""
FEWEST = 20
"""Shares and means of fewer samples say little."""
GAP_NS = 1_000_000_000
"""A longer hole in the samples is reported."""
HEADER = {"uuid?": str, "gpu?": str, "period_ms?": NUMBER, "unavailable": {str: str}, "reason?": str}
SAMPLE = {"t_ns": COUNT, "reasons?": [str], **{f"{name}?": NUMBER for name in nvml.FIELDS if name != "reasons"}}
ROW = (SAMPLE, {"end": str})
"""The forms of the file's first row and of the others; see `profiling.output.forms`."""


class Recorder:
    """The sampler's process, or nothing where it could not be started."""

    def __init__(self, process: subprocess.Popen | None):
        self.process = process

    def stop(self) -> None:
        """End it, by force after STOP_S. Never raises; a second time does nothing."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        for seconds in (STOP_S, KILL_S):
            try:
                self.process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                self.process.kill()


def launch(command: Sequence[str]) -> subprocess.Popen:
    """A sampler's process, which ends when our end of its standard input closes. Raises OSError.

    It is in a process group of its own, so that Ctrl-C reaches the run and not it.
    """
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, process_group=0)


def start(uuid: str | None, path: Path, period_ms: float = sampler.PERIOD_MS) -> Recorder:
    """Sample the GPU of this UUID ("GPU-..."; None where the run is on none) into `path` until `stop()`. Never raises.

    A file of an earlier session at `path` is removed: its clock was another one.
    """
    path = Path(path).absolute()
    command = [sys.executable, "-m", "profiling.run.sampler", uuid or sampler.NO_GPU, str(path)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return Recorder(launch([*command, "--period-ms", str(period_ms)]))
    except Exception as error:  # whatever it is, the run goes on
        with contextlib.suppress(Exception):
            append_jsonl(path, sampler.header(uuid, None, period_ms, {}, f"the sampler could not be started: {error}"))
        return Recorder(None)


@dataclass(frozen=True)
class Telemetry:
    """The samples of a run.

    unavailable  fields without a single value, and why
    lacks        sentences on what is missing; empty for a run that was not on a GPU
    reason       why there is no telemetry at all, or None
    """

    samples: list[GpuSample]
    unavailable: dict[str, str]
    lacks: list[str]
    gpu: str | None = None
    period_ms: float | None = None
    reason: str | None = None

    def series(self, field: str) -> tuple[list[int], list[Any]]:
        """(t_ns, values) of the samples that have `field`. Activity has fewer than the others, at a slower pace."""
        known = [(s.t_ns, getattr(s, field)) for s in self.samples if getattr(s, field) is not None]
        return [t for t, _ in known], [value for _, value in known]

    def sm_clock(self, windows: Sequence[tuple[int, int]]) -> Number:
        """The mean SM clock in Hz of the samples within `windows`, (start_ns, end_ns) each.

        Unavailable below FEWEST of them.
        """
        times, clocks = self.series("sm_clock_mhz")
        if not clocks:
            return numbers.unavailable("Hz", self.unavailable.get("sm_clock_mhz", "no sample has the SM clock"))
        seen = [mhz for t, mhz in zip(times, clocks, strict=True) if any(a <= t <= b for a, b in windows)]
        if len(seen) < FEWEST:
            reason = f"too short: {len(seen)} samples of the SM clock in training, expected at least {FEWEST}"
            return numbers.unavailable("Hz", reason)
        source = f"mean of {len(seen)} NVML samples in training, {min(seen):,} to {max(seen):,} MHz"
        return numbers.measured(1e6 * fmean(seen), "Hz", source)

    def energy(self) -> Number:
        """Joules between the first and the last sample, from the driver's counter and not from an integral of power."""
        times, counter = self.series("energy_j")
        if len(counter) < 2:
            return numbers.unavailable("J", self.unavailable.get("energy_j", "fewer than two readings of the counter"))
        if any(after < before for before, after in itertools.pairwise(counter)):
            return numbers.unavailable("J", "the energy counter went backwards: the driver was reloaded")
        seconds = (times[-1] - times[0]) / 1e9
        source = f"NVML's energy counter, last reading minus first, {seconds:.2f} s apart"
        return numbers.measured(counter[-1] - counter[0], "J", source)

    def reason_shares(self) -> dict[str, float]:
        """The share of samples, 0 to 1, under each clock event reason that was seen, the largest first."""
        _, seen = self.series("reasons")
        return {reason: n / len(seen) for reason, n in Counter(itertools.chain.from_iterable(seen)).most_common()}

    def throttled_share(self) -> Number:
        """The share of samples, 0 to 1, in which heat or power held the clocks down; its source names the reasons."""
        _, seen = self.series("reasons")
        if not seen:
            return numbers.unavailable(
                "share", self.unavailable.get("reasons", "no sample has the clock event reasons")
            )
        share = sum(not nvml.THROTTLING.isdisjoint(reasons) for reasons in seen) / len(seen)
        held = [f"{name} in {s:.0%}" for name, s in self.reason_shares().items() if name in nvml.THROTTLING]
        words = ", ".join(held) or "no reason of heat or power"
        return numbers.measured(share, "share", f"NVML's clock event reasons in {len(seen)} samples: {words}")


def read(path: Path) -> Telemetry:
    """Read a recorder's file. Never raises: a file that is absent, empty or damaged is named in `lacks`."""
    try:
        *lines, torn = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return _nothing("the sampler left no file")
    except OSError as error:
        return _nothing(f"its file cannot be read: {error.strerror or error}")
    except ValueError as error:
        return _nothing(str(error))
    first = _row(lines.pop(0), HEADER) if (begun := bool(lines)) else None
    if first is None:
        return _nothing("its file is not a recording" if begun else "the sampler ended before its first row")
    reason, gpu, unavailable = first["reason"], first["gpu"], first["unavailable"]
    if reason:
        lacks = [] if first["uuid"] is None else [f"GPU telemetry: {reason}"]
        return Telemetry([], unavailable, lacks, gpu, reason=reason)
    rows = [_row(line, ROW) for line in lines]
    samples = [_sample(row) for row in rows if row and "t_ns" in row]
    ends = [row["end"] for row in rows if row and "end" in row]
    for field in nvml.FIELDS:
        if all(getattr(s, field) is None for s in samples):
            unavailable.setdefault(field, "no sample has a value of it")
    lacks = _lacks(samples, ends, damaged=rows.count(None), torn=bool(torn))
    return Telemetry(samples, unavailable, lacks, gpu, first["period_ms"])


def _sample(row: dict[str, Any]) -> GpuSample:
    reasons = row["reasons"]
    return GpuSample(**row | {"reasons": None if reasons is None else tuple(reasons)})


def _row(line: bytes, form: Any) -> dict[str, Any] | None:
    """A row of that form, None for a damaged one."""
    with contextlib.suppress(ValueError, RecursionError):
        return fit(json.loads(line), form, "row")


def _lacks(samples: list[GpuSample], ends: list[str | None], damaged: int, torn: bool) -> list[str]:
    lacks = []
    if not ends:
        half = ", in the middle of a row" if torn else ""
        lacks.append(f"GPU telemetry: the sampler was killed after {len(samples)} samples{half}")
    elif ends[-1] != sampler.STOPPED:
        lacks.append(f"GPU telemetry: the sampler ended early: {ends[-1]}")
    if damaged:
        lacks.append(f"GPU telemetry: {damaged} damaged rows were skipped")
    if len(samples) < FEWEST:
        lacks.append(f"GPU telemetry: too short, {len(samples)} samples, expected at least {FEWEST}")
    gap_ns = max((b.t_ns - a.t_ns for a, b in itertools.pairwise(samples)), default=0)
    if gap_ns > GAP_NS:
        lacks.append(f"GPU telemetry: no sample for {gap_ns / 1e9:.1f} s, the sampler was held up")
    return lacks


def _nothing(reason: str) -> Telemetry:
    return Telemetry([], dict.fromkeys(nvml.FIELDS, reason), [f"GPU telemetry: {reason}"], reason=reason)
