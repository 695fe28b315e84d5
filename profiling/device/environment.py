"""Description of the machine: hardware, drivers, versions, commit. None is not known."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from kernels.jit import PDL
from profiling.device import nvml

PACKAGES = ("torch", "triton", "numpy", "nvidia-ml-py", "safetensors")


def environment(device: torch.device, root: Path) -> dict[str, Any]:
    """Describe this machine for `device`, and the checkout at `root`."""
    sha, dirty, cudnn = *commit(root), torch.backends.cudnn
    on_gpu = device.type == "cuda"
    return {
        "version": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "gpu": _gpu(device) if on_gpu else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory_bytes(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if on_gpu else None,
        "cudnn_benchmark": cudnn.benchmark if on_gpu else None,
        "cudnn_deterministic": cudnn.deterministic if on_gpu else None,
        "tf32_convolutions": cudnn.allow_tf32 if on_gpu else None,
        "tf32_matrix_products": torch.backends.cuda.matmul.allow_tf32 if on_gpu else None,
        "dependent_launch": PDL if on_gpu else None,
        "git_sha": sha,
        "git_dirty": dirty,
    }


def device_name(device: torch.device) -> str:
    """The product name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else (_cpu_name() or "cpu")


def commit(root: Path) -> tuple[str | None, bool | None]:
    """(sha, whether the tree differs from it) of the checkout at `root`; (None, None) where there is none."""
    try:
        sha = _git(root, "rev-parse", "HEAD")
        return sha, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def gpu_uuid(device: torch.device) -> str:
    """The driver's name of a CUDA device, as `nvml.Gpu` takes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    known = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        **dict.fromkeys(("driver", "sm_clock_mhz", "memory_clock_mhz", "power_limit_w")),
    }
    with contextlib.suppress(nvml.UnavailableError):
        gpu = nvml.Gpu(gpu_uuid(device))
        clocks, limit_mw = gpu.clocks(), gpu.ask("nvmlDeviceGetEnforcedPowerLimit")
        known |= {"sm_clock_mhz": clocks.sm_clock_mhz, "memory_clock_mhz": clocks.memory_clock_mhz}
        known["power_limit_w"] = None if limit_mw is None else limit_mw / 1000
        known["driver"] = nvml.driver()[0]
    return known


def _cpu_name() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def machine(environment: dict[str, Any]) -> dict[str, Any]:
    """The part of `environment` that a timing depends on: device, driver, libraries."""
    e = environment
    about = {"device": e["device"].partition(":")[0], **{name: e["packages"][name] for name in ("torch", "triton")}}
    if e["gpu"] is None:
        return about | {name: e[name] for name in ("cpu", "cores", "threads", "cpu_capability", "platform")}
    of_gpu = ("capability", "memory_bytes", "multiprocessors", "driver", "power_limit_w")
    libraries = {name: e[name] for name in ("cuda", "cudnn")}
    return about | {"gpu": e["gpu"]["name"], **{name: e["gpu"][name] for name in of_gpu}} | libraries


def fingerprint(machine: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that differ where anything in `machine` does."""
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
