import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from profiling import ROOT
from profiling.device.nvml import FIELDS, GpuSample
from profiling.run import sampler

MODULE = ["-m", "profiling.run.sampler"]
LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
runpy.run_module("profiling.run.sampler", run_name="__main__")
"""


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Start the sampler on the fake NVML; returns (its process, its file)."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support" / "fake_nvml"))
    started = []

    def start(uuid="GPU-0", program=MODULE):
        path = tmp_path / "telemetry.jsonl"
        command = [sys.executable, *program, uuid, str(path), "--period-ms", "2"]
        started.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE))
        return started[-1], path

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()


def rows(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_rows(path: Path, count: int) -> None:
    for _ in range(1000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} rows within ten seconds")


def test_it_samples_until_its_standard_input_closes(launch, monkeypatch):
    """One field of this GPU is not supported. The process gives way to the run."""
    monkeypatch.setenv("FAKE_NVML", "nvmlDeviceGetTotalEnergyConsumption=NotSupported")
    process, path = launch()
    wait_for_rows(path, 5)
    assert process.poll() is None
    if hasattr(os, "nice"):
        nice = os.getpriority(os.PRIO_PROCESS, process.pid)
        assert nice == os.getpriority(os.PRIO_PROCESS, 0) + sampler.NICENESS
    process.stdin.close()
    assert process.wait(10) == 0
    first, *samples, last = rows(path)
    unavailable = {"energy_j": "not supported on this GPU"}
    about = {"uuid": "GPU-0", "gpu": "NVIDIA H200", "period_ms": 2.0}
    assert first == {"version": 1, **about, "unavailable": unavailable, "reason": None}
    assert last == {"end": "stopped"}
    assert {(s["power_w"], s["energy_j"]) for s in samples} == {(512.345, None)}
    times = [s["t_ns"] for s in samples]
    assert times == sorted(times)
    assert 0 <= time.monotonic_ns() - times[-1] < 60e9, "the clock of this process"


@pytest.mark.parametrize(
    ("uuid", "fault", "reason"),
    [
        ("GPU-0", "DriverNotLoaded", "no NVIDIA driver"),
        pytest.param("GPU-0", "LibRmVersionMismatch", "different versions", marks=pytest.mark.slow),
        ("GPU-1", "", "GPU-1"),
        ("none", "", "the run was not on an NVIDIA GPU"),
        ("none", "LibraryNotFound", "no NVIDIA driver"),
    ],
    ids=["no_driver", "driver_mismatch", "other_gpu", "run_on_the_cpu", "run_on_the_cpu_without_driver"],
)
def test_with_nothing_to_sample_it_leaves_the_reason_and_ends(launch, monkeypatch, uuid, fault, reason):
    monkeypatch.setenv("FAKE_NVML", fault)
    process, path = launch(uuid)
    assert process.wait(10) == 0
    (first,) = rows(path)
    assert reason in first["reason"]
    assert first["unavailable"] == dict.fromkeys(FIELDS, first["reason"])
    assert first["uuid"] == (None if uuid == "none" else uuid)


def test_on_a_full_disk_it_ends_and_says_so(launch):
    process, path = launch(program=["-c", LIMITED.format(bytes=4096)])
    assert process.wait(10) == 0
    *samples, last = rows(path)[1:]
    assert last == {"end": "File too large"}
    assert len(samples) > 3
    assert all(s["t_ns"] for s in samples)
    assert path.stat().st_size <= 4096


def test_it_imports_no_torch():
    code = "import sys, profiling.run.sampler, profiling.run.telemetry; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def record(path, sample, period_ms=1.0, stopped=None):
    """The rows behind the header of `sampler.record` until it ends by itself."""
    sampler.record(sample, sampler.header(None, None, period_ms, {}), path, stopped or threading.Event())
    return rows(path)[1:]


def test_an_unforeseen_failure_is_the_last_row(tmp_path):
    left = [GpuSample(t_ns=1), GpuSample(t_ns=2)]

    def sample():
        if left:
            return left.pop()
        raise RuntimeError("a surprise")

    assert record(tmp_path / "t.jsonl", sample)[2:] == [{"end": "RuntimeError: a surprise"}]


@pytest.mark.parametrize(("room", "samples"), [(30, 3), (10, 2)], ids=["for_the_last_row", "for_nothing"])
def test_the_last_sample_makes_room_for_the_reason(tmp_path, monkeypatch, room, samples):
    """A disk with room for the header, three samples and `room` bytes."""
    append = sampler.append_jsonl
    first, sample = sampler.header(None, None, 1.0, {}), GpuSample(t_ns=10**9)
    size = sum(len(json.dumps(row)) + 1 for row in (first, *3 * [sample._asdict()])) + room

    def limited(to, row):
        if to.exists() and to.stat().st_size + len(json.dumps(row)) + 1 > size:
            raise OSError(28, "No space left")
        append(to, row)

    monkeypatch.setattr(sampler, "append_jsonl", limited)
    found = record(tmp_path / "t.jsonl", lambda: sample)
    assert (found[-1], len(found)) == ({"end": "No space left"}, samples + 1)


def test_it_ends_with_its_parent_even_where_the_pipe_stays_open(tmp_path, monkeypatch):
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    found = record(tmp_path / "t.jsonl", lambda: GpuSample(t_ns=1))
    assert (found[-1], len(found)) == ({"end": "the run's process is gone"}, 3)


def test_a_late_sample_is_not_made_up_for(tmp_path, monkeypatch):
    """Time is the test's own: a sample that takes 3.5 periods, then samples on the grid of the first."""
    now_ns, waits = [0], []
    durations = iter([35, 1, 1])

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
    found = record(tmp_path / "t.jsonl", sample, 10.0, Stopped())
    assert [r["t_ns"] / 1e6 for r in found[:-1]] == [0, 40, 50]
