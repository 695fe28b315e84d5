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
from profiling.run.telemetry import Telemetry, read
from tests.profiling.run.test_sampler import wait_for_rows


@pytest.fixture
def path(monkeypatch, tmp_path):
    """Where to record, with the fake NVML in the sampler's way."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support" / "fake_nvml"))
    return tmp_path / "records" / "telemetry.jsonl"


@pytest.fixture
def start():
    """`telemetry.start`, stopped at the end."""
    recorders = []

    def started(*arguments, **options):
        recorders.append(telemetry.start(*arguments, **options))
        return recorders[-1]

    yield started
    for recorder in recorders:
        recorder.stop()


def gone(pid: int) -> bool:
    """Whether the process is no more, or is only waiting to be reaped, within ten seconds."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_a_recording(start, path):
    recorder = start("GPU-0", path, period_ms=2)
    assert os.getpgid(recorder.process.pid) == recorder.process.pid != os.getpgid(0), "Ctrl-C does not reach it"
    wait_for_rows(path, 40)
    recorder.stop()
    assert recorder.process.returncode == 0
    recorder.stop()
    found = read(path)
    assert found.lacks == []
    assert found.reason is None
    assert (found.gpu, found.period_ms) == ("NVIDIA H200", 2)
    assert found.samples[0]._replace(t_ns=None, energy_j=None) == GpuSample(
        1980, 3201, ("software thermal slowdown",), None, 512.345, 61, 0.97, 3 << 30
    )
    assert found.energy().value == pytest.approx(12.5 * (len(found.samples) - 1))


def test_a_killed_sampler_is_told_and_costs_nothing(start, path):
    recorder = start("GPU-0", path, period_ms=2)
    wait_for_rows(path, 40)
    recorder.process.kill()
    recorder.process.wait()
    recorder.stop()
    found = read(path)
    assert len(found.samples) >= 38
    assert found.lacks == [f"GPU telemetry: the sampler was killed after {len(found.samples)} samples"]


def test_a_sampler_that_hangs_is_killed(start, path, monkeypatch):
    recorder = start("GPU-0", path, period_ms=2)
    wait_for_rows(path, 2)
    recorder.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(telemetry, "STOP_S", 0.05)
    recorder.stop()
    assert recorder.process.returncode == -signal.SIGKILL
    assert "was killed" in read(path).lacks[0]


def test_one_that_cannot_even_be_killed_is_left(monkeypatch):
    monkeypatch.setattr(telemetry, "STOP_S", 0.01)
    monkeypatch.setattr(telemetry, "KILL_S", 0.01)
    process = telemetry.launch([sys.executable, "-c", "import time; time.sleep(60)"])
    kill = process.kill
    monkeypatch.setattr(process, "kill", lambda: None)
    telemetry.Recorder(process).stop()
    assert process.poll() is None
    kill()
    process.wait()


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
        assert gone(pid)
    finally:
        parent.kill()
        if child:
            os.kill(child, signal.SIGKILL)
        parent.communicate()
    # Where the pipe closes too, the sampler may notice either first.
    ends = {"the run's process is gone"} | (set() if fork else {sampler.STOPPED})
    assert json.loads(path.read_text().splitlines()[-1])["end"] in ends


def test_a_run_without_a_gpu_lacks_nothing(start, path):
    start(None, path).stop()
    found = read(path)
    assert found.reason == "the run was not on an NVIDIA GPU"
    assert set(found.unavailable) == set(nvml.FIELDS)
    assert (found.samples, found.lacks) == ([], [])


def test_a_gpu_without_nvml_is_lacking(start, path, monkeypatch):
    monkeypatch.setenv("FAKE_NVML", "LibraryNotFound")
    start("GPU-0", path).stop()
    found = read(path)
    assert found.reason == "no NVIDIA driver"
    assert found.lacks == ["GPU telemetry: no NVIDIA driver"]


def test_a_sampler_that_cannot_be_started_is_a_reason(start, path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(path / "absent"))
    start("GPU-0", path).stop()
    assert "could not be started" in read(path).lacks[0]


def test_a_folder_that_cannot_be_made_is_survived(start, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "records" / "telemetry.jsonl"
    start("GPU-0", path).stop()
    assert read(path).lacks


def test_an_earlier_session_s_file_goes(start, path):
    path.parent.mkdir()
    path.write_text('{"version": 1, "unavailable": {}}\n' + 30 * '{"t_ns": 1}\n')
    start(None, path).stop()
    assert len(path.read_text().splitlines()) == 1


HEADER = json.dumps(sampler.header("GPU-0", "NVIDIA H200", 25, {"energy_j": "not supported on this GPU"}))
ROWS = [json.dumps(GpuSample(1980, 3201, (), t_ns=25_000_000 * i, power_w=500.0)._asdict()) for i in range(30)]
END = json.dumps({"end": sampler.STOPPED})


def written(tmp_path, *lines: str, torn: str = "") -> Path:
    path = tmp_path / "telemetry.jsonl"
    path.write_text("".join(line + "\n" for line in lines) + torn)
    return path


def test_a_whole_file(tmp_path):
    found = read(written(tmp_path, HEADER, *ROWS, END))
    assert len(found.samples) == 30
    assert found.lacks == []
    assert found.unavailable["energy_j"] == "not supported on this GPU"
    assert found.unavailable["sm_active"] == "no sample has a value of it"
    assert "power_w" not in found.unavailable


LAST = ROWS[0].replace(": 0", ": 9000000000")
FILES = {
    "torn_last_line": ([HEADER, *ROWS], ROWS[0][:50], 30, "killed after 30 samples, in the middle of a row"),
    "killed_between_rows": ([HEADER, *ROWS], "", 30, "killed after 30 samples"),
    "too_short": ([HEADER, *ROWS[:19], END], "", 19, "too short, 19 samples, expected at least 20"),
    "no_samples": ([HEADER, END], "", 0, "too short, 0 samples"),
    "header_only": ([HEADER], "", 0, "killed after 0 samples"),
    "empty": ([], "", 0, "ended before its first row"),
    "torn_header": ([], HEADER[:20], 0, "ended before its first row"),
    "no_header": ([*ROWS, END], "", 0, "not a recording"),
    "garbage_header": (["\0\0\0", *ROWS, END], "", 0, "not a recording"),
    "disk_full": ([HEADER, *ROWS, json.dumps({"end": "No space left on device"})], "", 30, "early: No space left"),
    "exactly_enough": ([HEADER, *ROWS[:15], *ROWS[-5:], END], "", 20, ""),
    "held_up": ([HEADER, *ROWS, LAST, END], "", 31, "no sample for 8.3 s"),
    "damaged_rows": ([HEADER, *ROWS, "[1]", '{"t_ns": true}', '{"t_ns": NaN}', "{" * 9999, END], "", 30, "4 damaged"),
}


@pytest.mark.parametrize(("lines", "torn", "samples", "lack"), FILES.values(), ids=FILES)
def test_the_lacks_of_a_file_are_told(tmp_path, lines, torn, samples, lack):
    found = read(written(tmp_path, *lines, torn=torn))
    assert len(found.samples) == samples
    assert any(lack in text for text in found.lacks) if lack else not found.lacks


def test_a_missing_file_and_a_folder_in_its_place(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        found = read(path)
        assert found.samples == []
        assert found.reason in found.lacks[0]
        assert found.unavailable["power_w"] == found.reason


@pytest.mark.parametrize("value", ["1e999", "-Infinity", "true", '"<script>"', "[1]", "1" + 400 * "0"])
def test_a_value_that_is_no_number_is_not_known(tmp_path, value):
    row = f'{{"t_ns": 5, "power_w": {value}, "reasons": {value}, "temperature_c": 60}}'
    found = read(written(tmp_path, HEADER, *[row] * 20, END))
    assert {s.power_w for s in found.samples} == {None}
    assert {s.temperature_c for s in found.samples} == {60}


def sampled(**columns) -> Telemetry:
    """Samples 25 ms apart with these values."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Telemetry([GpuSample(t_ns=25_000_000 * i, **row) for i, row in enumerate(rows)], {}, [])


def test_energy_is_the_counter_s_difference_not_the_integral_of_power():
    found = sampled(energy_j=[100.0, None, 107.5, 130.0], power_w=[1e6] * 4).energy()
    assert (found.value, found.unit, found.status) == (30.0, "J", "measured")
    assert "0.07 s apart" in found.source


def test_energy_of_a_part_of_the_run():
    whole = sampled(energy_j=[0.0, 1.0, 3.0, 7.0, 15.0])
    assert whole.between(25_000_000, 75_000_000).energy().value == 6.0


UNKNOWN = {
    "driver_reloaded": (sampled(energy_j=[100.0, 200.0, 5.0, 300.0]), "went backwards"),
    "one_reading": (sampled(energy_j=[100.0]), "fewer than two readings"),
    "none": (sampled(energy_j=[None, None]), "fewer than two readings"),
    "not_counted": (Telemetry([], {"energy_j": "not supported on this GPU"}, []), "not supported on this GPU"),
}


@pytest.mark.parametrize(("found", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_energy_that_cannot_be_known(found, reason):
    assert found.energy().value is None
    assert reason in found.energy().source


def test_the_throttled_share_names_its_reasons():
    heat, power, idle = "software thermal slowdown", "power cap", "idle"
    found = sampled(reasons=[(heat,), (heat, power), (), (idle,), None])
    assert found.reason_shares() == {heat: 0.5, power: 0.25, idle: 0.25}
    share = found.throttled_share()
    assert (share.value, share.status) == (0.5, "measured")
    assert share.source.endswith("4 samples: software thermal slowdown in 50%, power cap in 25%")


def test_no_throttling_is_zero_only_where_it_was_measured():
    assert sampled(reasons=[(), ("idle",)]).throttled_share().value == 0
    assert sampled(reasons=[None]).throttled_share().value is None
    assert sampled(reasons=[None]).reason_shares() == {}


def test_a_series_leaves_out_what_was_not_read():
    assert sampled(sm_active=[None, 0.5, None, 0.7]).series("sm_active") == ([25_000_000, 75_000_000], [0.5, 0.7])


def clocked(count: int, mhz=lambda i: 1700 + 10 * (i % 2)) -> Telemetry:
    """A sample each ten nanoseconds."""
    return Telemetry([GpuSample(sm_clock_mhz=mhz(i), t_ns=10 * i) for i in range(count)], {}, [])


def test_the_clock_is_that_of_the_samples_within_the_windows():
    found = clocked(60, lambda i: 1700 + i).sm_clock([(100, 200), (400, 500)])
    assert (found.value, found.unit, found.status) == (pytest.approx(1.730e9), "Hz", "measured")
    assert found.source == "mean of 22 NVML samples in training, 1,710 to 1,750 MHz"


@pytest.mark.parametrize(
    ("telemetry", "why"),
    [
        (clocked(60), "too short: 19 samples of the SM clock in training, expected at least 20"),
        (Telemetry([], {"sm_clock_mhz": "NotSupported"}, []), "NotSupported"),
        (clocked(60, lambda i: None), "no sample has the SM clock"),
    ],
    ids=["too_short", "not_supported", "none"],
)
def test_without_samples_there_is_no_clock(telemetry, why):
    found = telemetry.sm_clock([(0, 180)])
    assert (found.value, found.status, found.source) == (None, "unavailable", why)
