import json
import subprocess
import sys

import pytest
from traces import EAGER, PASS_KERNELS, PASS_STEP_NS, profiled_pass

from experiments.longest_kernels import check, longest, step_ms
from experiments.study.folder import Request
from model.errors import UsageError
from profiling import ROOT
from profiling.account.trace import read
from profiling.output.files import append_jsonl, read_json

STEP_MS = PASS_STEP_NS / 1e6


def found(tmp_path, timed_ms=STEP_MS, **how) -> dict:
    path, profile = profiled_pass(tmp_path / "trace.json", **how)
    return longest(read(path), profile, timed_ms)


def test_of_each_kernel_the_time_in_a_step(tmp_path):
    kernels = found(tmp_path)
    busy_ms = sum(ns for *_, ns in PASS_KERNELS) / 1e6
    assert kernels["lacks"] == []
    assert kernels["sum_ms"] == pytest.approx(busy_ms)
    assert kernels["kernels_a_step"] == len(PASS_KERNELS)
    us = {kernel["name"]: kernel["us"] for kernel in kernels["kernels"]}
    assert list(us.values()) == sorted((ns / 1e3 for *_, ns in PASS_KERNELS), reverse=True)
    assert json.loads(json.dumps(kernels)) == kernels


def test_steps_in_which_the_profiler_lied_are_left_out(tmp_path):
    kernels = found(tmp_path, lie=lambda number, kernels: kernels[1:] if number in (7, 8) else kernels)
    assert kernels["kernels_a_step"] == len(PASS_KERNELS)
    assert kernels["source"] == "torch.profiler, a pass of its own, 18 of its 20 steps"


def test_a_pass_that_cannot_be_believed_says_why(tmp_path):
    """Then the times are those of the one eager step."""
    kernels = found(tmp_path, lie=lambda number, kernels: kernels if number == EAGER else kernels[1:])
    assert kernels["kernels_a_step"] == len(PASS_KERNELS)
    assert "kernels are missing" in kernels["lacks"][0]


def test_without_a_timed_step_there_is_nothing_to_hold_the_kernels_against(tmp_path):
    kernels = found(tmp_path, timed_ms=None)
    assert (kernels["timed_ms"], kernels["lacks"]) == (None, [])


def test_a_step_is_the_median_of_the_epochs_after_the_first(tmp_path):
    for epoch, seconds in enumerate((9.0, 1.0, 4.0, 2.0), 1):
        append_jsonl(tmp_path / "log.jsonl", {"step": 100 * epoch, "epoch_train_s": seconds})
    assert step_ms(tmp_path) == 20.0
    (tmp_path / "one").mkdir()
    append_jsonl(tmp_path / "one" / "log.jsonl", {"step": 10, "epoch_train_s": 1.0})
    assert step_ms(tmp_path / "one") == 100.0


def test_a_run_s_kernels_are_profiled_and_kept(tmp_path):
    """The words after the run name its data; the pass is train.py's own, here on a tiny data set."""
    run = tmp_path / "run"
    subprocess.run([sys.executable, "tests/support/runs.py", "--epochs", "1", "--out", run], cwd=ROOT, check=True)
    driver = (
        "import sys; from experiments import longest_kernels\n"
        "longest_kernels.PROFILE_PASS = [sys.executable, 'tests/support/runs.py', '--profile-pass']\n"
        f"from experiments.__main__ import app; app(['longest-kernels', {str(run)!r}, '--synthetic'])"
    )
    done = subprocess.run([sys.executable, "-c", driver], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = read_json(run / "kernels.json")
    assert any("convolution" in kernel["name"] for kernel in kernels["kernels"])
    assert (run / "records" / "trace.json.gz").exists()
    failing = driver.replace("'tests/support/runs.py'", "'no-such-file.py'")
    assert subprocess.run([sys.executable, "-c", failing], cwd=ROOT, capture_output=True).returncode == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not the folder of a run"):
        check(Request(), tmp_path / "nowhere", ("--synthetic",))
