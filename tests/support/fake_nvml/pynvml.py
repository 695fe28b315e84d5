"""NVML without a GPU, for tests: the names, classes and units of nvidia-ml-py's `pynvml` that the profiler uses.

In a process of its own it is found through PYTHONPATH; FAKE_NVML then names the fault: a NVMLError class without its
prefix, raised by nvmlInit ("DriverNotLoaded"), or FUNCTION=Class, raised by that function.
"""

import ctypes
import itertools
import os

NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
NVML_TEMPERATURE_GPU = 0
NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRIC_ANY_TENSOR_UTIL, NVML_GPM_METRIC_DRAM_BW_UTIL = 2, 5, 10
NVML_GPM_METRICS_GET_VERSION = 1


class NVMLError(Exception):
    pass


for _name in (
    *("NotSupported", "NoPermission", "FunctionNotFound", "LibraryNotFound", "DriverNotLoaded"),
    *("LibRmVersionMismatch", "NotFound", "InvalidArgument", "GpuIsLost", "Unknown"),
):
    globals()[f"NVMLError_{_name}"] = type(f"NVMLError_{_name}", (NVMLError,), {})


def _structure(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


_uint, _bytes = ctypes.c_uint, ctypes.c_ulonglong
c_nvmlUtilization_t = _structure("c_nvmlUtilization_t", gpu=_uint, memory=_uint)
c_nvmlMemory_t = _structure("c_nvmlMemory_t", total=_bytes, free=_bytes, used=_bytes)
struct_c_nvmlGpmSample_t = _structure("struct_c_nvmlGpmSample_t", number=_uint)
c_nvmlGpmSample_t = ctypes.POINTER(struct_c_nvmlGpmSample_t)
c_nvmlGpmMetric_t = _structure("c_nvmlGpmMetric_t", metricId=_uint, nvmlReturn=_uint, value=ctypes.c_double)
c_nvmlGpmMetricsGet_t = _structure(
    "c_nvmlGpmMetricsGet_t",
    **{"version": _uint, "numMetrics": _uint, "sample1": c_nvmlGpmSample_t, "sample2": c_nvmlGpmSample_t},
    metrics=c_nvmlGpmMetric_t * 8,
)
c_nvmlGpmSupport_t = _structure("c_nvmlGpmSupport_t", version=_uint, isSupportedDevice=_uint)
c_nvmlProcessInfo_v2_t = _structure("c_nvmlProcessInfo_v2_t", pid=_uint)

_millijoules, _samples = itertools.count(1_000_000, 12_500), itertools.count(1)
_answers = {
    "nvmlInit": lambda: None,
    "nvmlSystemGetDriverVersion": lambda: "570.86.15",
    "nvmlDeviceGetCount": lambda: 1,
    "nvmlDeviceGetHandleByIndex": lambda index: {0: "GPU-0"}[index],
    "nvmlDeviceGetUUID": lambda handle: handle,
    "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
    "nvmlDeviceGetClockInfo": lambda handle, clock: {NVML_CLOCK_SM: 1980, NVML_CLOCK_MEM: 3201}[clock],
    "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x20,
    "nvmlDeviceGetPowerUsage": lambda handle: 512_345,
    "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
    "nvmlDeviceGetTemperature": lambda handle, sensor: {NVML_TEMPERATURE_GPU: 61}[sensor],
    "nvmlDeviceGetUtilizationRates": lambda handle: c_nvmlUtilization_t(gpu=97, memory=40),
    "nvmlDeviceGetMemoryInfo": lambda handle: c_nvmlMemory_t(total=8 << 30, free=5 << 30, used=3 << 30),
    "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(_millijoules),
    "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
    "nvmlDeviceGetPersistenceMode": lambda handle: 1,
    "nvmlDeviceGetEccMode": lambda handle: [1, 1],
    "nvmlDeviceGetComputeRunningProcesses": lambda handle: [c_nvmlProcessInfo_v2_t(pid=os.getpid())],
    "nvmlGpmQueryDeviceSupport": lambda handle: c_nvmlGpmSupport_t(version=1, isSupportedDevice=1),
    "nvmlGpmSampleAlloc": lambda: c_nvmlGpmSample_t(struct_c_nvmlGpmSample_t()),
}
globals().update(_answers)


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != "GPU-0":
        raise globals()["NVMLError_NotFound"]("Not Found")
    return uuid


def nvmlGpmSampleGet(handle, sample):
    sample.contents.number = next(_samples)
    return sample


def nvmlGpmMetricsGet(request):
    """SM 10 %, tensor cores 20 %, DRAM 30 % times the number of samples between the two."""
    assert request.version == NVML_GPM_METRICS_GET_VERSION
    between = request.sample2.contents.number - request.sample1.contents.number
    percent = {NVML_GPM_METRIC_SM_UTIL: 10, NVML_GPM_METRIC_ANY_TENSOR_UTIL: 20, NVML_GPM_METRIC_DRAM_BW_UTIL: 30}
    for metric in request.metrics[: request.numMetrics]:
        metric.nvmlReturn, metric.value = 0, percent[metric.metricId] * between
    return request


def fail(function, error):
    """From now on calling `function` raises a NVMLError_`error`."""

    def faulty(*arguments):
        raise globals()[f"NVMLError_{error}"](error)

    globals()[function] = faulty


if os.environ.get("FAKE_NVML"):
    *_function, _error = os.environ["FAKE_NVML"].split("=")
    fail(_function[0] if _function else "nvmlInit", _error)
