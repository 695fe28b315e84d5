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

UUID = "GPU-0"
NAME = "NVIDIA H200"


class NVMLError(Exception):
    pass


for _name in (
    "NotSupported",
    "NoPermission",
    "FunctionNotFound",
    "LibraryNotFound",
    "DriverNotLoaded",
    "LibRmVersionMismatch",
    "NotFound",
    "InvalidArgument",
    "GpuIsLost",
    "Unknown",
):
    globals()[f"NVMLError_{_name}"] = type(f"NVMLError_{_name}", (NVMLError,), {})


class c_nvmlUtilization_t(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class c_nvmlMemory_t(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class struct_c_nvmlGpmSample_t(ctypes.Structure):
    _fields_ = (("number", ctypes.c_uint),)


c_nvmlGpmSample_t = ctypes.POINTER(struct_c_nvmlGpmSample_t)


class c_nvmlGpmMetric_t(ctypes.Structure):
    _fields_ = (("metricId", ctypes.c_uint), ("nvmlReturn", ctypes.c_uint), ("value", ctypes.c_double))


class c_nvmlGpmMetricsGet_t(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint),
        ("numMetrics", ctypes.c_uint),
        ("sample1", c_nvmlGpmSample_t),
        ("sample2", c_nvmlGpmSample_t),
        ("metrics", c_nvmlGpmMetric_t * 8),
    )


class c_nvmlGpmSupport_t(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint), ("isSupportedDevice", ctypes.c_uint))


class c_nvmlProcessInfo_v2_t(ctypes.Structure):
    _fields_ = (("pid", ctypes.c_uint),)


def nvmlInit():
    pass


def nvmlSystemGetDriverVersion():
    return "570.86.15"


def nvmlDeviceGetCount():
    return 1


def nvmlDeviceGetHandleByIndex(index):
    return {0: UUID}[index]


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != UUID:
        raise globals()["NVMLError_NotFound"]("Not Found")
    return uuid


_answers = {
    "nvmlDeviceGetUUID": UUID,
    "nvmlDeviceGetName": NAME,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x20,
    "nvmlDeviceGetPowerUsage": 512_345,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetUtilizationRates": c_nvmlUtilization_t(gpu=97, memory=40),
    "nvmlDeviceGetMemoryInfo": c_nvmlMemory_t(total=8 << 30, free=5 << 30, used=3 << 30),
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetComputeRunningProcesses": [c_nvmlProcessInfo_v2_t(pid=os.getpid())],
}
for _name, _answer in _answers.items():
    globals()[_name] = lambda handle, answer=_answer: answer


def nvmlDeviceGetClockInfo(handle, clock):
    return {NVML_CLOCK_SM: 1980, NVML_CLOCK_MEM: 3201}[clock]


def nvmlDeviceGetTemperature(handle, sensor):
    return {NVML_TEMPERATURE_GPU: 61}[sensor]


_millijoules = itertools.count(1_000_000, 12_500)


def nvmlDeviceGetTotalEnergyConsumption(handle):
    return next(_millijoules)


def nvmlGpmQueryDeviceSupport(handle):
    return c_nvmlGpmSupport_t(version=1, isSupportedDevice=1)


def nvmlGpmSampleAlloc():
    return c_nvmlGpmSample_t(struct_c_nvmlGpmSample_t())


_samples = itertools.count(1)


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
