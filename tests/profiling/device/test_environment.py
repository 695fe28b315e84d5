import json
import subprocess
import types

import torch

from profiling.device.environment import _gpu, commit, device_name, environment

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_machine_is_described(tmp_path, monkeypatch):
    found = environment(CPU, tmp_path)
    json.dumps(found, allow_nan=False)
    assert found["packages"]["torch"].startswith("2.")
    assert found["cpu"] == device_name(CPU)
    assert found["cores"] >= 1
    assert found["python"].startswith("3.")
    assert found["gpu"] is found["cudnn_benchmark"] is None
    monkeypatch.setattr("profiling.device.environment._gpu", lambda device: {})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = environment(CUDA, tmp_path)
    assert (found["cudnn_benchmark"], found["cudnn_deterministic"]) == (True, False), "two runs may differ in it"


def test_a_gpu_is_described_as_far_as_nvml_can_tell(fake, monkeypatch):
    about = {"name": "NVIDIA H200", "major": 9, "minor": 0, "total_memory": 1 << 37, "multi_processor_count": 132}
    properties = types.SimpleNamespace(**about, uuid="0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = _gpu(CUDA)
    assert (found["capability"], found["multiprocessors"], found["driver"]) == ("9.0", 132, "570.86.15")
    assert (found["sm_clock_mhz"], found["memory_clock_mhz"], found["power_limit_w"]) == (1980, 3201, 700.0)
    fake.fail("nvmlDeviceGetEnforcedPowerLimit", "NotSupported")
    assert (_gpu(CUDA)["power_limit_w"], _gpu(CUDA)["driver"]) == (None, "570.86.15")
    fake.fail("nvmlInit", "DriverNotLoaded")
    assert (_gpu(CUDA)["name"], _gpu(CUDA)["driver"], _gpu(CUDA)["sm_clock_mhz"]) == ("NVIDIA H200", None, None)


def test_a_commit_and_whether_the_tree_differs(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path / "absent") == (None, None)
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    sha = git("rev-parse", "HEAD")
    assert commit(tmp_path) == (sha, False)
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == (sha, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == (None, None), "without git"
