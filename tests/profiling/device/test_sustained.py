import itertools
import sys
import types

import pytest
import torch

from profiling.device import sustained
from profiling.device.nvml import GpuSample
from profiling.device.sustained import FEWEST, WINDOWS, CpuWatch, CudaWatch, sustain


class Simulated:
    """A GPU behind a queue: a launch takes the host `launch_s`, its kernel takes the device `kernel_s`."""

    def __init__(self, monkeypatch, launch_s=1e-7, kernel_s=1e-3):
        self.host_s = self.device_s = self.deepest_s = 0.0
        self.launch_s, self.kernel_s, self.kernels = launch_s, kernel_s, 0
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="0"))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.wait(self.device_s))
        monkeypatch.setattr(sustained.time, "perf_counter", lambda: self.host_s)
        self.watch = CudaWatch(torch.device("cuda"))

    def run(self):
        self.host_s += self.launch_s
        self.device_s = max(self.device_s, self.host_s) + self.kernel_s
        self.deepest_s = max(self.deepest_s, self.device_s - self.host_s)
        self.kernels += 1

    def wait(self, until_s):
        self.host_s = max(self.host_s, until_s)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at_s = max(self.gpu.device_s, self.gpu.host_s)

    def synchronize(self):
        self.gpu.wait(self.at_s)

    def elapsed_time(self, end):
        return (end.at_s - self.at_s) * 1e3


def test_a_gpu_is_never_left_without_work_nor_given_more_than_two_windows(monkeypatch):
    gpu = Simulated(monkeypatch, launch_s=4e-6, kernel_s=1e-4)
    windows = gpu.watch.windows(gpu.run, calls=100, seconds=1.0)
    assert windows[1:] == pytest.approx([100 * 1e-4] * (len(windows) - 1))
    assert 1.0 <= sum(windows) < 1.1
    assert gpu.deepest_s <= 2 * 100 * 1e-4


@pytest.mark.parametrize(("launch_s", "kernel_s"), [(1e-7, 1e-5), (1e-7, 1e-3), (1e-7, 0.3), (4e-5, 1e-6)])
def test_a_call_s_time_is_recovered(monkeypatch, launch_s, kernel_s):
    """In the last row, where kernels are nearly empty, it is the host's launch."""
    gpu = Simulated(monkeypatch, launch_s, kernel_s)
    took = sustain(gpu.watch, gpu.run, 0.5)
    assert (took.best_s, took.median_s) == pytest.approx([max(launch_s, kernel_s)] * 2, rel=0.01)
    assert took.samples >= min(WINDOWS, FEWEST)
    assert took.seconds >= 0.5


def test_it_runs_hot_before_it_is_timed(monkeypatch):
    gpu = Simulated(monkeypatch)
    took = sustain(gpu.watch, gpu.run, 1.0)
    assert gpu.kernels * 1e-3 > took.seconds + 0.25


def test_the_hot_clock_and_the_reasons_that_hold_it_down(fake, monkeypatch):
    fake.nvmlDeviceGetClockInfo = lambda handle, clock: 1500
    fake.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x1 | 0x4
    gpu = Simulated(monkeypatch)
    assert gpu.watch.reasons() is None
    gpu.watch.windows(gpu.run, 10, 0.1)
    assert (gpu.watch.hot_clock, gpu.watch.reasons(), gpu.watch.power_capped_share) == (1500, ("power cap",), 1.0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = Simulated(monkeypatch)
    gpu.watch.windows(gpu.run, 10, 0.1)
    assert (gpu.watch.clock(), gpu.watch.hot_clock, gpu.watch.reasons()) == (None, None, None)


def test_windows_under_the_power_cap_count_and_those_of_a_hot_gpu_do_not(monkeypatch):
    gpu = Simulated(monkeypatch)
    calm, hot = GpuSample(reasons=("power cap",)), GpuSample(reasons=("power cap", "hardware thermal slowdown"))
    states = itertools.chain([calm, hot, GpuSample(reasons=())], itertools.repeat(calm))
    monkeypatch.setattr(gpu.watch, "sample", lambda: next(states))
    before = gpu.kernels
    windows = gpu.watch.windows(gpu.run, 10, 0.1)
    assert 10 * (len(windows) + 1) == gpu.kernels - before, "one window was left out"
    assert gpu.watch.power_capped_share == pytest.approx(len(windows) / (len(windows) + 1))
    assert gpu.watch.reasons() == ("hardware thermal slowdown", "power cap")
    monkeypatch.setattr(gpu.watch, "sample", lambda: hot)
    assert len(gpu.watch.windows(gpu.run, 10, 0.1)) >= FEWEST, "hot ones, where there are no others"


@pytest.mark.parametrize(
    ("share", "reasons"), [(1.0, ()), (0.6, ("other processes or idle threads, 40% of the time",))]
)
def test_a_cpu_s_windows(monkeypatch, share, reasons):
    """A CPU on which a call takes a millisecond, of which every thread of this process runs `share`."""
    now_ns = [0]

    def run():
        now_ns[0] += 1_000_000

    monkeypatch.setattr(sustained.time, "perf_counter_ns", lambda: now_ns[0])
    monkeypatch.setattr(sustained.time, "process_time", lambda: now_ns[0] / 1e9 * share * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    watch = CpuWatch()
    assert sustain(watch, run, 0.08)[:4] == pytest.approx((1e-3, 1e-3, WINDOWS, 0.08))
    assert (watch.reasons(), watch.power_capped_share) == (reasons, None)
    slow = sustain(CpuWatch(), run, 1e-6)
    assert (slow.samples, slow.best_s) == (FEWEST, pytest.approx(1e-3))


@pytest.mark.gpu
def test_a_captured_call_is_replayed():
    count = torch.zeros((), device="cuda")
    count.add_(1)
    replay = sustained.captured(lambda: count.add_(1), 16)
    before = count.item()
    replay()
    assert count.item() == before + 16
