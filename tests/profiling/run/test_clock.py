import importlib.util
import time
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from profiling.run.clock import Clock

NAMES = st.sampled_from(["set-up", "training", "evaluation"])


@given(st.lists(st.tuples(NAMES, st.integers(0, 10**12)), min_size=1))
def test_phases_are_contiguous_and_sum_to_the_wall_clock(switches):
    times = iter([0, *[ns for _, ns in switches]])
    now = [0]

    def tick() -> int:
        now[0] += next(times, 0)
        return now[0]

    clock = Clock("start", now=tick)
    for name, _ in switches:
        clock.switch(name)
    assert all(a.end_ns == b.start_ns for a, b in pairwise(clock.phases))
    assert sum(p.end_ns - p.start_ns for p in clock.phases) == now[0]
    names = {"start", *[name for name, _ in switches]}
    assert abs(sum(clock.seconds(name) for name in names) - clock.wall_s()) < 1e-9 * max(now[0], 1)


def test_the_present_phase_counts_and_repeats_add_up():
    times = iter([100, 200, 300, 450, 500, 500])
    clock = Clock("a", now=lambda: next(times))
    clock.switch("b")
    clock.switch("a")
    clock.switch("b")
    assert clock.seconds("b") == (100 + 50) / 1e9
    assert clock.wall_s() == 400 / 1e9


def test_it_may_have_started_before_it_was_made():
    clock = Clock("a", start_ns=10, now=lambda: 25)
    assert clock.wall_s() == 15 / 1e9


def test_the_device_is_waited_for_before_a_phase_ends():
    events = []
    clock = Clock("a", now=lambda: events.append("time") or len(events))
    clock.synchronize = lambda: events.append("synchronize")
    clock.switch("b")
    assert events == ["time", "synchronize", "time"]


def test_a_changed_wall_clock_changes_no_duration(monkeypatch):
    """Clocks of its own for a fresh copy of the module, whose defaults are bound as it is imported."""
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
