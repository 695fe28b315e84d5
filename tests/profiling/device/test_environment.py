import json
import subprocess

import torch

from profiling.device.environment import commit, device_name, environment

CPU = torch.device("cpu")


def test_it_names_what_a_reader_needs(tmp_path):
    found = environment(CPU, tmp_path)
    json.dumps(found, allow_nan=False)
    assert found["packages"]["torch"].startswith("2.")
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["gpu"] is None
    assert found["python"].startswith("3.")
    assert device_name(CPU)


def test_how_the_library_chooses_its_convolutions(tmp_path, monkeypatch):
    """Two runs are not the same where one searched and the other did not."""
    monkeypatch.setattr("profiling.device.environment._gpu", lambda device: {})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = environment(torch.device("cuda"), tmp_path)
    assert (found["cudnn_benchmark"], found["cudnn_deterministic"]) == (True, False)
    assert environment(CPU, tmp_path)["cudnn_benchmark"] is None


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert commit(tmp_path / "absent") == (None, None)


def test_a_commit_and_whether_the_tree_differs(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    sha = git("rev-parse", "HEAD").stdout.strip()
    assert commit(tmp_path) == (sha, False)
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == (sha, True)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == (None, None)
