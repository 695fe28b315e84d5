import importlib.util
import json
import time
import types
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profiling.run import clock as module
from profiling.run.clock import Clock, StepClock

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAMES = ("set-up", "training", "evaluation")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 10**12)), min_size=1))
def test_phases_are_contiguous_and_sum_to_the_wall_clock(switches):
    times = list(accumulate([0, *[ns for _, ns in switches]]))
    wall_ns, now = times[-1], iter(times)
    clock = Clock("set-up", now=lambda: next(now, wall_ns))
    for name, _ in switches:
        clock.switch(name)
    assert all(a.end_ns == b.start_ns for a, b in pairwise(clock.phases))
    assert sum(p.end_ns - p.start_ns for p in clock.phases) == clock.wall_ns() == wall_ns
    assert abs(sum(map(clock.seconds, NAMES)) - clock.wall_s()) < 1e-9 * max(wall_ns, 1)


def test_the_present_phase_counts_and_repeats_add_up():
    times = iter([100, 200, 300, 450, 500, 500])
    clock = Clock("a", now=lambda: next(times))
    for name in "bab":
        clock.switch(name)
    assert clock.seconds("b") == (100 + 50) / 1e9
    assert clock.wall_s() == 400 / 1e9
    assert Clock("a", start_ns=10, now=lambda: 25).wall_s() == 15 / 1e9, "it may have started before it was made"


def test_the_device_is_waited_for_before_a_phase_ends():
    events = []
    clock = Clock("a", now=lambda: events.append("time") or len(events))
    clock.synchronize = lambda: events.append("synchronize")
    clock.switch("b")
    assert events == ["time", "synchronize", "time"]


def test_a_changed_wall_clock_changes_no_duration(monkeypatch):
    """A fresh copy of the module, whose defaults are bound as it is imported, on clocks of its own."""
    ticks, wall = iter([5 * 10**9, 8 * 10**9]), iter([10**18, 0])
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(ticks))
    monkeypatch.setattr(time, "time", lambda: next(wall) / 1e9)
    monkeypatch.setattr(time, "time_ns", lambda: next(wall))
    spec = importlib.util.find_spec("profiling.run.clock")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    clock = fresh.Clock("a")
    clock.switch("b")
    assert [tuple(phase) for phase in clock.phases] == [("a", 5 * 10**9, 8 * 10**9)]


def run_epoch(clock: StepClock, count: int) -> None:
    clock.start_epoch()
    for _ in range(count):
        clock.tick()
    clock.end_epoch()


def test_steps_on_a_cpu_are_timed_by_the_host(monkeypatch):
    """Each step of an iterator takes 100 when it is asked for, and its caller 10 afterwards."""
    now = [0]
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: now[0])
    monkeypatch.delattr(torch, "cuda")  # nothing of it is touched

    def work(count):
        for i in range(count):
            now[0] += 100
            yield i

    clock = StepClock(CPU)
    for _ in clock.each(work(3)):
        now[0] += 10
    now[0] += 1000
    for _ in range(2):
        clock.end_epoch()  # it ended with its last step
        assert clock.to_json()["epochs"] == [[0, 110, 220, 330]]
    now[0] = 0
    for i in clock.each(work(3)):
        now[0] += 10
        if i == 1:
            break
    clock.end_epoch()
    assert clock.durations_ns() == [110, 110, 110, 110, 110]
    run_epoch(clock, 2)
    found = json.loads(json.dumps(clock.to_json()))
    assert (found["version"], found["missed_steps"], found["epochs"][-1]) == (1, 0, [220, 220, 220])


@pytest.fixture
def cuda(monkeypatch):
    """A device 1 ms behind the host's launches, on which each record takes 2 ms; the log of what it was asked for."""
    log, device_ms = [], [0.0]

    class Event:
        made = 0

        def __init__(self, enable_timing):
            assert enable_timing
            Event.made += 1
            self.at_ms = None

        def record(self, stream):
            log.append(("record", stream))
            device_ms[0] += 2.0
            self.at_ms = device_ms[0]

        def synchronize(self):
            log.append(("synchronize", None))

        def elapsed_time(self, other):
            log.append(("read", None))
            return other.at_ms - self.at_ms

    fake = types.SimpleNamespace(Event=Event, current_stream=lambda device: f"stream of {device}", log=log)
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: 50 * 10**9)
    return fake


def test_on_cuda_steps_are_events_anchored_at_the_host_s_clock(cuda):
    """Inside an epoch the device is neither waited for nor read, and nothing is allocated."""
    clock = StepClock(CUDA, steps=4)
    made = cuda.Event.made
    assert len(cuda.log) == made, "every event was recorded once before the first step"
    clock.start_epoch()
    cuda.log.clear()
    for _ in range(4):
        clock.tick()
    clock.end_epoch()
    assert cuda.log == [("record", "stream of cuda:0")] * 5
    assert cuda.Event.made == made
    assert clock.to_json()["epochs"] == [[50 * 10**9 + 2_000_000 * i for i in range(1, 6)]]


def test_a_longer_epoch_is_cut_at_a_step_and_the_next_one_fits(cuda):
    clock = StepClock(CUDA, steps=2)
    run_epoch(clock, 5)
    run_epoch(clock, 5)
    found = clock.to_json()
    assert [len(epoch) - 1 for epoch in found["epochs"]] == [2, 5]
    assert found["missed_steps"] == 3
    for epoch in found["epochs"]:
        assert {b - a for a, b in pairwise(epoch)} == {2_000_000}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_an_epoch_that_was_interrupted_is_left_out(cuda, device):
    clock = StepClock(device)
    run_epoch(clock, 2)
    clock.start_epoch()
    clock.tick()
    assert [len(epoch) for epoch in clock.to_json()["epochs"]] == [3]
    for _ in clock.each(range(9)):
        break
    run_epoch(clock, 1)
    assert [len(epoch) for epoch in clock.to_json()["epochs"]] == [3, 2]


@pytest.mark.gpu
def test_on_a_gpu_steps_are_as_long_as_their_work():
    clock = StepClock(CUDA, steps=4)
    before_ns = time.monotonic_ns()
    clock.start_epoch()
    for i in range(4):
        clock.tick()
        torch.cuda._sleep(10_000_000 * (1 + i))
    clock.end_epoch()
    torch.cuda.synchronize()
    after_ns = time.monotonic_ns()
    (times,) = clock.to_json()["epochs"]
    lengths = [b - a for a, b in pairwise(times)]
    assert lengths == sorted(lengths)
    assert before_ns < times[0]
    assert times[-1] < after_ns + 1_000_000
