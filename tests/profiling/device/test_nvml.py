import sys

import pytest

from profiling.device import nvml
from profiling.device.nvml import Gpu, GpuSample, UnavailableError, in_words

ACTIVITY = ("sm_active", "tensor_active", "dram_active")
HOT = ("software thermal slowdown",)


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock that `nvml` reads, as a list of one time to be moved."""
    now_ns = [10**12]
    monkeypatch.setattr(nvml.time, "monotonic_ns", lambda: now_ns[0])
    return now_ns


def test_reasons_in_words():
    assert in_words(0) == ()
    assert in_words(0x1 | 0x40) == ("idle", "hardware thermal slowdown")
    assert in_words(1 << 20) == ("reason 0x100000",)


@pytest.mark.parametrize(
    ("mask", "throttled", "disturbed", "capped"),
    [
        *[(mask, False, False, False) for mask in (0, 0x1, 0x2, 0x100)],  # none, idle, application and display clocks
        (0x4, True, False, True),
        *[(mask, True, True, False) for mask in (0x8, 0x20, 0x40, 0x80)],
    ],
)
def test_heat_and_power_throttle_and_all_but_the_power_cap_disturb(mask, throttled, disturbed, capped):
    sample = GpuSample(1, 1, in_words(mask))
    assert (sample.throttled, sample.disturbed, sample.power_capped) == (throttled, disturbed, capped)
    assert GpuSample().power_capped is None


def test_samples_are_in_the_units_of_their_fields(fake, clock):
    clocks = {"sm_clock_mhz": 1980, "memory_clock_mhz": 3201, "reasons": HOT, "t_ns": 10**12}
    others = {"power_w": 512.345, "temperature_c": 61, "kernel_running": 0.97, "memory_used_bytes": 3 << 30}
    energy_j = 1012.5  # the first reading was the probe
    assert Gpu("GPU-0").sample() == GpuSample(**clocks, **others, energy_j=energy_j)
    sample = nvml.sampler("GPU-0")
    for name in SOURCES.values():
        if "Clock" not in name:
            delattr(fake, name)
    assert sample() == GpuSample(**clocks), "the sampler of the micro-benchmarks reads nothing else"


def test_activity_is_read_as_often_as_its_counters_are_refreshed(fake, clock):
    gpu, start_ns, found = Gpu("GPU-0"), clock[0], []
    for ms in range(25, 275, 25):
        clock[0] = start_ns + ms * 10**6
        found.append(gpu.sample())
    with_activity = {(s.t_ns - start_ns) // 10**6: s for s in found if s.sm_active is not None}
    assert list(with_activity) == [125, 250]
    for s in with_activity.values():  # from samples that follow one another: the fake multiplies by their distance
        assert [getattr(s, field) for field in ACTIVITY] == [0.1, 0.2, 0.3]


def test_activity_that_is_not_a_number_is_not_known(fake, clock):
    gpu, metrics_get = Gpu("GPU-0"), fake.nvmlGpmMetricsGet

    def broken(request):
        metrics_get(request)
        request.metrics[0].value = float("nan")
        request.metrics[1].nvmlReturn = 3

    fake.nvmlGpmMetricsGet = broken
    clock[0] += 10**9
    sample = gpu.sample()
    assert [getattr(sample, field) for field in ACTIVITY] == [None, None, 0.3]


@pytest.mark.parametrize(
    ("function", "field", "value", "at_the_probe"),
    [
        ("nvmlGpmSampleGet", "sm_active", 0.1, False),
        ("nvmlGpmMetricsGet", "sm_active", 0.1, False),
        ("nvmlDeviceGetPowerUsage", "power_w", 512.345, False),
        ("nvmlDeviceGetPowerUsage", "power_w", 512.345, True),
    ],
)
def test_a_passing_failure_is_none_only_while_it_lasts(fake, clock, function, field, value, at_the_probe):
    working = getattr(fake, function)
    gpu = None if at_the_probe else Gpu("GPU-0")
    fake.fail(function, "Unknown")
    gpu = gpu or Gpu("GPU-0")
    clock[0] += 10**9
    assert getattr(gpu.sample(), field) is None
    setattr(fake, function, working)
    clock[0] += 10**9
    assert getattr(gpu.sample(), field) == value
    assert not gpu.unavailable


SOURCES = {
    "sm_clock_mhz": "nvmlDeviceGetClockInfo",
    "memory_clock_mhz": "nvmlDeviceGetClockInfo",
    "reasons": "nvmlDeviceGetCurrentClocksEventReasons",
    "power_w": "nvmlDeviceGetPowerUsage",
    "temperature_c": "nvmlDeviceGetTemperature",
    "kernel_running": "nvmlDeviceGetUtilizationRates",
    "memory_used_bytes": "nvmlDeviceGetMemoryInfo",
    "energy_j": "nvmlDeviceGetTotalEnergyConsumption",
    "sm_active": "nvmlGpmQueryDeviceSupport",
}


@pytest.mark.parametrize(("field", "function"), SOURCES.items())
def test_a_field_that_is_not_supported_is_not_known_and_says_why(fake, field, function):
    fake.fail(function, "NotSupported")
    gpu = Gpu("GPU-0")
    assert gpu.unavailable[field] == "not supported on this GPU"
    sample = gpu.sample()
    assert getattr(sample, field) is None
    others = {f for f in SOURCES if SOURCES[f] != function and f != "sm_active"}
    assert not [f for f in others if getattr(sample, f) is None]
    assert not others & set(gpu.unavailable)


def test_lasting_failures_cost_their_fields_and_have_their_reason(fake):
    for error, reason in (("NoPermission", "may not read"), ("FunctionNotFound", "driver cannot tell")):
        fake.fail("nvmlDeviceGetTotalEnergyConsumption", error)
        assert reason in Gpu("GPU-0").unavailable["energy_j"]
    del fake.nvmlDeviceGetTotalEnergyConsumption  # an older library
    fake.nvmlGpmQueryDeviceSupport = lambda handle: fake.c_nvmlGpmSupport_t(version=1, isSupportedDevice=0)
    gpu = Gpu("GPU-0")
    too_old = dict.fromkeys(ACTIVITY, "activity counters (GPM) need a Hopper GPU or newer")
    assert gpu.unavailable == {"energy_j": "this nvidia-ml-py cannot tell", **too_old}
    assert gpu.sample().sm_clock_mhz == 1980


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("LibraryNotFound", "no NVIDIA driver"),
        ("DriverNotLoaded", "no NVIDIA driver"),
        ("LibRmVersionMismatch", "different versions"),
        ("GpuIsLost", "NVML: GpuIsLost"),
        (None, "nvidia-ml-py is not installed"),
    ],
)
def test_why_there_is_no_nvml(fake, monkeypatch, error, reason):
    if error:
        fake.fail("nvmlInit", error)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    for ask in (nvml.driver, lambda: Gpu("GPU-0"), lambda: Gpu(None)):
        with pytest.raises(UnavailableError, match=reason):
            ask()
    assert nvml.sampler("GPU-0")() is None


def test_which_gpu_is_meant(fake):
    assert nvml.driver() == ("570.86.15", ["GPU-0"])
    fake.fail("nvmlDeviceGetCount", "Unknown")
    for ask, reason in (
        (lambda: Gpu("GPU-1"), "NVML knows no GPU GPU-1"),
        (lambda: Gpu(None), "the run was not on an NVIDIA GPU"),
        (nvml.driver, "NVML: Unknown"),
    ):
        with pytest.raises(UnavailableError, match=reason):
            ask()


def test_the_fake_is_like_the_library(fake):
    sys.modules.pop("pynvml")
    real = pytest.importorskip("pynvml")
    own = {"UUID", "NAME", "fail", "ctypes", "itertools", "os"}
    for name in (n for n in vars(fake) if not n.startswith("_") and n not in own):
        assert hasattr(real, name), name
        if isinstance(getattr(fake, name), int):
            assert getattr(real, name) == getattr(fake, name), name
        for field, _ in getattr(getattr(fake, name), "_fields_", ()):
            assert field == "number" or hasattr(getattr(real, name), field), (name, field)


def test_activity_through_the_library_s_own_structures(clock, monkeypatch):
    real = pytest.importorskip("pynvml")
    numbers = iter(range(1, 9))

    def metrics_get(request):
        for metric in request.metrics[: request.numMetrics]:
            metric.value = 25.0 + metric.metricId

    monkeypatch.setattr(real, "nvmlGpmQueryDeviceSupport", lambda handle: real.c_nvmlGpmSupport_t(1, 1))
    monkeypatch.setattr(real, "nvmlGpmSampleAlloc", real.c_nvmlGpmSample_t)
    monkeypatch.setattr(real, "nvmlGpmSampleGet", lambda handle, sample: next(numbers))
    monkeypatch.setattr(real, "nvmlGpmMetricsGet", metrics_get)
    activity = nvml._Activity(real, None)
    assert activity.read(clock[0] + 10**9) == {"sm_active": 0.27, "tensor_active": 0.3, "dram_active": 0.35}
