import json
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from profiling.__main__ import app
from profiling.device import doctor, ncu
from profiling.device.doctor import admits, checks


@pytest.fixture
def healthy(fake):
    """The fake NVML's GPU with nothing that holds its clocks down."""
    fake.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0
    return fake


def found(name):
    (check,) = (check for check in checks() if check.name == name)
    return check


HEALTHY = ("driver", "capability", "specification", "clocks", "persistence", "ECC", "other processes", "GPU memory")


def test_nothing_is_wrong_with_a_healthy_gpu(healthy):
    """Its one process is this one."""
    by_name = {check.name: check for check in checks()}
    assert {name: by_name[name].status for name in HEALTHY} == dict.fromkeys(HEALTHY, "ok")
    assert all(by_name[name].remedy is None for name in HEALTHY)
    assert by_name["driver"].found == "570.86.15, 1 GPU"
    assert by_name["clocks"].found == "SM 1980 MHz, memory 3201 MHz, held down by: nothing"


FULL = types.SimpleNamespace(free=1 << 30, total=80 << 30, used=79 << 30)
FAULTS = [
    ("nvmlDeviceGetCudaComputeCapability", (7, 5), "capability", "7.5"),
    ("nvmlDeviceGetCudaComputeCapability", None, "capability", "unknown"),
    ("nvmlDeviceGetName", "RTX 9999", "specification", "RTX 9999"),
    ("nvmlDeviceGetCurrentClocksEventReasons", 0x40, "clocks", "hardware thermal slowdown"),
    ("nvmlDeviceGetClockInfo", None, "clocks", "unknown"),
    ("nvmlDeviceGetPersistenceMode", 0, "persistence", "off"),
    ("nvmlDeviceGetComputeRunningProcesses", [types.SimpleNamespace(pid=1)], "other processes", "1 on this GPU"),
    ("nvmlDeviceGetComputeRunningProcesses", None, "other processes", "unknown"),
    ("nvmlDeviceGetMemoryInfo", FULL, "GPU memory", "1.0 of 80.0 GiB free"),
    ("nvmlDeviceGetMemoryInfo", None, "GPU memory", "unknown"),
    ("nvmlDeviceGetCount", 0, "driver", "no GPU"),
]


@pytest.mark.parametrize(("function", "answer", "name", "words"), FAULTS)
def test_a_fault_is_named_with_a_remedy(healthy, function, answer, name, words):
    """An answer of None is a function that is not supported."""
    if answer is None:
        healthy.fail(function, "NotSupported")
    else:
        setattr(healthy, function, lambda *arguments: answer)
    check = found(name)
    assert check.status == ("missing" if name == "driver" else "warning")
    assert words in check.found
    assert check.remedy.endswith(".")
    assert check.remedy.count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    ("error", "words"), [("DriverNotLoaded", "no NVIDIA driver"), ("LibRmVersionMismatch", "different versions")]
)
def test_nvml_that_does_not_start_is_the_one_line_about_gpus(fake, error, words):
    fake.fail("nvmlInit", error)
    by_name = {check.name: check for check in checks()}
    assert by_name["driver"].status == "missing"
    assert words in by_name["driver"].found
    assert "clocks" not in by_name


def test_a_gpu_that_cannot_be_asked_is_a_line(fake):
    fake.fail("nvmlDeviceGetHandleByUUID", "GpuIsLost")
    assert found("GPU-0").found == "could not be checked (UnavailableError: NVML: GpuIsLost)"


def test_a_gpu_that_pytorch_was_not_built_for(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert (found("GPU").status, "built without CUDA" in found("GPU").found) == ("missing", True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "CUDA_VISIBLE_DEVICES" in found("GPU").remedy


def test_counters_that_only_administrators_may_read(monkeypatch):
    reason = "the driver lets only administrators read counters (ERR_NVGPUCTRPERM): let an administrator load it"
    monkeypatch.setattr(ncu, "probe", lambda: reason)
    assert found("Nsight Compute")[1::2] == ("warning", "Let an administrator load it.")
    monkeypatch.setattr(ncu, "probe", lambda: None)
    assert found("Nsight Compute").status == "ok"


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


def test_every_dependency_is_held_against_the_project_s_bounds(monkeypatch):
    installed = {check.name: check for check in checks()}
    assert {"Python", "torch", "numpy", "nvidia-ml-py", "jinja2"} <= set(installed)
    assert "2.11" in installed["torch"].found
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.1")
    assert found("numpy")[1:3] == ("warning", "0.1, expected >=1.26")

    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    assert found("numpy").status == "missing"


def test_the_compiler_of_triton_s_launchers(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: {"clang": "/usr/bin/clang"}.get(name))
    assert found("C compiler")[1:3] == ("missing", f"no {tmp_path}/Python.h")
    (tmp_path / "Python.h").touch()
    assert found("C compiler").status == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert found("C compiler").found == "no gcc or clang"
    monkeypatch.setenv("CC", "/opt/cc")
    assert found("C compiler").found.startswith("/opt/cc, and ")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert found("Triton's cache").status == "ok"
    assert not (tmp_path / "new").exists(), "a look changes nothing"
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert found("Triton's cache").status == "warning"
    assert "TRITON_CACHE_DIR" in found("Triton's cache").remedy


def test_a_user_without_a_name_or_a_home(monkeypatch):
    def fail(error):
        raise error

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(doctor.getpass, "getuser", lambda: fail(KeyError("getpwuid(): uid not found: 4711")))
    monkeypatch.setattr(Path, "home", lambda: fail(RuntimeError("Could not determine home directory.")))
    assert {found(name).status for name in ("Inductor's cache", "Triton's cache")} == {"warning"}


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


def test_a_disk_that_is_nearly_full_and_a_check_that_fails(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1 << 30))
    assert found("disk")[1:3] == ("warning", "1.0 GiB free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: 1 / 0)
    assert (found("disk").status, "ZeroDivisionError" in found("disk").found) == ("warning", True)


@pytest.mark.parametrize(("threads", "status"), [(1, "warning"), (8, "ok"), (16, "warning")])
def test_threads_that_do_not_suit_the_cores(monkeypatch, threads, status):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert found("CPU threads")[1:3] == (status, f"{threads} on 8 cores")


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_the_command_says_all_and_exits_with_0(monkeypatch, columns):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("COLUMNS", columns)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert done.stdout.startswith("missing driver")
    assert "nvidia-ml-py is not installed" in " ".join(done.stdout.split())
    assert "Traceback" not in done.output


def test_json_for_a_script(fake):
    done = CliRunner().invoke(app, ["doctor", "--json"])
    rows = json.loads(done.stdout)
    assert {tuple(row) for row in rows} == {("name", "status", "found", "remedy")}
    assert {row["status"] for row in rows} <= {"ok", "warning", "missing"}
    assert "driver" in done.stderr
    assert CliRunner().invoke(app, ["doctor", "--jsno"]).exit_code == 2
