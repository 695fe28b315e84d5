"""`python -m profiling doctor`: checks of this machine for training and profiling, each with its remedy.

Nothing here raises and nothing is changed: a check that fails is a line that says so.
"""

import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from profiling import ROOT
from profiling.device import ncu, nvml
from profiling.device.specifications import specification

if TYPE_CHECKING:
    from profiling.output.terminal import Terminal

OK, WARNING, MISSING = "ok", "warning", "missing"
STYLES = {OK: "green", WARNING: "yellow", MISSING: "red"}
ENOUGH_GPU_BYTES = 4 << 30
"""The article's network at batch 512 took 2.2 GB of a CPU's memory; the library's workspaces come on top."""
ENOUGH_DISK_BYTES = 2 << 30
"""The data take 0.35 GB with their archive; a run's checkpoints, and a trace of up to 200 MB, come on top."""
DATA_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
DATA_FILE_BYTES = 30_730_000
INSTALL = "Run `pip install -e .` in the checkout"


class Check(NamedTuple):
    """One line: `status` is ok, warning or missing; `remedy` is one sentence, or None."""

    name: str
    status: str
    found: str
    remedy: str | None = None


def run(terminal: "Terminal", as_json: bool = False) -> None:
    """Print every check as a line, with its remedy below."""
    found = list(checks())
    column = 2 + len(WARNING) + max(len(check.name) for check in found)
    width = max(min(terminal.out.width, 120) - column - 1, 20)
    for check in found:
        lead = f"{check.status:<{len(WARNING)}} {check.name}".ljust(column)
        for line in textwrap.wrap(check.found, width):
            terminal.say(f"{lead} {line}", STYLES[check.status])
            lead = " " * column
        for line in textwrap.wrap(check.remedy or "", width):
            terminal.say(f"{lead} {line}")
    if as_json:
        terminal.put(json.dumps([check._asdict() for check in found]))


def checks() -> Iterator[Check]:
    """Every check, in the order of the lines."""
    uuids: list[str] = []
    try:
        version, uuids = nvml.driver()
    except nvml.UnavailableError as error:
        remedy = "On a machine with an NVIDIA GPU, install or repair its driver; without one, training uses the CPU."
        yield Check("driver", MISSING, str(error), remedy)
    else:
        gpus = f"{len(uuids)} GPU{'s' * (len(uuids) != 1)}" if uuids else "and no GPU"
        yield _check("driver", bool(uuids), f"{version}, {gpus}", "Give this container or machine a GPU.", MISSING)
    for name, check in [
        ("GPU", lambda: _torch_gpu(bool(uuids))),
        *((uuid, lambda uuid=uuid: _gpu(nvml.Gpu(uuid))) for uuid in uuids),
        ("Nsight Compute", _ncu),
        ("versions", _versions),
        ("C compiler", _compiler),
        ("CPU threads", _threads),
        ("disk", _disk),
        ("compiler caches", _caches),
        ("CIFAR-10", _data),
    ]:
        try:
            yield from check()
        except Exception as error:  # a check that fails is itself a finding
            yield Check(name, WARNING, f"could not be checked ({type(error).__name__}: {error})".replace("\n", " "))


def _check(name: str, good: bool, found: str, remedy: str, status: str = WARNING) -> Check:
    """A check that is ok if `good`, and else `status` with its `remedy`."""
    return Check(name, OK, found) if good else Check(name, status, found, remedy)


def _torch_gpu(has_gpu: bool) -> Iterator[Check]:
    """Whether PyTorch can use the driver's GPUs."""
    import torch  # a finding, where it is not installed

    if torch.cuda.is_available():
        yield Check("GPU", OK, f"PyTorch finds {torch.cuda.device_count()}, for CUDA {torch.version.cuda}")
        return
    found, remedy = "none", "Training works on the CPU; the kernels and their figures need a GPU."
    if has_gpu and torch.version.cuda is None:
        found = f"torch {torch.__version__} is built without CUDA"
        remedy = "Install the build of torch for CUDA, as https://pytorch.org/get-started says."
    elif has_gpu:
        found = f"PyTorch finds none, for CUDA {torch.version.cuda}"
        remedy = "See that CUDA_VISIBLE_DEVICES names a GPU and that the driver is new enough for torch's CUDA."
    yield Check("GPU", MISSING, found, remedy)


def _gpu(gpu: nvml.Gpu) -> Iterator[Check]:
    """One GPU by NVML; an answer of None is not known, and warned of like a bad one."""
    from kernels.jit import MIN_CAPABILITY  # imports torch

    capability = gpu.ask("nvmlDeviceGetCudaComputeCapability")
    found = f"{gpu.name}: {'.'.join(map(str, capability or ['unknown']))}"
    needs = ".".join(map(str, MIN_CAPABILITY))
    remedy = f"The kernels need {needs} or later: an older GPU's preset falls back to the library's operations."
    yield _check("capability", tuple(capability or ()) >= MIN_CAPABILITY, found, remedy)
    sheet = specification(gpu.name)
    remedy = "Utilisation is given against the measured ceiling alone; see `python -m profiling device --list`."
    yield _check("specification", sheet is not None, sheet.name if sheet else f"{gpu.name} is not in the table", remedy)
    yield _clocks(gpu.clocks())
    if (persistent := gpu.ask("nvmlDeviceGetPersistenceMode")) is not None:
        remedy = "Let an administrator run `nvidia-smi -pm 1`, or each run first waits for the driver to load."
        yield _check("persistence", bool(persistent), "on" if persistent else "off", remedy)
    if (ecc := gpu.ask("nvmlDeviceGetEccMode")) is not None:
        yield Check("ECC", OK, "on" if ecc[0] else "off")
    processes, found, others = gpu.ask("nvmlDeviceGetComputeRunningProcesses"), "unknown", None
    if processes is not None:
        others = sum(process.pid != os.getpid() for process in processes)
        found = f"{others} on this GPU" if others else "none"
    remedy = "See with `nvidia-smi` that nobody else uses the GPU: times measured beside others mean nothing."
    yield _check("other processes", others == 0, found, remedy)
    memory = gpu.ask("nvmlDeviceGetMemoryInfo")
    found = f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free" if memory else "unknown"
    enough = f"{ENOUGH_GPU_BYTES >> 30} GiB are enough at batch 512"
    remedy = f"End what `nvidia-smi` shows on it, or train with a smaller batch: {enough}."
    yield _check("GPU memory", bool(memory) and memory.free >= ENOUGH_GPU_BYTES, found, remedy)


def _clocks(sample: nvml.GpuSample) -> Check:
    if sample.sm_clock_mhz is None:
        return Check("clocks", WARNING, "unknown", "Timings cannot be checked for throttling here.")
    memory = "unknown" if sample.memory_clock_mhz is None else f"{sample.memory_clock_mhz} MHz"
    reasons = "unknown reasons" if sample.reasons is None else ", ".join(sample.reasons) or "nothing"
    found = f"SM {sample.sm_clock_mhz} MHz, memory {memory}, held down by: {reasons}"
    remedy = "Cool the GPU or raise its power limit before timing anything."
    return _check("clocks", not sample.throttled, found, remedy)


def _ncu() -> Iterator[Check]:
    reason = ncu.probe()
    if reason is None:
        yield Check("Nsight Compute", OK, f"{ncu.find()}, and nothing forbids it to read counters")
    else:
        name, _, remedy = reason.partition(": ")
        remedy = remedy or "Without it the report has no measured DRAM traffic, and nothing else is missing."
        yield Check("Nsight Compute", WARNING, name, remedy[0].upper() + remedy[1:].rstrip(".") + ".")


def _versions() -> Iterator[Check]:
    """Python and the packages against the bounds in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds, python = project["requires-python"], platform.python_version()
    remedy = "Use another Python: this version has not been tried."
    yield _check("Python", admits(python, bounds), f"{python}, expected {bounds}", remedy)
    for requirement in project["dependencies"]:
        wanted, _, marker = requirement.partition(";")
        name, bounds = re.fullmatch(r"\s*([\w.-]+)\s*(.*?)\s*", wanted).groups()
        if "Linux" in marker and platform.system() != "Linux":
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, MISSING, f"not installed, needs {bounds}", f"{INSTALL}.")
        else:
            remedy = f"{INSTALL}: this version has not been tried."
            yield _check(name, admits(version, bounds), f"{version}, expected {bounds}", remedy)


def admits(version: str, bounds: str) -> bool:
    """Whether `version` is within `bounds`, as in ">=2.11,<2.14"; local parts and pre-releases are ignored."""
    have = _release(version)
    for bound in bounds.split(","):
        sign, number = re.fullmatch(r"\s*(>=|<)([\d.]+)\s*", bound).groups()
        if (have >= _release(number)) != (sign == ">="):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu": without trailing zeros, so that 2.11 and 2.11.0 are the same."""
    return tuple(int(part) for part in re.sub(r"(\.0+)+$", "", re.match(r"\d+(\.\d+)*", version)[0]).split("."))


def _compiler() -> Iterator[Check]:
    """The compiler of Triton's kernel launchers, found as triton/runtime/build.py finds it."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    absent = [name for name, there in (("gcc or clang", compiler), (str(header), header.exists())) if not there]
    remedy = "Install gcc and Python's headers, or name a compiler in CC: without them Triton launches no kernel."
    found = f"no {' and no '.join(absent)}" if absent else f"{compiler}, and {header}"
    yield _check("C compiler", not absent, found, remedy, MISSING)


def _threads() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    remedy = "Unset OMP_NUM_THREADS, or set it to the number of physical cores."
    yield _check("CPU threads", cores / 2 <= threads <= cores, f"{threads} on {cores} core{'s' * (cores != 1)}", remedy)


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = f"Make room in {Path.cwd()} or name another place with --out: a profiled run may take 2 GiB."
    yield _check("disk", free >= ENOUGH_DISK_BYTES, f"{free / 2**30:.1f} GiB free", remedy)


def _caches() -> Iterator[Check]:
    for name, variable, default in (
        ("Triton's cache", "TRITON_CACHE_DIR", lambda: Path.home() / ".triton" / "cache"),
        (
            "Inductor's cache",
            "TORCHINDUCTOR_CACHE_DIR",
            lambda: Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}",
        ),
    ):
        try:
            folder = place = Path(os.environ.get(variable) or default())
            while not folder.exists():
                folder = folder.parent
            with tempfile.TemporaryFile(dir=folder):
                yield Check(name, OK, str(place))
        except (OSError, RuntimeError, KeyError) as error:  # RuntimeError and KeyError: a user without home or name
            remedy = f"Set {variable} to a folder that can be written to, or every process compiles anew or fails."
            yield Check(name, WARNING, f"cannot be written: {error}", remedy)


def _data() -> Iterator[Check]:
    """The data's files by name and size, in the folders where a run looks; a run checks their contents."""
    for folder in (Path("data", "cifar-10-batches-bin"), Path("data")):
        sizes = [path.stat().st_size if path.is_file() else None for path in (folder / name for name in DATA_FILES)]
        if sizes == [DATA_FILE_BYTES] * len(DATA_FILES):
            yield Check("CIFAR-10", OK, f"six files in {folder}")
            return
    remedy = "Run `python train.py --download`, or name its folder with --data-dir; else a run tries to download it."
    yield Check("CIFAR-10", MISSING, f"not in {Path('data').absolute()}", remedy)
