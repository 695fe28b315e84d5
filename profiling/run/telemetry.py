"""The GPU while a run goes on: starting and stopping the process that samples it, and reading what it left.

Collection must cost a run no more than a moment: nothing here raises, or waits for long. What is missing is said in
words by `read`, from what the file holds; `profiling.run.sampler` names its rows. Imports no torch.
"""

import contextlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from profiling import ROOT
from profiling.device import nvml
from profiling.device.nvml import GpuSample
from profiling.output import numbers
from profiling.output.files import append_jsonl, read_bytes
from profiling.output.numbers import Number
from profiling.run import sampler

STOP_S = 2.0
"""How long the sampler may take to end before it is killed."""
KILL_S = 0.5
"""A process that waits inside a driver cannot even be killed; it is left to the system."""
FEWEST = 20
"""Samples below which shares and means say little."""
GAP_NS = 1_000_000_000
"""A hole in the samples that is worth a word."""
LARGEST = 2**63
"""No field comes near; what is larger, infinite or not a number is damage."""


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
    """What was sampled.

    unavailable  fields without a single value, and why
    lacks        what is missing, in sentences; empty for a run that was not on a GPU
    reason       why there is no telemetry at all, or None
    """

    samples: list[GpuSample]
    unavailable: dict[str, str]
    lacks: list[str]
    gpu: str | None = None
    period_ms: float | None = None
    reason: str | None = None

    def between(self, start_ns: int, end_ns: int) -> "Telemetry":
        """The same with the samples from `start_ns` to `end_ns`, both included."""
        return replace(self, samples=[s for s in self.samples if start_ns <= s.t_ns <= end_ns])

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
    """What a recorder left at `path`. Never raises: a file that is absent, empty or damaged is named in `lacks`."""
    try:
        *lines, torn = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return _nothing("the sampler left no file")
    except OSError as error:
        return _nothing(f"its file cannot be read: {error.strerror or error}")
    except ValueError as error:
        return _nothing(str(error))
    rows = [_row(line) for line in lines]
    if not rows or not isinstance(first := rows[0], dict) or "unavailable" not in first:
        return _nothing("the sampler ended before its first row" if not lines else "its file is not a recording")
    reason, gpu = _text(first.get("reason")), _text(first.get("gpu"))
    given = first["unavailable"] if isinstance(first["unavailable"], dict) else {}
    unavailable = {field: str(given[field]) for field in nvml.FIELDS if field in given}
    if reason:
        lacks = [] if first.get("uuid") is None else [f"GPU telemetry: {reason}"]
        return Telemetry([], dict.fromkeys(nvml.FIELDS, reason) | unavailable, lacks, gpu, reason=reason)
    samples = [s for row in rows[1:] if (s := _sample(row)) is not None]
    ends = [_text(row["end"]) for row in rows[1:] if isinstance(row, dict) and "end" in row]
    for field in nvml.FIELDS:
        if field not in unavailable and all(getattr(s, field) is None for s in samples):
            unavailable[field] = "no sample has a value of it"
    lacks = _lacks(samples, ends, damaged=len(rows) - 1 - len(samples) - len(ends), torn=bool(torn))
    return Telemetry(samples, unavailable, lacks, gpu, _number(first.get("period_ms")))


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


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | int | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return value if known else None


def _sample(row: Any) -> GpuSample | None:
    """The row as a sample; None for one without a time or with another field, and for what is no row at all."""
    if not isinstance(row, dict) or not row.keys() <= set(GpuSample._fields):
        return None
    if not isinstance(_number(row.get("t_ns")), int):
        return None
    values = {field: _number(row.get(field)) for field in GpuSample._fields if field != "reasons"}
    reasons = row.get("reasons")
    return GpuSample(**values, reasons=tuple(map(str, reasons)) if isinstance(reasons, list) else None)
