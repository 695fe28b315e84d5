import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import tiny_dataset
from train_runs import assert_same_run, invoke, nowhere, tiny
from typer.testing import CliRunner

import train
from model import checkpoint
from profiling import ROOT
from profiling.output.files import read_json


def test_json_prints_exactly_the_summary(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_json(out / "summary.json")
    assert b"test accuracy" in done.stderr


def test_json_prints_the_summary_of_a_failure_too(tmp_path):
    done = tiny("--json", "--out", str(tmp_path / "run"), "--target-accuracy", "0.999")
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout) == read_json(tmp_path / "run" / "summary.json")
    assert json.loads(done.stdout)["exit_code"] == 7
    assert done.stderr.endswith(b"below the target of 99.90%\n")


@pytest.mark.parametrize(
    "place",
    [
        "step",
        "save",
        *(pytest.param(place, marks=pytest.mark.slow) for place in ("data", "preprocessing", "evaluation")),
    ],
)
def test_sigterm_anywhere_keeps_what_was_done(finished, tmp_path, place):
    done = tiny("--out", str(tmp_path / "run"), fault=f"TERM@{place}")
    assert done.returncode == 143, done.stderr
    assert b"Traceback" not in done.stderr
    again = tiny("--out", str(tmp_path / "run"), "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_the_end_of_the_terminal_finishes_the_step_and_saves(tmp_path, not_under_nohup):
    done = tiny("--out", str(tmp_path / "run"), fault="HUP@step")
    assert done.returncode == 129
    assert checkpoint.load(tmp_path / "run").step == 5


@pytest.mark.slow
def test_sigint_once_finishes_the_step_and_saves(finished, tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="INT@step")
    assert done.returncode == 130
    assert done.stderr.strip() == b"SIGINT: finishing this step, then saving; once more stops at once, unsaved"
    assert checkpoint.load(tmp_path / "run").step == 5
    again = tiny("--resume", str(tmp_path / "run" / "checkpoint-00000005.json"))
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_what_a_stopped_run_says_to_type_goes_on_with_it(finished, tmp_path):
    """The data is named again: without, the program would look for other images first."""
    done = tiny("--out", str(tmp_path / "run"), fault="INT@step")
    said = re.search("stopped; go on with: python train.py (.*)", done.stdout.decode().replace("\n", " "))[1]
    assert said.split() == ["--out", str(tmp_path / "run"), "--resume", "auto", "--synthetic"]
    again = tiny(*said.split())
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_sigint_twice_ends_at_once(finished, tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="INT,INT@step")
    assert done.returncode == 130
    assert b"Traceback" not in done.stderr
    assert checkpoint.load(tmp_path / "run").step == 4
    assert tiny("--out", str(tmp_path / "run"), "--resume", "auto").returncode == 0
    assert_same_run(finished[0], tmp_path / "run")


@pytest.mark.slow
def test_sigint_twice_in_a_save_corrupts_nothing(tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="INT,INT@save")
    assert done.returncode == 130
    again = tiny("--out", str(tmp_path / "run"), "--resume", "auto")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"COLUMNS": "20"}, marks=pytest.mark.slow),
        pytest.param({"NO_COLOR": "1", "TERM": "dumb"}, marks=pytest.mark.slow),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ],
    ids=["narrow", "no_colour", "ascii"],
)
def test_odd_terminals(tmp_path, env):
    done = tiny("--out", str(tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"test accuracy" in done.stdout.replace(b"\n", b" ")


@pytest.mark.parametrize(("how", "arguments"), [pytest.param("pipe", [], marks=pytest.mark.slow), ("disk", ["--json"])])
def test_output_that_cannot_be_written_does_not_end_the_training(tmp_path, how, arguments):
    """People's and scripts': with --json the former is on stderr, which shares the disk."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        ROOT / "tests" / "support" / "runs.py",
        "--preset",
        "laptop",
        "--out",
        tmp_path / "run",
        *arguments,
    ]
    with nowhere(how) as output:
        stderr = output if arguments else subprocess.PIPE
        done = subprocess.run(command, env=env, stdout=output, stderr=stderr, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "complete"


@pytest.mark.slow
def test_resuming_without_a_preset_takes_the_checkpoint_s(finished, tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="TERM@step")
    assert done.returncode == 143
    command = [sys.executable, ROOT / "tests" / "support" / "runs.py", "--out", tmp_path / "run", "--resume", "auto"]
    again = subprocess.run(command, env={**os.environ, "FAULT": "", "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_evaluate_a_checkpoint(finished):
    out, _ = finished
    command = [sys.executable, ROOT / "tests" / "support" / "runs.py", "--evaluate", out, "--json"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["test_accuracy"] == pytest.approx(read_json(out / "summary.json")["test_accuracy"])
    assert "test_accuracy_airplane" in summary
    assert b"truck" in done.stderr
    done = subprocess.run(
        [*command, "--target-accuracy", "1"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["status"] == "target missed"
    assert done.stderr.endswith(b"is below the target of 100.00%\n")


def test_evaluating_weights_that_are_not_finite_exits_5(finished, tmp_path, tiny_here):
    found = checkpoint.load(finished[0])
    found.tensors["network.linear.weight"][0, 0] = float("nan")
    checkpoint.save(tmp_path, found.step, found.tensors, found.state)
    result = CliRunner().invoke(train.app, ["--evaluate", str(tmp_path), "--json"])
    assert result.exit_code == 5
    summary = json.loads(result.stdout)
    assert (summary["status"], summary["exit_code"]) == ("non-finite", 5)
    assert summary["test_loss"] is summary["test_accuracy"] is summary["test_accuracy_cat"] is None
    assert "the test loss of" in result.stderr


@pytest.mark.parametrize("option", ["--resume", "--evaluate"])
def test_a_pickle_is_refused_with_8(tmp_path, option, monkeypatch):
    import pickle

    class Payload:
        """Runs when unpickled."""

        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Payload()))
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
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "train.py", "--synthetic", "--out", tmp_path / "run"]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, said, b"")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_profiled_pass_ends_when_its_parent_is_killed(finished):
    """It would wait for ever."""
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        code,
        sys.executable,
        ROOT / "tests" / "support" / "runs.py",
        "--profile-pass",
        finished[0],
    ]
    done = subprocess.run(
        command, env={**os.environ, "FAULT": "ORPHAN@data", "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120
    )  # until the pass has closed its output
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == b""


def test_no_data_and_no_network_trains_on_synthetic_images(tmp_path):
    """The whole program, as a newcomer meets it, with one epoch of a very narrow network."""
    env = {**os.environ, "CIFAR10_MIRRORS": "off", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", "--epochs", "1", "--set", "widths=8,8,8,8", "--json"]
    start_s = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"SYNTHETIC IMAGES" in done.stderr
    summary = json.loads(done.stdout)
    assert summary["data_identity"] == "synthetic"
    assert summary["preset"] == "laptop"
    assert 0 < summary["wall_s"] <= time.monotonic() - start_s
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_json(folder / "summary.json") == summary
