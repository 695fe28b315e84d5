import importlib.metadata
import json
import sys
import types

import pytest
from typer.testing import CliRunner

from profiling.__main__ import app
from profiling.device import doctor
from profiling.device.doctor import admits, checks

HEALTHY = ("driver", "capability", "specification", "clocks", "persistence", "ECC", "other processes", "GPU memory")


@pytest.fixture
def healthy(fake, monkeypatch, tmp_path):
    """The fake NVML's GPU with nothing that holds its clocks down, in a folder with two files."""
    fake.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0
    monkeypatch.chdir(tmp_path)
    for name in ("Python.h", "file"):
        (tmp_path / name).touch()


def found(name):
    (check,) = (check for check in checks() if check.name == name)
    return check


def test_nothing_is_wrong_with_a_healthy_gpu(healthy):
    """Its one process is this one."""
    by_name = {check.name: check for check in checks()}
    assert {by_name[name][1::2] for name in HEALTHY} == {("ok", None)}
    assert by_name["driver"].found == "570.86.15, 1 GPU"
    assert by_name["clocks"].found == "SM 1980 MHz, memory 3201 MHz, held down by: nothing"


def always(answer):
    return lambda *arguments, **options: answer


def fails(error="NotSupported"):
    """A function that raises `error`, or NVML's error of that name."""

    def fail(*arguments, **options):
        raise getattr(sys.modules["pynvml"], f"NVMLError_{error}")(error) if isinstance(error, str) else error

    return fail


GET, PROBE, WHICH = "pynvml.nvmlDeviceGet", "profiling.device.ncu.probe", "shutil.which"
FULL = types.SimpleNamespace(free=1 << 30, total=80 << 30)
NO_GPU = {"torch.cuda.is_available": always(False)}
HERE = {"CC": "", "sysconfig.get_paths": always({"include": "."})}
NOBODY = {
    **dict.fromkeys(("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), ""),
    "getpass.getuser": fails(KeyError("getpwuid(): uid not found: 4711")),
    "pathlib.Path.home": fails(RuntimeError("Could not determine home directory.")),
}
REFUSED = "the driver lets only administrators read counters (ERR_NVGPUCTRPERM): let an administrator load it"
CASES = [
    ("driver", "missing", "no GPU", {f"{GET}Count": always(0)}),
    ("driver", "missing", "no NVIDIA driver", {"pynvml.nvmlInit": fails("DriverNotLoaded")}),
    ("driver", "missing", "different versions", {"pynvml.nvmlInit": fails("LibRmVersionMismatch")}),
    ("GPU-0", "warning", "(UnavailableError: NVML: GpuIsLost)", {f"{GET}HandleByUUID": fails("GpuIsLost")}),
    ("GPU", "missing", "none", {**NO_GPU, f"{GET}Count": always(0)}),
    ("GPU", "missing", "built without CUDA", {**NO_GPU, "torch.version.cuda": None}),
    ("GPU", "missing", "PyTorch finds none, for CUDA 12.8", {**NO_GPU, "torch.version.cuda": "12.8"}),
    ("GPU", "ok", "finds 2", {"torch.cuda.is_available": always(True), "torch.cuda.device_count": always(2)}),
    ("capability", "warning", "7.5", {f"{GET}CudaComputeCapability": always((7, 5))}),
    ("capability", "warning", "unknown", {f"{GET}CudaComputeCapability": fails()}),
    ("specification", "warning", "RTX 9999", {f"{GET}Name": always("RTX 9999")}),
    ("clocks", "warning", "hardware thermal slowdown", {f"{GET}CurrentClocksEventReasons": always(0x40)}),
    ("clocks", "warning", "unknown", {f"{GET}ClockInfo": fails()}),
    ("persistence", "warning", "off", {f"{GET}PersistenceMode": always(0)}),
    (
        "other processes",
        "warning",
        "2 on",
        {f"{GET}ComputeRunningProcesses": always([types.SimpleNamespace(pid=1)] * 2)},
    ),
    ("other processes", "warning", "unknown", {f"{GET}ComputeRunningProcesses": fails()}),
    ("GPU memory", "warning", "1.0 of 80.0 GiB free", {f"{GET}MemoryInfo": always(FULL)}),
    ("GPU memory", "warning", "unknown", {f"{GET}MemoryInfo": fails()}),
    ("Nsight Compute", "warning", "only administrators", {PROBE: always(REFUSED)}),
    ("Nsight Compute", "ok", "nothing forbids it", {PROBE: always(None)}),
    ("numpy", "warning", "0.1, expected >=1.26", {"importlib.metadata.version": always("0.1")}),
    ("numpy", "missing", "not ins", {"importlib.metadata.version": fails(importlib.metadata.PackageNotFoundError())}),
    ("C compiler", "ok", "/bin/clang, and Python.h", {**HERE, WHICH: {"clang": "/bin/clang"}.get}),
    ("C compiler", "missing", "no gcc or clang", {**HERE, WHICH: always(None)}),
    ("C compiler", "missing", "no no/Python.h", {**HERE, "sysconfig.get_paths": always({"include": "no"})}),
    ("C compiler", "ok", "/opt/cc, and ", {**HERE, "CC": "/opt/cc", WHICH: always(None)}),
    *(
        ("CPU threads", status, f"{n} on 8 cores", {"torch.get_num_threads": always(n)})
        for n, status in ((1, "warning"), (8, "ok"), (16, "warning"))
    ),
    ("disk", "warning", "1.0 GiB free", {"shutil.disk_usage": always(FULL)}),
    (
        "disk",
        "warning",
        "could not be checked (ZeroDivisionError: 0)",
        {"shutil.disk_usage": fails(ZeroDivisionError(0))},
    ),
    ("Triton's cache", "ok", "new/cache", {"TRITON_CACHE_DIR": "new/cache"}),
    ("Triton's cache", "warning", "cannot be written", {"TRITON_CACHE_DIR": "file"}),
    ("Triton's cache", "warning", "home directory", NOBODY),
    ("Inductor's cache", "warning", "uid not found", NOBODY),
]


@pytest.mark.parametrize(("name", "status", "words", "changes"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES])
def test_a_finding_and_its_remedy(healthy, monkeypatch, tmp_path, name, status, words, changes):
    """`changes` are to functions and attributes by their dotted names, and to environment variables."""
    monkeypatch.setattr("os.sched_getaffinity", always(set(range(8))), raising=False)
    for target, value in changes.items():
        if "." in target:
            monkeypatch.setattr(target, value)
        else:
            monkeypatch.setenv(target, value)
    check = found(name)
    assert check.status == status
    assert words in check.found
    if status != "ok" and "could not be checked" not in check.found:
        assert check.remedy.endswith(".")
        assert check.remedy.count(". ") == 0, "one sentence"
    if "pynvml.nvmlInit" in changes:
        assert not {check.name for check in checks()} & set(HEALTHY[1:]), "one line about the GPUs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Python.h", "file"], "a look changes nothing"


def test_every_dependency_of_the_project_is_looked_at():
    installed = {check.name: check for check in checks()}
    assert {"Python", "torch", "numpy", "nvidia-ml-py", "jinja2"} <= set(installed)
    assert "2.11" in installed["torch"].found


@pytest.mark.parametrize(
    ("version", "bounds", "admitted"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9", ">=2.11,<2.14", False),
        ("2.11", ">=2.11.0", True),
        ("3.11.7", ">=3.11,<3.15", True),
        ("3.15.0rc1", ">=3.11,<3.15", False),
        ("13.615.71", ">=12.535", True),
    ],
)
def test_versions_are_compared_as_numbers(version, bounds, admitted):
    assert admits(version, bounds) is admitted


def test_the_data_are_found_by_name_and_size(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert found("CIFAR-10").status == "missing"
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in doctor.DATA_FILES:
        with open(folder / name, "wb") as file:
            file.truncate(doctor.DATA_FILE_BYTES)
    assert found("CIFAR-10").status == "ok"
    (folder / "test_batch.bin").write_bytes(b"short")
    assert found("CIFAR-10").status == "missing"


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_the_command_says_all_and_exits_with_0(monkeypatch, columns):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("COLUMNS", columns)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    assert done.stderr.startswith("missing driver")
    assert "nvidia-ml-py is not installed" in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    rows = json.loads(done.stdout)
    assert {tuple(row) for row in rows} == {("name", "status", "found", "remedy")}
    assert {row["status"] for row in rows} <= {"ok", "warning", "missing"}
    assert CliRunner().invoke(app, ["doctor"]).stdout == done.stderr, "for people on stdout"
    assert CliRunner().invoke(app, ["doctor", "--jsno"]).exit_code == 2
