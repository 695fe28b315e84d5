"""The driver's view of a GPU (NVML): clocks, the reasons that hold them down, power, activity, energy.

A field that this GPU, driver or user cannot read is None with its reason in `Gpu.unavailable`; a reading that fails
once is None once. Samples never ask for processes: that takes milliseconds under a lock that a launching program needs.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""NVML's clock event reasons (nvml.h, nvmlClocksEventReasons) in words."""

POWER_CAP = "power cap"
"""The board keeps its power limit by lowering the clock: how a large GPU runs large matrix products at all times."""

DISTURBING = {"hardware slowdown", "software thermal slowdown", "hardware thermal slowdown", "power brake"}
"""Reasons that invalidate a timing."""

THROTTLING = DISTURBING | {POWER_CAP}
"""Heat or power."""

GPM_INTERVAL_NS = 105_000_000
"""The counters of GPM are refreshed every 100 ms (NVML API reference, nvmlGpmMetricsGet); an earlier reading measures
nothing."""


class GpuSample(NamedTuple):
    """One reading, at `t_ns` on the monotonic clock; None is not known.

    reasons          clock event reasons in words, empty if there are none
    kernel_running   NVML's "GPU utilisation": share of its last period in which some kernel ran, on however few SMs
    energy_j         since the driver was loaded
    sm_active, tensor_active, dram_active   GPM: mean shares of the SMs, of tensor issue and of DRAM bandwidth since the
                     sample before that has them; GPM_INTERVAL_NS apart at least, None in between
    """

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    reasons: tuple[str, ...] | None = None
    t_ns: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    kernel_running: float | None = None
    memory_used_bytes: int | None = None
    energy_j: float | None = None
    sm_active: float | None = None
    tensor_active: float | None = None
    dram_active: float | None = None

    @property
    def throttled(self) -> bool:
        """Whether the clocks are known to be held down by heat or power."""
        return bool(THROTTLING.intersection(self.reasons or ()))

    @property
    def disturbed(self) -> bool:
        """Whether heat or a power brake is known to hold the clocks down; the power cap alone is normal work."""
        return bool(DISTURBING.intersection(self.reasons or ()))

    @property
    def power_capped(self) -> bool | None:
        """Whether the power limit holds the clock down, None where the reasons are not known."""
        return None if self.reasons is None else POWER_CAP in self.reasons


FIELDS = tuple(name for name in GpuSample._fields if name != "t_ns")


class UnavailableError(Exception):
    """NVML cannot be asked; `str(error)` is the reason in words."""


def in_words(mask: int) -> tuple[str, ...]:
    """NVML's bit mask of reasons; a bit that is not in the table keeps its number."""
    bits = [1 << i for i in range(mask.bit_length()) if mask >> i & 1]
    return tuple(REASONS.get(bit, f"reason {bit:#x}") for bit in bits)


_CLOCKS: dict[str, Callable[[Any, Any], Any]] = {
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "reasons": lambda nvml, gpu: in_words(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)),
}
_READERS = _CLOCKS | {
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "kernel_running": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "memory_used_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "energy_j": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
}
"""NVML counts in milliwatts, millijoules and per cent."""

_ACTIVITY = {
    "sm_active": "NVML_GPM_METRIC_SM_UTIL",
    "tensor_active": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "dram_active": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}
"""GPM's metrics, in per cent."""

_FOR_GOOD = {
    "NVMLError_NotSupported": "not supported on this GPU",
    "NVMLError_NoPermission": "this user may not read it",
    "NVMLError_FunctionNotFound": "this driver cannot tell",
    "AttributeError": "this nvidia-ml-py cannot tell",
}
"""Failures that asking again will not mend."""


def library() -> Any:
    """`pynvml`, initialised. Raises UnavailableError: no library, no driver, or two versions that do not match."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # each kind of failure is a class of its own, and a broken library raises any
        raise UnavailableError(_why_not(error)) from error
    return pynvml


def driver() -> tuple[str, list[str]]:
    """(the driver's version, the UUIDs of its GPUs). Raises UnavailableError."""
    nvml = library()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return nvml.nvmlSystemGetDriverVersion(), [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    except (nvml.NVMLError, AttributeError) as error:
        raise UnavailableError(_why_not(error)) from error


class Gpu:
    """The GPU of a UUID ("GPU-...").

    name         the driver's name for it
    unavailable  fields that cannot be read, and why

    Raises UnavailableError as `library` does, for an unknown UUID, and for None: the run was on no GPU.
    """

    def __init__(self, uuid: str | None):
        pynvml = library()
        if uuid is None:
            raise UnavailableError("the run was not on an NVIDIA GPU")
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.name: str = pynvml.nvmlDeviceGetName(self._handle)
        except (pynvml.NVMLError, AttributeError) as error:
            raise UnavailableError(_why_not(error, uuid)) from error
        self._nvml = pynvml
        self.unavailable: dict[str, str] = {}
        for field, reader in _READERS.items():
            try:
                reader(pynvml, self._handle)
            except (pynvml.NVMLError, AttributeError) as error:
                if reason := _FOR_GOOD.get(type(error).__name__):
                    self.unavailable[field] = reason
        try:
            self._activity: _Activity | None = _Activity(pynvml, self._handle)
        except (pynvml.NVMLError, AttributeError, UnavailableError) as error:
            self._activity = None
            self.unavailable |= dict.fromkeys(_ACTIVITY, _FOR_GOOD.get(type(error).__name__, str(error)))

    def ask(self, function: str) -> Any:
        """The answer of pynvml's `function` about this GPU, None where it fails or does not exist."""
        try:
            return getattr(self._nvml, function)(self._handle)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def sample(self) -> GpuSample:
        """Every field, read now."""
        now_ns = time.monotonic_ns()
        activity = self._activity.read(now_ns) if self._activity else {}
        return GpuSample(t_ns=now_ns, **self._read(_READERS), **activity)

    def clocks(self) -> GpuSample:
        """The clocks and their reasons only."""
        return GpuSample(t_ns=time.monotonic_ns(), **self._read(_CLOCKS))

    def _read(self, readers: dict[str, Callable]) -> dict[str, Any]:
        values = {}
        for field in (field for field in readers if field not in self.unavailable):
            with contextlib.suppress(self._nvml.NVMLError):
                values[field] = readers[field](self._nvml, self._handle)
        return values


class _Activity:
    """GPM, the activity counters of a Hopper GPU or newer: shares from the difference of two samples.

    Raises UnavailableError for an older GPU, and NVMLError.
    """

    def __init__(self, nvml: Any, handle: Any):
        if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            raise UnavailableError("activity counters (GPM) need a Hopper GPU or newer")
        self._nvml, self._handle = nvml, handle
        self._request = nvml.c_nvmlGpmMetricsGet_t()
        self._request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(_ACTIVITY)
        for i, metric in enumerate(_ACTIVITY.values()):
            self._request.metrics[i].metricId = getattr(nvml, metric)
        self._before, self._now = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        self._taken_ns = time.monotonic_ns()
        nvml.nvmlGpmSampleGet(handle, self._before)

    def read(self, now_ns: int) -> dict[str, float]:
        """Shares since the reading before, each 0 to 1; {} after less than GPM_INTERVAL_NS, or where it failed."""
        if now_ns - self._taken_ns < GPM_INTERVAL_NS:
            return {}
        try:
            self._nvml.nvmlGpmSampleGet(self._handle, self._now)
            self._request.sample1, self._request.sample2 = self._before, self._now
            self._taken_ns, self._before, self._now = now_ns, self._now, self._before
            self._nvml.nvmlGpmMetricsGet(self._request)
        except self._nvml.NVMLError:
            return {}
        found = zip(_ACTIVITY, self._request.metrics, strict=False)
        return {field: m.value / 100 for field, m in found if m.nvmlReturn == 0 and math.isfinite(m.value)}


def sampler(uuid: str) -> Callable[[], GpuSample | None]:
    """A function that reads the clocks of the GPU of this UUID ("GPU-..."); it returns None where NVML cannot."""
    try:
        return Gpu(uuid).clocks
    except UnavailableError:
        return lambda: None


def _why_not(error: Exception, uuid: str | None = None) -> str:
    if isinstance(error, ImportError):
        return "nvidia-ml-py is not installed"
    reasons = {
        "NVMLError_LibraryNotFound": "no NVIDIA driver",
        "NVMLError_DriverNotLoaded": "no NVIDIA driver",
        "NVMLError_LibRmVersionMismatch": "the NVIDIA driver's library and kernel module are of different versions: "
        "restart the machine",
        "NVMLError_NotFound": f"NVML knows no GPU {uuid}",
        "NVMLError_InvalidArgument": f"NVML knows no GPU {uuid}",
        "NVMLError_NoPermission": f"this user may not ask NVML about {uuid or 'a GPU'}",
    }
    return reasons.get(type(error).__name__, f"NVML: {error or type(error).__name__}".splitlines()[0])
