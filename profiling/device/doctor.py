"""`python -m profiling doctor`: what this machine has for training and profiling, what it lacks, and the remedy.

Nothing here raises and nothing is changed: whatever cannot be asked is a line that says so.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiling import ROOT
from profiling.device import ncu, nvml

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


@dataclass(frozen=True)
class Check:
    """One line: `status` is ok, warning or missing; `remedy` is one sentence, None where nothing is to be done."""

    name: str
    status: str
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML sees it, before this process touches it; None is not known."""

    uuid: str
    name: str | None
    capability: tuple[int, int] | None
    persistent: bool | None
    ecc: bool | None
    processes: int | None
    memory: tuple[int, int] | None  # (free, total) bytes


def run(terminal: "Terminal", as_json: bool = False) -> None:
    """Print every check; a line for each, and its remedy below."""
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
        terminal.put(json.dumps([asdict(check) for check in found]))


def checks() -> Iterator[Check]:
    """Every check, in the order of the lines."""
    gpus, driver = _driver()
    yield driver
    yield from _guarded("GPU", lambda: _torch_gpu(gpus))
    for gpu in gpus:
        yield from _guarded(gpu.name or gpu.uuid, lambda gpu=gpu: _of_gpu(gpu))
    yield from _guarded("Nsight Compute", _ncu)
    yield from _guarded("versions", _versions)
    yield from _guarded("C compiler", _compiler)
    yield from _guarded("CPU threads", _threads)
    yield from _guarded("disk", _disk)
    yield from _guarded("compiler caches", _caches)
    yield from _guarded("CIFAR-10", _data)


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The lines of `check`; a check that fails is itself a finding."""
    try:
        yield from check()
    except Exception as error:
        yield Check(name, WARNING, f"could not be checked ({type(error).__name__}: {error})".replace("\n", " "))


def _driver() -> tuple[list[Gpu], Check]:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = [_gpu(pynvml, handle) for handle in handles]
    except Exception:  # no library, no driver, or another one than the library's: each its own exception class
        try:
            nvml.Gpu("")
            reason = "NVML cannot list the GPUs"
        except nvml.UnavailableError as error:
            reason = str(error)
        remedy = "On a machine with an NVIDIA GPU, install or repair its driver; without one, training uses the CPU."
        return [], Check("driver", MISSING, reason, remedy)
    if not gpus:
        return [], Check("driver", MISSING, f"{version}, and no GPU", "Give this container or machine a GPU.")
    return gpus, Check("driver", OK, f"{version}, {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}")


def _gpu(nvml_library: Any, handle: Any) -> Gpu:
    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml_library, function)(handle, *arguments)
        except (nvml_library.NVMLError, AttributeError):
            return None

    persistent, ecc, memory = (ask(f"nvmlDeviceGet{what}") for what in ("PersistenceMode", "EccMode", "MemoryInfo"))
    processes = ask("nvmlDeviceGetComputeRunningProcesses")
    return Gpu(
        nvml_library.nvmlDeviceGetUUID(handle),
        ask("nvmlDeviceGetName"),
        ask("nvmlDeviceGetCudaComputeCapability"),
        None if persistent is None else bool(persistent),
        None if ecc is None else bool(ecc[0]),
        None if processes is None else sum(process.pid != os.getpid() for process in processes),
        None if memory is None else (memory.free, memory.total),
    )


def _torch_gpu(gpus: list[Gpu]) -> Iterator[Check]:
    """Whether PyTorch can use what the driver has."""
    import torch

    if torch.cuda.is_available():
        yield Check("GPU", OK, f"PyTorch finds {torch.cuda.device_count()}, for CUDA {torch.version.cuda}")
    elif gpus and torch.version.cuda is None:
        remedy = "Install the build of torch for CUDA, as https://pytorch.org/get-started says."
        yield Check("GPU", MISSING, f"torch {torch.__version__} is built without CUDA", remedy)
    elif gpus:
        remedy = "See that CUDA_VISIBLE_DEVICES names a GPU and that the driver is new enough for torch's CUDA."
        yield Check("GPU", MISSING, f"PyTorch finds none, for CUDA {torch.version.cuda}", remedy)
    else:
        yield Check("GPU", MISSING, "none", "Training works on the CPU; the kernels and their figures need a GPU.")


def _of_gpu(gpu: Gpu) -> Iterator[Check]:
    from kernels.jit import MIN_CAPABILITY
    from profiling.device.specifications import specification

    needs = ".".join(map(str, MIN_CAPABILITY))
    if gpu.capability is None:
        yield Check("capability", WARNING, f"{gpu.name}: unknown", f"See that it is {needs} or later.")
    else:
        enough = gpu.capability >= MIN_CAPABILITY
        found = f"{gpu.name}: {'.'.join(map(str, gpu.capability))}"
        remedy = f"The kernels need {needs}: a preset falls back to the library's operations here."
        yield Check("capability", OK if enough else WARNING, found, None if enough else remedy)
    if gpu.name is None or specification(gpu.name) is None:
        remedy = "Utilisation is given against the measured ceiling alone; see `python -m profiling device --list`."
        yield Check("specification", WARNING, f"{gpu.name} is not in the table", remedy)
    else:
        yield Check("specification", OK, specification(gpu.name).name)
    yield _clocks(gpu)
    if gpu.persistent is not None:
        remedy = "Let an administrator run `nvidia-smi -pm 1`, or each run first waits for the driver to load."
        yield Check(
            "persistence",
            OK if gpu.persistent else WARNING,
            "on" if gpu.persistent else "off",
            None if gpu.persistent else remedy,
        )
    if gpu.ecc is not None:
        yield Check("ECC", OK, "on" if gpu.ecc else "off")
    if gpu.processes is None:
        yield Check("other processes", WARNING, "unknown", "See with `nvidia-smi` that nobody else uses the GPU.")
    elif gpu.processes:
        found = f"{gpu.processes} on this GPU"
        yield Check("other processes", WARNING, found, "Wait for them to end: times measured beside them mean nothing.")
    else:
        yield Check("other processes", OK, "none")
    yield _memory(gpu)


def _clocks(gpu: Gpu) -> Check:
    sample = nvml.sampler(gpu.uuid)()
    if sample is None or sample.sm_clock_mhz is None:
        return Check("clocks", WARNING, "unknown", "Timings cannot be checked for throttling here.")
    memory = "unknown" if sample.memory_clock_mhz is None else f"{sample.memory_clock_mhz} MHz"
    reasons = "unknown reasons" if sample.reasons is None else ", ".join(sample.reasons) or "nothing"
    found = f"SM {sample.sm_clock_mhz} MHz, memory {memory}, held down by: {reasons}"
    remedy = "Cool the GPU or raise its power limit before timing anything." if sample.throttled else None
    return Check("clocks", WARNING if sample.throttled else OK, found, remedy)


def _memory(gpu: Gpu) -> Check:
    if gpu.memory is None:
        return Check("GPU memory", WARNING, "unknown", "See with `nvidia-smi` how much is free.")
    free, total = gpu.memory
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    remedy = f"End what uses it, or train with a smaller batch: {ENOUGH_GPU_BYTES >> 30} GiB are enough at batch 512."
    enough = free >= ENOUGH_GPU_BYTES
    return Check("GPU memory", OK if enough else WARNING, found, None if enough else remedy)


def _ncu() -> Iterator[Check]:
    reason = ncu.probe()
    if reason is None:
        yield Check("Nsight Compute", OK, f"{ncu.find()}, and nothing forbids it to read counters")
    else:
        name, _, remedy = reason.partition(": ")
        remedy = remedy or "Without it the report has no measured DRAM traffic, and nothing else is missing."
        yield Check("Nsight Compute", WARNING, name, remedy[0].upper() + remedy[1:].rstrip(".") + ".")


def _versions() -> Iterator[Check]:
    """Python and the packages against the bounds in pyproject.toml, the one place that has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield _version("Python", platform.python_version(), project["requires-python"])
    for requirement in project["dependencies"]:
        wanted, _, marker = requirement.partition(";")
        name, bounds = re.fullmatch(r"\s*([\w.-]+)\s*(.*?)\s*", wanted).groups()
        if "Linux" in marker and platform.system() != "Linux":
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, MISSING, f"not installed, needs {bounds}", "Run `pip install -e .` in the checkout.")
        else:
            yield _version(name, version, bounds)


def _version(name: str, version: str, bounds: str) -> Check:
    if admits(version, bounds):
        return Check(name, OK, f"{version} ({bounds})")
    what = "Use another Python" if name == "Python" else "Run `pip install -e .` in the checkout"
    return Check(name, WARNING, f"{version}, expected {bounds}", f"{what}: this version has not been tried.")


def admits(version: str, bounds: str) -> bool:
    """Whether `version` is within `bounds`, as in ">=2.11,<2.14"; local parts and pre-releases are not looked at."""
    compare = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b}
    have = _release(version)
    parsed = (re.fullmatch(r"(>=|<)([\d.]+)", bound.strip()) for bound in bounds.split(","))
    return all(compare[match[1]](have, _release(match[2])) for match in parsed)


def _release(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu": without trailing zeros, so that 2.11 and 2.11.0 are the same."""
    numbers = [int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split(".")]
    while numbers[1:] and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _compiler() -> Iterator[Check]:
    """Triton compiles the launcher of every kernel with it, and looks for it so (triton/runtime/build.py)."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    absent = [name for name, there in (("gcc or clang", compiler), (str(header), header.exists())) if not there]
    if absent:
        remedy = "Install gcc and Python's headers, or name a compiler in CC: without them Triton launches no kernel."
        yield Check("C compiler", MISSING, f"no {' and no '.join(absent)}", remedy)
    else:
        yield Check("C compiler", OK, f"{compiler}, and {header}")


def _threads() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = f"{threads} on {cores} core{'s' if cores > 1 else ''}"
    if threads < cores / 2 or threads > cores:
        yield Check("CPU threads", WARNING, found, "Unset OMP_NUM_THREADS, or set it to the number of physical cores.")
    else:
        yield Check("CPU threads", OK, found)


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = f"Make room in {Path.cwd()} or name another place with --out: a profiled run may take 2 GiB."
    enough = free >= ENOUGH_DISK_BYTES
    yield Check("disk", OK if enough else WARNING, f"{free / 2**30:.1f} GiB free", None if enough else remedy)


def _caches() -> Iterator[Check]:
    for name, variable, folder in (
        ("Triton's cache", "TRITON_CACHE_DIR", lambda: Path.home() / ".triton" / "cache"),
        (
            "Inductor's cache",
            "TORCHINDUCTOR_CACHE_DIR",
            lambda: Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}",
        ),
    ):
        remedy = f"Set {variable} to a folder that can be written to, or every process compiles anew or fails."
        try:
            place = Path(os.environ.get(variable) or folder())
            _try_to_write(place)
        except (OSError, RuntimeError, KeyError) as error:  # RuntimeError and KeyError: a user without home or name
            yield Check(name, WARNING, f"cannot be written: {error}", remedy)
        else:
            yield Check(name, OK, str(place))


def _try_to_write(folder: Path) -> None:
    """Raise OSError unless a file can be made in `folder`, or in the nearest of its parents that exists."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _data() -> Iterator[Check]:
    """The folder that a run looks into by itself; whether the contents are right a run finds out."""
    for folder in (Path("data", "cifar-10-batches-bin"), Path("data")):
        sizes = [path.stat().st_size if path.is_file() else None for path in (folder / name for name in DATA_FILES)]
        if sizes == [DATA_FILE_BYTES] * len(DATA_FILES):
            yield Check("CIFAR-10", OK, f"six files in {folder}")
            return
    remedy = "Run `python train.py --download`, or name its folder with --data-dir; else a run tries to download it."
    yield Check("CIFAR-10", MISSING, f"not in {Path('data').absolute()}", remedy)
