"""The protocol of the micro-benchmarks, with a timer and a GPU that follow a script."""

import dataclasses
import itertools
import random
import types

import pytest
import torch

from profiling.bench.timing import FEWEST, CpuTimer, CudaTimer, Plan, Samples, interleave, summarise, verdict
from profiling.device.nvml import GpuSample

COOL, HOT = GpuSample(1980, 3201, ()), GpuSample(1200, 3201, ("software thermal slowdown",))
CAPPED, BRAKED = GpuSample(1500, 3201, ("power cap",)), GpuSample(300, 3201, ("power cap", "power brake"))
PLAN = Plan(min_samples=4, max_samples=50, relative_error=0.01, seconds=1e9, max_discarded=6)


def scripted(us: dict[str, list[float]], calls: list[str]):
    """(runs, timer): each run's times in turn, the last one repeated; `calls` notes who was timed."""
    times = {name: itertools.chain(values, itertools.repeat(values[-1])) for name, values in us.items()}

    def timer(run):
        calls.append(run())
        return next(times[calls[-1]])

    return {name: (lambda name=name: name) for name in us}, timer


def test_functions_take_turns_abba():
    calls = []
    interleave(*scripted({"a": [1.0, 1.1], "b": [2.0, 2.1], "c": [3.0]}, calls), PLAN)
    assert "".join(calls[:12]) == "abccbaabccba"


def test_sampling_stops_when_the_mean_is_known_or_time_is_up():
    """But not before there is a median."""
    taken = interleave(*scripted({"steady": [5.0], "noisy": [1.0, 9.0] * 100}, []), PLAN)
    found = {name: (len(samples.us), samples.converged(PLAN)) for name, samples in taken.items()}
    assert found == {"steady": (PLAN.min_samples, True), "noisy": (PLAN.max_samples, False)}
    clock = itertools.count(step=10.0)
    taken = interleave(*scripted({"slow": [1.0, 9.0]}, []), Plan(seconds=1.0), now=lambda: next(clock))
    assert len(taken["slow"].us) == FEWEST


@pytest.mark.parametrize(
    ("states", "us", "discarded", "capped"),
    [
        ([HOT, HOT, COOL, HOT, COOL], [99.0, 99.0, 1.0, 99.0, 1.0], 3, 0.0),
        ([COOL, CAPPED, BRAKED, CAPPED], [1.0, 1.0, 99.0, 1.0], 1, 0.75),
        ([GpuSample(None, None, None)], [1.0], 0, None),
        ([GpuSample(1980, 3201, ("idle", "application clocks"))], [1.0], 0, 0.0),
    ],
    ids=["throttled", "power_capped_are_kept", "unknown", "idle"],
)
def test_throttled_samples_are_taken_again(states, us, discarded, capped):
    """A large GPU does its large products under the power cap and nowhere else; a brake beside it still discards."""
    said = itertools.chain(states, itertools.repeat(states[-1]))
    samples = interleave(*scripted({"a": us}, []), PLAN, lambda: next(said))["a"]
    assert samples.us == [1.0] * 4
    assert (samples.discarded, samples.power_capped_share, samples.refusal()) == (discarded, capped, None)
    assert samples.last.throttled == (CAPPED in states)


def test_retries_are_bounded_and_never_an_empty_success():
    for samples in interleave(*scripted({"a": [1.0], "b": [1.0]}, []), PLAN, lambda: HOT).values():
        assert (samples.us, samples.discarded) == ([], PLAN.max_discarded)
        assert samples.refusal() == "throttled (software thermal slowdown) in 6 of 6 attempts"


def test_a_function_that_fails_drops_out_and_the_others_go_on():
    times = [1.0, 1.0, 1.0]
    runs = {"breaks": lambda: times.pop(), "steady": lambda: 5.0}
    taken = interleave(runs, lambda run: run(), dataclasses.replace(PLAN, min_samples=8))
    assert taken["breaks"].refusal() == "IndexError: pop from empty list"
    assert len(taken["steady"].us) == 8
    assert taken["steady"].refusal() is None


def test_summary_of_known_samples():
    s = summarise(range(101))
    assert (s.n, s.median, s.p20, s.p80) == (101, 50.0, 20.0, 80.0)
    assert 30 < s.low < 50 < s.high < 70
    assert s == summarise(range(101))
    with pytest.raises(ValueError, match="2 samples, expected at least 3"):
        summarise([1.0, 1.0])
    assert Samples(us=[1.0, 1.0]).refusal() is not None


def test_the_interval_shrinks_with_samples_and_covers_the_median():
    rng = random.Random(0)
    few, many = ([summarise([rng.gauss(100.0, 5.0) for _ in range(n)]) for _ in range(40)] for n in (20, 300))
    assert max(s.high - s.low for s in many) < min(s.high - s.low for s in few)
    assert sum(s.low <= 100.0 <= s.high for s in few + many) >= 70  # of 80, at 95 %


@pytest.mark.parametrize(
    ("ours", "other", "word"),
    [
        ((100, 2), (150, 2), "FAST"),
        ((150, 2), (100, 2), "SLOW"),
        ((100, 2), (100, 2), "SAME"),
        ((100, 0.01), (101, 0.01), "SAME"),
        ((100, 50), (102, 50), "AMBIGUOUS"),
    ],
)
def test_verdict(ours, other, word):
    """On 60 samples each, evenly around a centre within a spread."""
    v = verdict(*([centre + spread * (2 * i / 59 - 1) for i in range(60)] for centre, spread in (ours, other)))
    assert v.word == word, v
    assert v.low <= v.speedup <= v.high


def test_cpu_timer_measures_microseconds():
    us = CpuTimer().for_mode("hot")(lambda: sum(range(1000)))
    assert 0 < us < 1e6


class FakeEvent:
    """Notes what happens to it; the first `late` start events have passed by the time they are asked."""

    late = 0

    def __init__(self, log):
        self.log = log

    def record(self):
        self.log.append("event")

    def query(self):
        FakeEvent.late -= 1
        return FakeEvent.late >= 0

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return 0.25  # milliseconds


@pytest.fixture
def gpu_timer(monkeypatch):
    """A CudaTimer on a GPU that only notes what it is told, with an L2 cache of 1 KiB, and its log."""
    log = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1024))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(log))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
    monkeypatch.setattr(FakeEvent, "late", 0)
    timer = CudaTimer(torch.device("cpu"))
    timer.flush = types.SimpleNamespace(zero_=lambda: log.append("flush"), nbytes=timer.flush.nbytes)
    return timer, log


@pytest.mark.parametrize(("mode", "before"), [("cold", "flush"), ("hot", "run")])
def test_the_launch_is_hidden_behind_a_spin(gpu_timer, mode, before):
    timer, log = gpu_timer
    assert timer.for_mode(mode)(lambda: log.append("run")) == 250.0
    assert log == [before, timer.spin, "event", "run", "event", "wait"]
    assert timer.flush.nbytes == 2 * 1024


def test_a_launch_not_hidden_is_sampled_again_behind_a_longer_spin(gpu_timer, monkeypatch):
    """A function that waits for the device is no sample, and those after it are not held responsible."""
    timer, log = gpu_timer
    first, sample = timer.spin, timer.for_mode("cold")
    monkeypatch.setattr(FakeEvent, "late", 1000)
    with pytest.raises(RuntimeError, match="cannot be hidden"):
        sample(lambda: None)
    log.clear()
    monkeypatch.setattr(FakeEvent, "late", 2)
    assert sample(lambda: None) == 250.0
    assert [entry for entry in log if isinstance(entry, int)] == [first, 2 * first, 4 * first]
