"""Nsight Compute (ncu): measured DRAM traffic and tensor activity per kernel.

ncu replays kernels one by one, so its times are not a run's; the account does not use them. Caches are flushed before
each kernel: its bytes compare with the compulsory traffic of the cost functions. Clocks are left as in training. Where
ncu cannot run, there is a reason and no failure.
"""

import contextlib
import csv
import glob
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from profiling.device import nvml

METRICS = {
    "dram_bytes": "dram__bytes.sum",
    "tensor_active": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "duration_ns": "gpu__time_duration.sum",
}
BASE = {
    **{"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 0.01},
    **{"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9},
    **{"nsecond": 1, "usecond": 1e3, "msecond": 1e6, "second": 1e9},
}
"""Factors to bytes, shares of 1 and nanoseconds, by the units that ncu's versions print."""

PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
PARAMETERS = Path("/proc/driver/nvidia/params")
STATUS = Path("/proc/self/status")
ADMIN_CAPABILITIES = (21, 38)
"""CAP_SYS_ADMIN, and CAP_PERFMON, which drivers from R565 on accept too (NVIDIA, "ERR_NVGPUCTRPERM")."""
REMEDY = (
    "let an administrator load the driver with NVreg_RestrictProfilingToAdminUsers=0, or start the container with "
    "--cap-add=SYS_ADMIN"
)


class Measured(NamedTuple):
    """One launch of a kernel: bytes to and from DRAM, share (0..1) of cycles with a busy tensor pipe, nanoseconds.

    None is not known.
    """

    name: str
    dram_bytes: float | None
    tensor_active: float | None
    duration_ns: float | None


def find() -> str | None:
    """The path of ncu: on PATH, or the newest in its installers' places."""
    return shutil.which("ncu") or max((path for place in PLACES for path in glob.glob(place)), default=None)


def probe() -> str | None:
    """The reason why ncu cannot read counters here, with the remedy; None if none is known."""
    gpus: list[str] = []
    with contextlib.suppress(nvml.UnavailableError):
        _, gpus = nvml.driver()
    if not gpus:
        return "there is no NVIDIA GPU whose counters could be read"
    if find() is None:
        return "ncu is not installed: install Nsight Compute, or put the folder that holds ncu on PATH"
    if _restricted() and not _administrator():
        return f"the driver lets only administrators read counters (ERR_NVGPUCTRPERM): {REMEDY}"
    return None


def _restricted() -> bool:
    with contextlib.suppress(OSError):
        return "RmProfilingAdminOnly: 1" in PARAMETERS.read_text()
    return False


def _administrator() -> bool:
    """By this process's effective capabilities; root in a container lacks them."""
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        effective = int(lines["CapEff"], 16)
    except (OSError, KeyError, ValueError):
        return hasattr(os, "geteuid") and os.geteuid() == 0
    return any(effective >> bit & 1 for bit in ADMIN_CAPABILITIES)


def command(argv: Sequence[str], out: Path, launches: int = 2000) -> list[str]:
    """The command line that runs `argv` under ncu and writes CSV for `read` to `out`.

    It measures at most `launches` kernels between torch.cuda.profiler.start() and stop(), those of a CUDA graph one by
    one. `argv` must not use torch.profiler: a process has room for one client of the profiling interface.
    """
    return [
        find() or "ncu",
        *("--metrics", ",".join(METRICS.values())),
        *("--csv", "--page", "raw", "--print-units", "base"),
        *("--log-file", str(out)),
        *("--profile-from-start", "off", "--launch-count", str(launches)),
        *("--target-processes", "all", "--graph-profiling", "node"),
        *("--cache-control", "all", "--clock-control", "none"),
        *argv,
    ]


def hint(text: str) -> str | None:
    """The error that ncu reports in its output `text`, with its remedy; None where it reports none."""
    if "ERR_NVGPUCTRPERM" in text:
        return f"ncu may not read the GPU's counters (ERR_NVGPUCTRPERM): {REMEDY}"
    errors = [line.removeprefix("==ERROR==").strip() for line in text.splitlines() if line.startswith("==ERROR==")]
    return f"ncu: {errors[0]}" if errors else None


def read(text: str) -> list[Measured]:
    """The launches in the output of `command`, in order. Lines outside the table and torn rows are skipped."""
    rows = csv.reader(line for line in text.splitlines() if not line.startswith("==") and "\0" not in line)
    header = next((row for row in rows if "Kernel Name" in row), None)
    if header is None:
        return []
    units = next(rows, [])
    place = {field: header.index(metric) for field, metric in METRICS.items() if metric in header}
    name = header.index("Kernel Name")
    return [
        Measured(row[name], *(_number(row, units, place.get(field)) for field in METRICS))
        for row in rows
        if len(row) == len(header)
    ]


def _number(row: list[str], units: list[str], place: int | None) -> float | None:
    """The cell at `place` in base units; None where there is none, or ncu could not tell ("n/a")."""
    try:
        value = float(row[place].replace(",", "")) * BASE[units[place]]
    except (TypeError, ValueError, KeyError, IndexError):
        return None
    return value if math.isfinite(value) else None
