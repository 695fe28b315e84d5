"""The longest kernels of a run's step: from a trace, and by the command."""

import json
import shutil
import sys

import pytest
from traces import EAGER, PASS_KERNELS, PASS_STEP_NS, profiled_pass
from typer.testing import CliRunner

from experiments import longest_kernels
from experiments.__main__ import app
from experiments.longest_kernels import longest, step_ms
from model.interrupts import Interrupts
from profiling.account.trace import read
from profiling.output.files import append_jsonl, read_json, write_json

STEP_MS = PASS_STEP_NS / 1e6


def found(tmp_path, timed_ms=STEP_MS, **how) -> dict:
    path, profile = profiled_pass(tmp_path / "trace.json", **how)
    return longest(read(path), profile, timed_ms)


def test_kernels_by_their_time_in_a_step(tmp_path):
    kernels = found(tmp_path)
    assert kernels["lacks"] == []
    assert kernels["sum_ms"] == pytest.approx(sum(ns for *_, ns in PASS_KERNELS) / 1e6)
    assert kernels["kernels_a_step"] == len(PASS_KERNELS)
    us = [kernel["us"] for kernel in kernels["kernels"]]
    assert us == sorted((ns / 1e3 for *_, ns in PASS_KERNELS), reverse=True)
    assert json.loads(json.dumps(kernels)) == kernels
    kernels = found(tmp_path, timed_ms=None)
    assert (kernels["timed_ms"], kernels["lacks"]) == (None, [])


def test_steps_that_cannot_be_believed_are_left_out(tmp_path):
    """Where none can, the times are those of the one eager step, and it says so."""
    kernels = found(tmp_path, lie=lambda number, kernels: kernels[1:] if number in (7, 8) else kernels)
    assert kernels["kernels_a_step"] == len(PASS_KERNELS)
    assert kernels["source"] == "torch.profiler, a pass of its own, 18 of its 20 steps"
    kernels = found(tmp_path, lie=lambda number, kernels: kernels if number == EAGER else kernels[1:])
    assert kernels["kernels_a_step"] == len(PASS_KERNELS)
    assert "kernels are missing" in kernels["lacks"][0]


def log(run, *seconds: float) -> None:
    """An epoch's log rows, of 100 steps each."""
    run.mkdir()
    for epoch, spent in enumerate(seconds, 1):
        append_jsonl(run / "log.jsonl", {"step": 100 * epoch, "epoch_train_s": spent})


def test_step_is_the_median_of_the_epochs_after_the_first(tmp_path):
    log(tmp_path / "four", 9.0, 1.0, 4.0, 2.0)
    log(tmp_path / "one", 1.0)
    assert (step_ms(tmp_path / "four"), step_ms(tmp_path / "one")) == (20.0, 10.0)


def test_command_profiles_a_run_and_keeps_its_kernels(tmp_path, monkeypatch):
    """The words after the run name its data. The pass here leaves a trace that is made."""
    run, made = tmp_path / "run", tmp_path / "made"
    log(run, 1.0)
    (run / "summary.json").touch()
    made.mkdir()
    trace, profile = profiled_pass(made / "trace.json.gz")
    write_json(made / "profile.json", profile)
    code = (
        "import shutil, sys; from pathlib import Path; run, *words = sys.argv[1:]\n"
        f"if words != ['--synthetic']: sys.exit('no such data')\n"
        f"for path in Path({str(made)!r}).iterdir(): shutil.copy(path, Path(run) / 'records')"
    )
    monkeypatch.setattr(longest_kernels, "PROFILE_PASS", [sys.executable, "-S", "-c", code])
    monkeypatch.setattr(Interrupts, "install", lambda self: None)
    done = CliRunner().invoke(app, ["longest-kernels", str(run), "--synthetic"])
    assert (done.exit_code, read_json(run / "kernels.json")) == (0, longest(read(trace), profile, 10.0))
    failed = CliRunner().invoke(app, ["longest-kernels", str(run), "--data-dir", "x"])
    assert (failed.exit_code, "no such data" in failed.output) == (1, True)
    shutil.rmtree(run)
    refused = CliRunner().invoke(app, ["longest-kernels", str(run)])
    assert (refused.exit_code, "is not the folder of a run" in refused.output) == (2, True)
