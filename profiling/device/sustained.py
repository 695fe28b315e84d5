"""Calls without a pause, timed by the window: the rate that a device sustains.

A window is a number of calls. Windows follow one another immediately, after the same calls have run hot for a quarter
of the time. On a GPU one window of calls is always queued while the device works on another.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from profiling.device import nvml
from profiling.device.environment import gpu_uuid

WINDOWS = 8
"""In an eighth of two seconds clocks and power settle: a window's rate can be kept up."""
FEWEST = 3
"""Windows at least."""
QUIET = 0.9
"""With a smaller share of the cores' time this process had to share its CPU."""


class Sustained(NamedTuple):
    """Seconds per call in the best window and in the median one; `seconds` is how long all `samples` windows took.

    `power_capped_share` is the share of the windows, 0 to 1, in which the power limit held the clock down; None where
    it is not known.
    """

    best_s: float
    median_s: float
    samples: int
    seconds: float
    power_capped_share: float | None = None


class CpuWatch:
    """Times calls that return when they are done and use all of PyTorch's threads."""

    hot_clock: int | None = None
    power_capped_share: float | None = None

    def __init__(self) -> None:
        self._wall_s = self._cpu_s = 0.0

    def time(self, run: Callable[[], Any], calls: int) -> float:
        """Seconds of `calls` calls."""
        cpu_s, start_ns = time.process_time(), time.perf_counter_ns()
        for _ in range(calls):
            run()
        wall_s = (time.perf_counter_ns() - start_ns) / 1e9
        self._wall_s += wall_s
        self._cpu_s += time.process_time() - cpu_s
        return wall_s

    def windows(self, run: Callable[[], Any], calls: int, seconds: float) -> list[float]:
        """Seconds of each window of `calls` calls, one after another until `seconds` have passed."""
        taken: list[float] = []
        while len(taken) < FEWEST or sum(taken) < seconds:
            taken.append(self.time(run, calls))
        return taken

    def clock(self) -> None:
        """A CPU has no SM clock."""

    def reasons(self) -> tuple[str, ...]:
        """Other processes, if this one's threads got less than QUIET of the time."""
        got = self._cpu_s / (self._wall_s * torch.get_num_threads()) if self._wall_s else 1.0
        return () if got >= QUIET else (f"other processes or idle threads, {1 - got:.0%} of the time",)


class CudaWatch:
    """Times calls that only queue work, by events on the stream of `device`, which must be the current device.

    `hot_clock` is the SM clock in MHz during the last window so far, and `power_capped_share` as `Sustained` has it for
    the last call of `windows`; None where NVML cannot tell.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sample = nvml.sampler(gpu_uuid(device))
        self.hot_clock: int | None = None
        self.power_capped_share: float | None = None
        self._reasons: set[str] | None = None

    def time(self, run: Callable[[], Any], calls: int) -> float:
        """Seconds of `calls` calls on the device."""
        torch.cuda.synchronize(self.device)
        start = _mark()
        for _ in range(calls):
            run()
        end = _mark()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def windows(self, run: Callable[[], Any], calls: int, seconds: float) -> list[float]:
        """Seconds of each window of `calls` calls on the device, until about `seconds` have passed.

        Windows with the clocks held down by heat or a power brake are left out, unless fewer than FEWEST remain.
        """
        torch.cuda.synchronize(self.device)
        begin, marks, seen = time.perf_counter(), [_mark()], []
        while len(marks) <= FEWEST or time.perf_counter() - begin < seconds:
            for _ in range(calls):
                run()
            marks.append(_mark())
            marks[-2].synchronize()  # bounds the queue: the device is left with the window just queued
            seen.append(self._look())
        marks[-1].synchronize()
        self.hot_clock = seen[-1].sm_clock_mhz
        capped = [sample.power_capped for sample in seen if sample.power_capped is not None]
        self.power_capped_share = statistics.fmean(capped) if capped else None
        taken = [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]
        calm = [window_s for window_s, sample in zip(taken, seen, strict=True) if not sample.disturbed]
        return calm if len(calm) >= FEWEST else taken

    def clock(self) -> int | None:
        """The SM clock in MHz now, None where NVML cannot tell; records the reasons that hold it down."""
        return self._look().sm_clock_mhz

    def _look(self) -> nvml.GpuSample:
        sample = self.sample() or nvml.GpuSample()
        if sample.reasons is not None:
            self._reasons = (self._reasons or set()) | nvml.THROTTLING.intersection(sample.reasons)
        return sample

    def reasons(self) -> tuple[str, ...] | None:
        """The reasons that held the clock down so far, in words; None where NVML cannot tell."""
        return None if self._reasons is None else tuple(sorted(self._reasons))


def sustain(watch: CpuWatch | CudaWatch, run: Callable[[], Any], seconds: float) -> Sustained:
    """Run `run` hot for `seconds` / 4 and then, timed, for `seconds`, in WINDOWS windows or more."""
    calls, window_s = 1, seconds / WINDOWS
    while (took_s := watch.time(run, calls)) < window_s / 4:
        calls *= 4
    calls = max(1, round(calls * window_s / took_s))
    watch.windows(run, calls, seconds / 4)
    windows = watch.windows(run, calls, seconds)
    best_s, median_s = min(windows) / calls, statistics.median(windows) / calls
    return Sustained(best_s, median_s, len(windows), sum(windows), watch.power_capped_share)


def captured(run: Callable[[], Any], times: int) -> Callable[[], Any]:
    """A replay of `times` calls of `run`, which has run before, as one CUDA graph: one launch of the host."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return graph.replay


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
