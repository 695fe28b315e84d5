"""The sampler's loop, in this process on made readings; test_telemetry starts it as a process."""

import json
import os
import threading

import pytest

from profiling.device.nvml import GpuSample
from profiling.run import sampler


@pytest.fixture
def record(tmp_path):
    """A function: the rows behind the header of `sampler.record` until it ends by itself."""

    def run(sample, period_ms=1.0, stopped=None):
        path = tmp_path / "t.jsonl"
        sampler.record(sample, sampler.header(None, None, period_ms, {}), path, stopped or threading.Event())
        return [json.loads(line) for line in path.read_text().splitlines()[1:]]

    return run


def test_an_unforeseen_failure_is_the_last_row(record):
    left = [GpuSample(t_ns=1), GpuSample(t_ns=2)]

    def sample():
        if left:
            return left.pop()
        raise RuntimeError("a surprise")

    assert record(sample)[2:] == [{"end": "RuntimeError: a surprise"}]


@pytest.mark.parametrize(("room", "samples"), [(30, 3), (10, 2)], ids=["for_the_last_row", "for_nothing"])
def test_the_last_sample_makes_room_for_the_reason(record, monkeypatch, room, samples):
    """A disk with room for the header, three samples and `room` bytes."""
    append = sampler.append_jsonl
    first, sample = sampler.header(None, None, 1.0, {}), GpuSample(t_ns=10**9)
    size = sum(len(json.dumps(row)) + 1 for row in (first, *3 * [sample._asdict()])) + room

    def limited(to, row):
        if to.exists() and to.stat().st_size + len(json.dumps(row)) + 1 > size:
            raise OSError(28, "No space left")
        append(to, row)

    monkeypatch.setattr(sampler, "append_jsonl", limited)
    found = record(lambda: sample)
    assert (found[-1], len(found)) == ({"end": "No space left"}, samples + 1)


def test_it_ends_with_its_parent_even_where_the_pipe_stays_open(record, monkeypatch):
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    found = record(lambda: GpuSample(t_ns=1))
    assert (found[-1], len(found)) == ({"end": "the run's process is gone"}, 3)


def test_a_late_sample_is_not_made_up_for(record, monkeypatch):
    """Time is the test's own: a sample that takes 3.5 periods, then samples on the grid of the first."""
    now_ns, waits, durations = [0], [], iter([35, 1, 1])

    class Stopped(threading.Event):
        def wait(self, timeout):
            waits.append(timeout)
            now_ns[0] += round(timeout * 1e9)
            return len(waits) > 3

    def sample():
        taken = GpuSample(t_ns=now_ns[0])
        now_ns[0] += next(durations) * 10**6
        return taken

    monkeypatch.setattr(sampler.time, "monotonic_ns", lambda: now_ns[0])
    found = record(sample, 10.0, Stopped())
    assert [r["t_ns"] / 1e6 for r in found[:-1]] == [0, 40, 50]
