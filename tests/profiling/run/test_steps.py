import itertools
import json
import types

import pytest
import torch

from profiling.run import steps
from profiling.run.steps import StepClock

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def run_epoch(clock: StepClock, count: int) -> None:
    clock.start_epoch()
    for _ in range(count):
        clock.tick()
    clock.end_epoch()


def test_on_a_cpu_each_step_begins_when_the_clock_says(monkeypatch):
    now = itertools.count(10**9, 7)
    monkeypatch.setattr(steps.time, "monotonic_ns", lambda: next(now))
    clock = StepClock(CPU)
    run_epoch(clock, 3)
    run_epoch(clock, 2)
    found = clock.to_json()
    assert found["version"] == 1
    assert found["epochs"] == [[10**9 + 7 * i for i in range(4)], [10**9 + 7 * i for i in range(4, 7)]]
    assert found["missed_steps"] == 0
    json.dumps(found)


def test_an_epoch_of_an_iterator_of_steps(monkeypatch):
    """Each step takes 100 when it is asked for, and its caller 10 afterwards."""
    now = [0]
    monkeypatch.setattr(steps.time, "monotonic_ns", lambda: now[0])

    def work(count):
        for i in range(count):
            now[0] += 100
            yield i

    clock = StepClock(CPU)
    for _ in clock.each(work(3)):
        now[0] += 10
    now[0] += 1000
    clock.end_epoch()  # it ended with its last step
    assert clock.to_json()["epochs"] == [[0, 110, 220, 330]]
    clock.end_epoch()
    assert clock.to_json()["epochs"] == [[0, 110, 220, 330]]
    now[0] = 0
    for i in clock.each(work(3)):
        now[0] += 10
        if i == 1:
            break
    clock.end_epoch()
    assert clock.durations_ns() == [110, 110, 110, 110, 110]


def test_without_cuda_nothing_of_it_is_touched(monkeypatch):
    monkeypatch.delattr(torch, "cuda")
    clock = StepClock(CPU)
    run_epoch(clock, 1)
    assert len(clock.to_json()["epochs"][0]) == 2


@pytest.fixture
def cuda(monkeypatch):
    """A device 1 ms behind the host's launches, on which each record takes 2 ms; the log of what it was asked for."""
    log, host_ns, device_ms = [], [50 * 10**9], [0.0]

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
    monkeypatch.setattr(steps.time, "monotonic_ns", lambda: host_ns[0])
    return fake


def test_on_cuda_events_are_anchored_at_the_host_s_clock(cuda):
    clock = StepClock(CUDA, steps=4)
    run_epoch(clock, 4)
    start = 50 * 10**9
    assert clock.to_json()["epochs"] == [[start + 2_000_000 * i for i in range(1, 6)]]
    assert {stream for what, stream in cuda.log if what == "record"} == {"stream of cuda:0"}


def test_inside_an_epoch_the_device_is_neither_waited_for_nor_read(cuda):
    clock = StepClock(CUDA, steps=8)
    clock.start_epoch()
    made = cuda.Event.made
    cuda.log.clear()
    for _ in range(8):
        clock.tick()
    clock.end_epoch()
    assert {what for what, _ in cuda.log} == {"record"}
    assert len(cuda.log) == 9
    assert cuda.Event.made == made


def test_every_event_was_recorded_once_before_the_first_step(cuda):
    StepClock(CUDA, steps=8)
    assert len(cuda.log) == cuda.Event.made


def test_a_longer_epoch_is_cut_at_a_step_and_the_next_one_fits(cuda):
    clock = StepClock(CUDA, steps=2)
    run_epoch(clock, 5)
    run_epoch(clock, 5)
    found = clock.to_json()
    assert [len(epoch) - 1 for epoch in found["epochs"]] == [2, 5]
    assert found["missed_steps"] == 3
    for epoch in found["epochs"]:
        assert {b - a for a, b in itertools.pairwise(epoch)} == {2_000_000}


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
    before_ns = steps.time.monotonic_ns()
    clock.start_epoch()
    for i in range(4):
        clock.tick()
        torch.cuda._sleep(10_000_000 * (1 + i))
    clock.end_epoch()
    torch.cuda.synchronize()
    after_ns = steps.time.monotonic_ns()
    (times,) = clock.to_json()["epochs"]
    lengths = [b - a for a, b in itertools.pairwise(times)]
    assert lengths == sorted(lengths)
    assert before_ns < times[0]
    assert times[-1] < after_ns + 1_000_000
