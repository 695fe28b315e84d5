"""The protocol of the micro-benchmarks: the time of a function, and its uncertainty.

Compared functions take turns, A B B A, so that a drift of the machine does not read as a difference. A sample taken
while heat or a power brake held the GPU's clocks down is discarded and taken again, a bounded number of times; one
under the power cap is kept and counted, since a large GPU does large products there. Sampling stops when the mean is
known well enough. The result is a median with its bootstrap interval, and a verdict between two.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from profiling.device.nvml import GpuSample

FEWEST = 3
"""Samples that a median needs."""
SAME_WITHIN = 0.02
"""Two medians are the same if their ratio is certain to be within this of 1."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Plan:
    """When to stop: after `min_samples` as soon as the relative standard error of the mean is below `relative_error`,
    after `seconds` or `max_samples` in any case, and after `max_discarded` samples that were disturbed."""

    min_samples: int = 30
    max_samples: int = 1000
    relative_error: float = 0.005
    seconds: float = 2.0
    max_discarded: int = 30


QUICK = Plan(min_samples=5, max_samples=30, relative_error=0.02, seconds=0.2, max_discarded=5)
"""For a look; not to be quoted."""


@dataclass
class Samples:
    """Times of one function in microseconds, and the reasons for discarded ones.

    `capped` tells for each kept sample whether it was under the power cap, where that is known. `error` is the
    exception of the function or its timer that ended the sampling.
    """

    us: list[float] = field(default_factory=list)
    capped: list[bool] = field(default_factory=list)
    discarded: int = 0
    reasons: set[str] = field(default_factory=set)
    error: str | None = None
    spent_s: float = 0.0
    last: GpuSample | None = None

    @property
    def relative_error(self) -> float:
        """Standard error of the mean over the mean; infinite below two samples."""
        if len(self.us) < 2:
            return math.inf
        return statistics.stdev(self.us) / math.sqrt(len(self.us)) / statistics.fmean(self.us)

    @property
    def power_capped_share(self) -> float | None:
        """The share of the samples, 0 to 1, under the power cap; None where nobody can tell."""
        return statistics.fmean(self.capped) if self.capped else None

    def converged(self, plan: Plan) -> bool:
        """Whether the plan's precision is reached."""
        return len(self.us) >= plan.min_samples and self.relative_error < plan.relative_error

    def done(self, plan: Plan) -> bool:
        """Whether to stop. A slow function gets FEWEST samples even after its time is up."""
        if self.error or self.discarded >= plan.max_discarded or len(self.us) >= plan.max_samples:
            return True
        return self.converged(plan) or (len(self.us) >= FEWEST and self.spent_s >= plan.seconds)

    def refusal(self) -> str | None:
        """Why there is no result, or None if there is one."""
        if self.error:
            return self.error
        if len(self.us) >= FEWEST:
            return None
        attempts = self.discarded + len(self.us)
        return f"throttled ({', '.join(sorted(self.reasons))}) in {self.discarded} of {attempts} attempts"


def interleave(
    runs: dict[str, Callable[[], Any]],
    timer: Callable[[Callable[[], Any]], float],
    plan: Plan,
    gpu: Callable[[], GpuSample | None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Sample every function of `runs` by `timer`, which returns microseconds, in turns A B C, C B A, A B C, ...

    A function drops out when it is done; one that raises, or whose launch cannot be hidden, with an `error`. `gpu` is
    asked after every sample.
    """
    samples = {name: Samples() for name in runs}
    order = list(runs)
    while order := [name for name in order if not samples[name].done(plan)]:
        for name in order:
            _take(samples[name], runs[name], timer, plan, gpu, now)
        order.reverse()
    return samples


def _take(taken: Samples, run: Callable, timer: Callable, plan: Plan, gpu: Callable, now: Callable) -> None:
    """One valid sample in this turn, or the end of the retries."""
    while taken.discarded < plan.max_discarded:
        before = now()
        try:
            us = timer(run)
        except Exception as error:  # whatever a compiler, a library or the timer raises is the finding
            taken.error = first_line(error)
            return
        taken.spent_s += now() - before
        taken.last = gpu()
        if taken.last is None or not taken.last.disturbed:
            taken.us.append(us)
            if taken.last is not None and taken.last.power_capped is not None:
                taken.capped.append(taken.last.power_capped)
            return
        taken.discarded += 1
        taken.reasons.update(taken.last.reasons)


def first_line(error: Exception) -> str:
    """The error as a reason: its kind and the first line of what it says, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class Summary(NamedTuple):
    """Microseconds; `low` and `high` bound the median with 95 % confidence."""

    n: int
    median: float
    p20: float
    p80: float
    low: float
    high: float


def summarise(us: Sequence[float]) -> Summary:
    """The summary of at least FEWEST samples; raises ValueError for fewer."""
    if len(us) < FEWEST:
        raise ValueError(f"{len(us)} samples, expected at least {FEWEST}")
    p20, median, p80 = (float(v) for v in np.percentile(us, (20, 50, 80)))
    low, high = (float(v) for v in np.percentile(_medians(us, seed=0), (2.5, 97.5)))
    return Summary(len(us), median, p20, p80, low, high)


def _medians(us: Sequence[float], seed: int) -> np.ndarray:
    """Medians of resamples with replacement (Efron's bootstrap); the same samples give the same interval."""
    return np.median(np.random.default_rng(seed).choice(us, (RESAMPLES, len(us))), axis=1)


class Verdict(NamedTuple):
    """`speedup` is the other's median over ours, with its 95 % interval; above 1 ours is faster."""

    word: str
    speedup: float
    low: float
    high: float


def verdict(ours: Sequence[float], other: Sequence[float]) -> Verdict:
    """FAST or SLOW where the interval excludes 1, SAME where it lies within SAME_WITHIN of 1, else AMBIGUOUS."""
    ratios = _medians(other, seed=1) / _medians(ours, seed=2)
    low, high = (float(v) for v in np.percentile(ratios, (2.5, 97.5)))
    if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN:
        word = "SAME"
    else:
        word = "FAST" if low > 1 else "SLOW" if high < 1 else "AMBIGUOUS"
    return Verdict(word, float(np.median(other) / np.median(ours)), low, high)


class CpuTimer:
    """Wall time of a call. Caches are as the call before left them."""

    source, modes = "monotonic clock around the call", ("hot",)

    def for_mode(self, mode: str) -> Callable[[Callable[[], Any]], float]:
        """The timer of a mode."""

        def sample(run: Callable[[], Any]) -> float:
            start_ns = time.perf_counter_ns()
            run()
            return (time.perf_counter_ns() - start_ns) / 1e3

        return sample


class CudaTimer:
    """Device time between two events, with everything launched before the device reaches the first.

    A spin kernel keeps the device busy while the host launches; if the device had passed the first event by then, the
    sample is the host's, and is taken again behind a longer spin. Cold: a buffer of twice the L2 cache is written
    before. Hot: the function runs once before. An empty function measures some microseconds too.
    """

    source, modes = "CUDA events, launch hidden behind a spin kernel", ("cold", "hot")
    LONGEST_SPIN = 1 << 30  # clock cycles, about half a second

    def __init__(self, device: Any):
        import torch  # here, since `experiments steps` reads its plans before it loads torch

        self.torch, self.spin = torch, 1 << 18
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def for_mode(self, mode: str) -> Callable[[Callable[[], Any]], float]:
        """The timer of a mode, "cold" or "hot"."""
        return lambda run: self._sample(run, self.flush.zero_ if mode == "cold" else run)

    def _sample(self, run: Callable[[], Any], before: Callable[[], Any]) -> float:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        spin = self.spin
        while spin <= self.LONGEST_SPIN:
            before()
            self.torch.cuda._sleep(spin)
            start.record()
            run()
            end.record()
            hidden = not start.query()
            end.synchronize()
            if hidden:
                self.spin = spin  # for the next sample
                return start.elapsed_time(end) * 1e3
            spin *= 2
        raise RuntimeError("the launch cannot be hidden: the function waits for the device")
