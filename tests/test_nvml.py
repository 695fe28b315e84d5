import sys
import types

import pytest

from profiling import nvml


def test_reasons_in_words():
    assert nvml.in_words(0) == ()
    assert nvml.in_words(0x1 | 0x40) == ("idle", "hardware thermal slowdown")
    assert nvml.in_words(1 << 20) == ("reason 0x100000",)


@pytest.mark.parametrize("mask", [0x4, 0x8, 0x20, 0x40, 0x80])
def test_heat_and_power_throttle(mask):
    assert nvml.GpuSample(1, 1, nvml.in_words(mask)).throttled


class _NVMLError(Exception):
    pass


def fake_pynvml(monkeypatch, **functions):
    module = types.SimpleNamespace(
        NVMLError=_NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, clock: {1: 1980, 2: 3201}[clock],
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x20,
    )
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)


def unsupported(*arguments):
    raise _NVMLError("not supported")


def test_a_sample(monkeypatch):
    fake_pynvml(monkeypatch)
    assert nvml.sampler("GPU-0")() == nvml.GpuSample(1980, 3201, ("software thermal slowdown",))


def test_a_field_that_is_not_supported_is_not_known(monkeypatch):
    fake_pynvml(monkeypatch, nvmlDeviceGetCurrentClocksEventReasons=unsupported)
    assert nvml.sampler("GPU-0")() == nvml.GpuSample(1980, 3201, None)


def test_no_driver_is_no_sample(monkeypatch):
    fake_pynvml(monkeypatch, nvmlInit=unsupported)
    assert nvml.sampler("GPU-0")() is None


def test_no_library_is_no_sample(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.sampler("GPU-0")() is None
