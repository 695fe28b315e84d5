import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from profiling import ROOT
from profiling.device import nvml
from profiling.device.nvml import GpuSample
from profiling.run import sampler, telemetry
from profiling.run.telemetry import Recorder, Telemetry, read

HEADER = json.dumps(sampler.header("GPU-0", "NVIDIA H200", 25, {"energy_j": "not supported on this GPU"}))
ROWS = [json.dumps(GpuSample(1980, 3201, (), t_ns=25_000_000 * i, power_w=500.0)._asdict()) for i in range(30)]
END = json.dumps({"end": sampler.STOPPED})


@pytest.fixture
def path(monkeypatch, tmp_path):
    """The file of the recording, with the fake NVML in the sampler's way."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support" / "fake_nvml"))
    return tmp_path / "records" / "telemetry.jsonl"


@pytest.fixture
def start(path):
    """`telemetry.start` or a command of one's own, stopped at the end."""
    recorders = []

    def started(uuid="GPU-0", command=None):
        made = Recorder(telemetry.launch(command)) if command else telemetry.start(uuid, path, period_ms=2)
        recorders.append(made)
        return made

    yield started
    for recorder in recorders:
        recorder.stop()


def rows(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(done) -> None:
    for _ in range(1000):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("not within ten seconds")


def wait_for_rows(path: Path, count: int) -> None:
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)


def gone(pid: int) -> bool:
    """Whether the process is no more, or is only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_recording(start, path, monkeypatch):
    """One field of this GPU is not supported. The process gives way to the run, and Ctrl-C does not reach it."""
    monkeypatch.setenv("FAKE_NVML", "nvmlDeviceGetTemperature=NotSupported")
    recorder = start()
    wait_for_rows(path, 40)
    process = recorder.process
    assert process.poll() is None
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    if hasattr(os, "nice"):
        nice = os.getpriority(os.PRIO_PROCESS, process.pid)
        assert nice == os.getpriority(os.PRIO_PROCESS, 0) + sampler.NICENESS
    recorder.stop()
    recorder.stop()
    assert process.returncode == 0
    first, *_, last = rows(path)
    unavailable = {"temperature_c": "not supported on this GPU"}
    about = {"uuid": "GPU-0", "gpu": "NVIDIA H200", "period_ms": 2.0}
    assert first == {"version": 1, **about, "unavailable": unavailable, "reason": None}
    assert last == {"end": "stopped"}
    found = read(path)
    assert (found.lacks, found.reason, found.gpu, found.period_ms) == ([], None, "NVIDIA H200", 2)
    known = GpuSample(1980, 3201, ("software thermal slowdown",), None, 512.345, None, 0.97, 3 << 30)
    assert found.samples[0]._replace(t_ns=None, energy_j=None) == known
    assert found.energy().value == pytest.approx(12.5 * (len(found.samples) - 1))
    times = [sample.t_ns for sample in found.samples]
    assert times == sorted(times)
    assert 0 <= time.monotonic_ns() - times[-1] < 60e9, "the clock of this process"


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_sampler_that_dies_or_hangs_is_told_and_costs_nothing(start, path, monkeypatch, by):
    monkeypatch.setattr(telemetry, "STOP_S", 0.05)
    recorder = start()
    wait_for_rows(path, 40)
    recorder.process.send_signal(by)
    recorder.stop()
    assert recorder.process.returncode == -signal.SIGKILL
    found = read(path)
    assert len(found.samples) >= 38
    assert found.lacks[0].startswith(f"GPU telemetry: the sampler was killed after {len(found.samples)} samples")


def test_a_sampler_that_cannot_be_killed_is_left(start, monkeypatch):
    monkeypatch.setattr(telemetry, "STOP_S", 0.01)
    monkeypatch.setattr(telemetry, "KILL_S", 0.01)
    recorder = start(command=[sys.executable, "-c", "import time; time.sleep(60)"])
    with monkeypatch.context() as patch:
        patch.setattr(recorder.process, "kill", lambda: None)
        recorder.stop()
    assert recorder.process.poll() is None


PARENT = """
import os, sys, time
from profiling.run import telemetry
recorder = telemetry.start("GPU-0", sys.argv[1], period_ms=2)
print(recorder.process.pid, flush=True)
{fork}
time.sleep(60)
"""


@pytest.mark.parametrize(
    "fork",
    ["", "if os.fork() == 0: print(os.getpid(), flush=True)"],
    ids=["pipe_closes", "a_forked_child_holds_the_pipe"],
)
def test_no_orphan_is_left_when_the_run_is_killed(path, fork):
    command = [sys.executable, "-c", PARENT.format(fork=fork), str(path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    child = int(parent.stdout.readline()) if fork else None
    try:
        wait_for_rows(path, 5)
        parent.kill()
        parent.wait()
        wait_for(lambda: gone(pid))
    finally:
        parent.kill()
        if child:
            os.kill(child, signal.SIGKILL)
        parent.communicate()
    # Where the pipe closes too, the sampler may notice either first.
    assert rows(path)[-1]["end"] in {"the run's process is gone"} | (set() if fork else {sampler.STOPPED})


@pytest.mark.parametrize(
    ("uuid", "fault", "reason"),
    [
        ("GPU-0", "DriverNotLoaded", "no NVIDIA driver"),
        ("GPU-1", "", "NVML knows no GPU GPU-1"),
        (None, "", "the run was not on an NVIDIA GPU"),
        pytest.param(None, "LibraryNotFound", "no NVIDIA driver", marks=pytest.mark.slow),
    ],
    ids=["no_driver", "other_gpu", "run_on_the_cpu", "run_on_the_cpu_without_driver"],
)
def test_with_nothing_to_sample_it_leaves_the_reason_and_ends(start, path, monkeypatch, uuid, fault, reason):
    """The file of an earlier session goes. A run without a GPU lacks nothing."""
    monkeypatch.setenv("FAKE_NVML", fault)
    path.parent.mkdir()
    path.write_text("\n".join([HEADER, *ROWS, ""]))
    assert start(uuid).process.wait(10) == 0
    (first,) = rows(path)
    assert (first["reason"], first["uuid"]) == (reason, uuid)
    found = read(path)
    assert (found.samples, found.reason) == ([], reason)
    assert found.unavailable == dict.fromkeys(nvml.FIELDS, reason)
    assert found.lacks == ([f"GPU telemetry: {reason}"] if uuid else [])


def test_a_sampler_that_cannot_be_started_is_survived(start, path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(path / "absent"))
    start().stop()
    assert "could not be started" in read(path).lacks[0]
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()  # so that the folder cannot be made
    start().stop()
    assert "cannot be read" in read(path).lacks[0]
    assert "not a regular file" in read(path.parent.parent).lacks[0]


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
runpy.run_module("profiling.run.sampler", run_name="__main__")
"""


def test_on_a_full_disk_it_ends_and_says_so(start, path):
    path.parent.mkdir()
    recorder = start(command=[sys.executable, "-c", LIMITED, "GPU-0", str(path), "--period-ms", "2"])
    assert recorder.process.wait(10) == 0
    *samples, last = rows(path)[1:]
    assert last == {"end": "File too large"}
    assert len(samples) > 3
    assert all(s["t_ns"] for s in samples)
    assert path.stat().st_size <= 4096


def test_neither_process_imports_torch_for_it():
    code = "import sys, profiling.run.sampler, profiling.run.telemetry; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


LAST = ROWS[0].replace(": 0", ": 9000000000")
DAMAGED = [
    *('{"power_w": 1}', "[1]", "7", '{"t_ns": true}', '{"t_ns": NaN}', "{" * 9999, '{"end": 3}'),
    *(f'{{"t_ns": 5, "power_w": {v}}}' for v in ("1e999", "-Infinity", "true", '"<script>"', "[1]", "1" + 400 * "0")),
]
FILES = {
    "whole": ([HEADER, *ROWS, END], "", 30, ""),
    "exactly_enough": ([HEADER, *ROWS[:15], *ROWS[-5:], END], "", 20, ""),
    "torn_last_line": ([HEADER, *ROWS], ROWS[0][:50], 30, "killed after 30 samples, in the middle of a row"),
    "killed_between_rows": ([HEADER, *ROWS], "", 30, "killed after 30 samples"),
    "too_short": ([HEADER, *ROWS[:19], END], "", 19, "too short, 19 samples, expected at least 20"),
    "no_samples": ([HEADER, END], "", 0, "too short, 0 samples"),
    "header_only": ([HEADER], "", 0, "killed after 0 samples"),
    "disk_full": ([HEADER, *ROWS, json.dumps({"end": "No space left on device"})], "", 30, "early: No space left"),
    "held_up": ([HEADER, *ROWS, LAST, END], "", 31, "no sample for 8.3 s"),
    "damaged_rows": ([HEADER, *ROWS, *DAMAGED, END], "", 30, f"{len(DAMAGED)} damaged rows were skipped"),
    "empty": ([], "", 0, "ended before its first row"),
    "torn_header": ([], HEADER[:20], 0, "ended before its first row"),
    "no_header": ([*ROWS, END], "", 0, "not a recording"),
    "garbage_header": (["\0\0\0", *ROWS, END], "", 0, "not a recording"),
    "absent": (None, "", 0, "the sampler left no file"),
}


@pytest.mark.parametrize(("lines", "torn", "samples", "lack"), FILES.values(), ids=FILES)
def test_the_lacks_of_a_file_are_told(tmp_path, lines, torn, samples, lack):
    path = tmp_path / "telemetry.jsonl"
    if lines is not None:
        path.write_text("".join(line + "\n" for line in lines) + torn)
    found = read(path)
    assert len(found.samples) == samples
    assert any(lack in text for text in found.lacks) if lack else not found.lacks
    if found.reason:
        assert found.unavailable == dict.fromkeys(nvml.FIELDS, found.reason)
    else:
        assert found.unavailable["energy_j"] == "not supported on this GPU"
        assert found.unavailable["sm_active"] == "no sample has a value of it"
        assert ("power_w" in found.unavailable) == (not samples)


def sampled(unavailable=None, **columns) -> Telemetry:
    """Samples 25 ms apart with these values."""
    made = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Telemetry([GpuSample(t_ns=25_000_000 * i, **row) for i, row in enumerate(made)], unavailable or {}, [])


HEAT, POWER, UNREAD = "software thermal slowdown", "power cap", {"energy_j": "not read", "reasons": "not read"}
CLOCKS = {"sm_clock_mhz": [1700 + i for i in range(60)]}
NUMBERS = {
    "energy_is_the_counter_s_difference": (
        *(sampled(energy_j=[100.0, None, 107.5, 130.0], power_w=[1e6] * 4).energy(), 30.0, "J"),
        "last reading minus first, 0.07 s apart",
    ),
    "driver_reloaded": (sampled(energy_j=[100.0, 200.0, 5.0, 300.0]).energy(), None, "J", "went backwards"),
    "one_reading": (sampled(energy_j=[100.0, None]).energy(), None, "J", "fewer than two readings"),
    "energy_not_read": (sampled(UNREAD).energy(), None, "J", "not read"),
    "throttled": (
        *(sampled(reasons=[(HEAT,), (HEAT, POWER), (), ("idle",), None]).throttled_share(), 0.5, "share"),
        "4 samples: software thermal slowdown in 50%, power cap in 25%",
    ),
    "not_throttled": (sampled(reasons=[(), ("idle",)]).throttled_share(), 0, "share", "no reason of heat or power"),
    "throttling_unknown": (sampled(reasons=[None]).throttled_share(), None, "share", "no sample has the clock event"),
    "throttling_not_read": (sampled(UNREAD).throttled_share(), None, "share", "not read"),
    "clock_of_samples_within_windows": (
        *(sampled(**CLOCKS).sm_clock([(250_000_000, 500_000_000), (1_000_000_000, 1_250_000_000)]), 1.730e9, "Hz"),
        "mean of 22 NVML samples in training, 1,710 to 1,750 MHz",
    ),
    "clock_too_short": (
        *(sampled(**CLOCKS).sm_clock([(0, 450_000_000)]), None, "Hz"),
        "too short: 19 samples of the SM clock in training, expected at least 20",
    ),
    "no_clock": (sampled(sm_clock_mhz=[None] * 30).sm_clock([(0, 10**9)]), None, "Hz", "no sample has the SM clock"),
}


@pytest.mark.parametrize(("found", "value", "unit", "source"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_the_samples(found, value, unit, source):
    assert (found.value, found.unit) == (value if value is None else pytest.approx(value), unit)
    assert found.status == ("unavailable" if value is None else "measured")
    assert source in found.source
    assert sampled(reasons=[None]).reason_shares() == {}
