"""The program as a process: signals, terminals, exit codes."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import tiny_dataset
from train_runs import RUN, assert_same_run, invoke, nowhere, tiny

from model import checkpoint
from profiling import ROOT
from profiling.output.files import read_json


def test_json_prints_exactly_the_summary(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_json(out / "summary.json")
    assert b"test accuracy" in done.stderr


def test_json_prints_the_summary_of_a_failure_too(tmp_path):
    done = tiny(*RUN, tmp_path / "run", "--json", "--target-accuracy", "0.999")
    assert done.returncode == 7, done.stderr
    summary = json.loads(done.stdout)
    assert summary == read_json(tmp_path / "run" / "summary.json")
    assert summary["exit_code"] == 7
    assert done.stderr.endswith(b"below the target of 99.90%\n")


@pytest.mark.parametrize(
    ("fault", "code", "step"),
    [
        ("TERM@data", 143, None),
        ("TERM@preprocessing", 143, None),
        ("TERM@step", 143, 5),
        ("TERM@evaluation", 143, None),
        ("TERM@save", 143, None),
        ("HUP@step", 129, 5),
        ("INT@step", 130, 5),
        ("INT,INT@step", 130, 4),
        ("INT,INT@save", 130, None),
    ],
)
def test_signals_keep_what_was_done_and_the_run_goes_on(finished, tmp_path, not_under_nohup, fault, code, step):
    out = tmp_path / "run"
    done = tiny(*RUN, out, fault=fault)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    if step:
        assert checkpoint.load(out).step == step
    again = [*RUN, out, "--resume", "auto"]
    if fault == "INT@step":
        assert done.stderr == b"\nSIGINT: finishing this step, then saving; once more stops at once, unsaved\n"
        again = ["--resume", out / "checkpoint-00000005.json"]
    elif fault == "TERM@step":
        # What the program says to type: it names the data, since without it would look for other images first.
        again = re.search("stopped; go on with: python train.py (.*)", done.stdout.decode().replace("\n", " "))[
            1
        ].split()
        assert again == ["--out", str(out), "--resume", "auto", "--synthetic"]
    resumed = tiny(*again)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(finished[0], out)


@pytest.mark.parametrize(
    "env",
    [
        {"COLUMNS": "20"},
        {"NO_COLOR": "1", "TERM": "dumb"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ],
    ids=["narrow", "no_colour", "ascii"],
)
def test_odd_terminals(tmp_path, env):
    done = tiny(*RUN, tmp_path / "run", env=env, fresh="LC_ALL" in env)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"test accuracy" in done.stdout.replace(b"\n", b" ")


@pytest.mark.parametrize(("how", "arguments"), [pytest.param("pipe", [], marks=pytest.mark.slow), ("disk", ["--json"])])
def test_output_that_cannot_be_written_does_not_end_the_training(tmp_path, how, arguments):
    """People's and scripts': with --json the former is on stderr, which shares the disk."""
    with nowhere(how) as output:
        streams = {"stdout": output} | ({"stderr": output} if arguments else {})
        done = tiny("--epochs", "1", "--out", tmp_path / "run", *arguments, fresh=True, **streams)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "complete"


def test_evaluate_a_checkpoint(finished):
    out, _ = finished
    done = tiny("--evaluate", out, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["test_accuracy"] == pytest.approx(read_json(out / "summary.json")["test_accuracy"])
    assert "test_accuracy_airplane" in summary
    assert b"truck" in done.stderr
    done = tiny("--evaluate", out, "--json", "--target-accuracy", "1")
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["status"] == "target missed"
    assert done.stderr.endswith(b"is below the target of 100.00%\n")


def test_evaluating_weights_that_are_not_finite_exits_5(finished, tmp_path):
    found = checkpoint.load(finished[0])
    found.tensors["network.linear.weight"][0, 0] = float("nan")
    checkpoint.save(tmp_path, found.step, found.tensors, found.state)
    done = tiny("--evaluate", tmp_path, "--json")
    assert done.returncode == 5
    summary = json.loads(done.stdout)
    assert (summary["status"], summary["exit_code"]) == ("non-finite", 5)
    assert summary["test_loss"] is summary["test_accuracy"] is summary["test_accuracy_cat"] is None
    assert b"the test loss of" in done.stderr


class Payload:
    """Runs when unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("option", ["--resume", "--evaluate"])
def test_a_pickle_is_refused_with_8(tmp_path, option, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    monkeypatch.setattr("model.data.cifar10.load", lambda *a, **k: tiny_dataset())
    result = invoke(option, str(path))
    assert result.exit_code == 8
    assert "model.pt" in result.output
    assert not (tmp_path / "executed").exists()


def test_branching_off_needs_another_folder(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.setattr("model.data.cifar10.load", lambda *a, **k: tiny_dataset())
    result = invoke("--resume", str(out / "checkpoint-00000008.json"))
    assert result.exit_code == 8
    assert "later checkpoint" in result.output
    result = invoke("--resume", str(out / "checkpoint-00000008.json"), "--out", str(tmp_path / "branch"))
    assert result.exit_code == 0, result.output
    assert_same_run(out, tmp_path / "branch")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("module", "said"), [("typer", b""), ("torch", b"loading PyTorch and the images ...\n")])
def test_ctrl_c_during_the_imports_leaves_in_silence(tmp_path, module, said):
    (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    command = [sys.executable, ROOT / "train.py", "--synthetic", "--out", tmp_path / "run"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, said, b"")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_profiled_pass_ends_when_its_parent_is_killed(finished):
    """It would wait for ever."""
    parent = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]
    command = [*parent, sys.executable, ROOT / "tests" / "support" / "runs.py", "--profile-pass", finished[0]]
    env = {**os.environ, "FAULT": "ORPHAN@data", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, timeout=120)  # until the pass has closed its output
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == b""


def test_no_data_and_no_network_trains_on_synthetic_images(tmp_path):
    """The whole program, as a newcomer meets it, with one epoch of a very narrow network."""
    env = {**os.environ, "CIFAR10_MIRRORS": "off", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        ROOT / "train.py",
        "--epochs",
        "1",
        "--set",
        "widths=8,8,8,8",
        "--set",
        "dtype=float32",
        "--json",
    ]
    start_s = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"SYNTHETIC IMAGES" in done.stderr
    assert b"1 epoch of 5,000 images" in b" ".join(done.stderr.split())
    summary = json.loads(done.stdout)
    assert (summary["data_identity"], summary["preset"]) == ("synthetic", "laptop")
    assert 0 < summary["wall_s"] <= time.monotonic() - start_s
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_json(folder / "summary.json") == summary
