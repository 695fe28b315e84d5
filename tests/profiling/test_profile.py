"""`train.py --profile` from the run to the report, on a CPU and very small."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

import profile_pass
import train
from model.errors import UsageError
from profiling import ROOT
from profiling.device.ceilings import measure
from profiling.output.errors import ReportError
from profiling.output.files import read_json, write_json
from profiling.output.terminal import Terminal
from profiling.report import build, command
from profiling.run import collect

RUNS = str(ROOT / "tests" / "support" / "runs.py")
DAMAGES = ("gone", "empty", "half", "garbage", "another_version")
RECORDS = ("phases.json", "steps.json", "work.json", "profile.json", "ceilings.json", "trace.json.gz")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> Path:
    """A profiled run of 12 steps, and its report."""
    out, session = tmp_path_factory.mktemp("profiled") / "run", runs.tiny_session()
    train.run(session, runs.tiny_config(), out, collect=True)
    profile_pass.profile_pass(session, out, counters=False)
    ceilings = measure(session.device, torch.float32, seconds=0.002, batch=1)
    write_json(out / "records" / "ceilings.json", ceilings.to_json())
    build.write(out)
    return out


@pytest.fixture
def copy(profiled, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(profiled, tmp_path / "run"))


def but_for_noise(lacks: list[str]) -> list[str]:
    """Steps of some milliseconds take longer in one pass than in another, which a report says too."""
    return [line for line in lacks if "something else used this machine" not in line]


def test_the_report_is_whole(profiled):
    made = read_json(profiled / "report.json")
    assert but_for_noise(made["lacks"]) == []
    assert {"report.html", "report.md", "report.json"} <= {p.name for p in profiled.iterdir()}
    keys = [t["key"] for t in made["terms"]]
    assert keys[0] == "ideal"
    assert {"conv_inefficiency", "batch norm", "optimiser and loss", "augmentation and data", "idle"} <= set(keys)
    assert keys[-1] == "residual"


def test_terms_sum_to_the_phase_and_phases_to_the_process(profiled):
    made, phases = read_json(profiled / "report.json"), read_json(profiled / "records" / "phases.json")
    training = sum(p["end_ns"] - p["start_ns"] for p in phases["phases"] if p["name"] == "training")
    assert sum(t["ns"] for t in made["terms"]) == training > 0
    assert sum(p["ns"] for p in made["phases"]) == phases["end_ns"] - phases["start_ns"]
    assert read_json(profiled / "summary.json")["wall_s"] == (phases["end_ns"] - phases["start_ns"]) / 1e9


def test_every_step_of_the_timed_run_is_in_its_phase(profiled):
    phases, steps = (read_json(profiled / "records" / f"{name}.json") for name in ("phases", "steps"))
    training = [p for p in phases["phases"] if p["name"] == "training"]
    assert [len(epoch) for epoch in steps["epochs"]] == [5, 5, 5]  # four steps have five ends
    for phase, epoch in zip(training, steps["epochs"], strict=True):
        assert phase["start_ns"] <= epoch[0] < epoch[-1] <= phase["end_ns"]


def test_what_only_a_gpu_has_is_left_out_or_unavailable_with_its_reason(profiled):
    made = read_json(profiled / "report.json")
    assert not {"mfu", "energy_j", "throttled_share", "sm_clock_hz"} & set(made["figures"])
    assert made["timeline"]["reason"] == "no NVIDIA driver"
    assert made["timeline"]["samples"] == {}


def test_work_is_found_for_the_convolutions_of_the_trace(profiled):
    layers = {row["name"]: row for row in read_json(profiled / "report.json")["layers"]}
    work = read_json(profiled / "records" / "work.json")
    assert set(layers) >= {f"{row['layer']} fprop" for row in work["ops"] if row["family"] == "fprop"}
    assert all(row["flops"] and row["flops_per_s"] and row["roof_fraction"] > 0 for row in layers.values())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=[] if (i - j) % 5 == 0 else pytest.mark.slow)
        for i, name in enumerate(RECORDS)
        for j, damage in enumerate(DAMAGES)
    ],
)
def test_a_damaged_record_is_named_and_the_rest_stands(copy, name, damage):
    path = copy / "records" / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "another_version":
        path.write_text('{"version": 99}')
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "garbage": b"\xff{]" * 9}[damage])
    made = build.build(copy)
    assert made["status"] == "incomplete"
    assert made["lacks"]
    training_ns = sum(t["ns"] for t in made["terms"])
    assert training_ns == pytest.approx(1e9 * read_json(copy / "summary.json")["train_s"], rel=0.05)
    if name in ("steps.json", "trace.json.gz", "profile.json"):
        assert "idle" not in {t["key"] for t in made["terms"]}


@pytest.mark.parametrize("name", ["summary.json", "config.json", "environment.json", "log.jsonl"])
def test_a_run_without_one_of_its_files(copy, name):
    (copy / name).unlink()
    if name == "summary.json":
        with pytest.raises(ReportError, match="not the folder of a run"):
            build.build(copy)
    else:
        assert build.build(copy)["status"] == "incomplete"


def test_a_report_that_cannot_be_written_leaves_the_old_one(copy, monkeypatch):
    before = {name: (copy / name).read_bytes() for name in ("report.html", "report.md", "report.json")}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    (copy / "records" / "steps.json").unlink()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        build.write(copy)
    assert {name: (copy / name).read_bytes() for name in before} == before
    assert not list(copy.glob(".tmp*"))


def test_hostile_names_do_no_harm(copy):
    config = read_json(copy / "summary.json") | {"preset": "<script>alert(1)</script>", "device": "x\0" * 2000}
    (copy / "summary.json").write_text(json.dumps(config))
    build.write(copy)
    assert "<script>alert(1)" not in (copy / "report.html").read_text()


@pytest.mark.slow
def test_the_pass_runs_in_a_process_of_its_own(copy, quick):
    for name in ("trace.json.gz", "profile.json", "work.json", "ceilings.json"):
        (copy / "records" / name).unlink()
    train.profile(runs.tiny_session(), runs.tiny_config(), copy, ["--synthetic"], counters=False)
    assert but_for_noise(read_json(copy / "report.json")["lacks"]) == []


def test_ceilings_of_this_machine_are_taken_instead_of_measured(copy, monkeypatch, tmp_path):
    """Of any other they are refused before the run begins."""
    file, session = tmp_path / "ceilings.json", runs.tiny_session()
    measured = (copy / "records" / "ceilings.json").rename(file)
    found = profile_pass.ceilings_for(measured, session, runs.tiny_config())
    monkeypatch.setattr(command, "PROFILE_PASS", [sys.executable, "-c", "pass"])
    monkeypatch.setattr(command, "MEASURE_CEILINGS", [sys.executable, "-c", "raise SystemExit('measured again')"])
    train.profile(session, runs.tiny_config(), copy, ["--synthetic"], ceilings=found)
    assert read_json(copy / "records" / "ceilings.json") == read_json(file)
    assert but_for_noise(read_json(copy / "report.json")["lacks"]) == []
    for changes, says in (
        ({"device": "NVIDIA H200"}, "it is of NVIDIA H200 in float32, and this run on"),
        ({"dtype": "bfloat16"}, "in bfloat16, and this run on"),
        ({"fingerprint": "0" * 16}, "another machine, or with another driver"),
        ({"version": 7}, "version is 7, expected 1"),
    ):
        write_json(file, found.to_json() | changes)
        with pytest.raises(UsageError, match=says):
            profile_pass.ceilings_for(file, session, runs.tiny_config())
    with pytest.raises(UsageError, match="No such file"):
        profile_pass.ceilings_for(tmp_path / "none.json", session, runs.tiny_config())


def test_ceilings_without_a_profile_are_refused():
    done = subprocess.run([sys.executable, RUNS, "--ceilings", "c.json"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "give --profile too" in done.stderr


def test_a_pass_that_fails_is_told_and_the_run_stands(copy):
    warnings = []
    command = [sys.executable, "-c", "import sys; print('error: out of luck', file=sys.stderr); sys.exit(6)"]
    error = collect.run_pass("the profiled pass", command, copy, warnings.append)
    collect.record_failure(copy / "records", error)
    assert "out of luck" in warnings[0]
    made = build.build(copy)
    assert any("exit code 6: error: out of luck" in line for line in made["lacks"])


@pytest.fixture
def quick(monkeypatch):
    """The pass on the tests' images, and ceilings in a moment."""
    monkeypatch.setattr(command, "PROFILE_PASS", [sys.executable, RUNS, "--profile-pass"])
    monkeypatch.setattr(command, "MEASURE_CEILINGS", [*command.MEASURE_CEILINGS, "--seconds", "0.002"])


def test_a_run_that_was_not_profiled_is_profiled_afterwards(tmp_path, quick):
    """Its report has the kernels, and lacks what nobody wrote down in the run."""
    out = tmp_path / "run"
    train.run(runs.tiny_session(), runs.tiny_config(), out)
    assert command.collect(out, None, False, Terminal(speaks=False)) == 0
    made = read_json(out / "report.json")
    assert "conv_inefficiency" in {t["key"] for t in made["terms"]}
    assert "There is no record of the steps." in made["lacks"]
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_a_profile_that_was_interrupted_is_taken_up_as_it_says(tmp_path, quick):
    """Ctrl-C after the training, before its profile."""
    out = tmp_path / "run"
    words = [sys.executable, RUNS, "--preset", "laptop", "--epochs", "1", "--profile", "--out", out]
    done = subprocess.run(words, env={**os.environ, "FAULT": "INT@profile"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
    said = re.search("its profile is not: python -m profiling collect (.*)", done.stdout.replace("\n", " "))[1]
    assert said.split() == [str(out), "--synthetic"]
    assert command.collect(out, None, True, Terminal(speaks=False)) == 0
    assert but_for_noise(read_json(out / "report.json")["lacks"]) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda run: (run / "config.json").unlink(),
            "is not the folder of a run: expected its summary.json",
        ),
        (lambda run: (run / "summary.json").write_text("[]"), "is not the folder of a run"),
        (
            lambda run: write_json(run / "summary.json", read_json(run / "summary.json") | {"status": "interrupted"}),
            r"has not ended \(interrupted\): first python train.py --resume",
        ),
    ],
    ids=["no_config", "no_summary", "interrupted"],
)
def test_what_cannot_be_collected_is_a_line(copy, damage, says):
    damage(copy)
    with pytest.raises(ReportError, match=says):
        command.collect(copy, None, True, Terminal(speaks=False))


def test_a_pass_that_fails_is_the_exit_code_of_collect(copy, monkeypatch):
    monkeypatch.setattr(command, "PROFILE_PASS", [sys.executable, "-c", "raise SystemExit('no images')"])
    monkeypatch.setattr(command, "MEASURE_CEILINGS", [sys.executable, "-c", "pass"])
    with pytest.raises(ReportError, match=r"could not be profiled: exit code 1: no images"):
        command.collect(copy, None, True, Terminal(speaks=False))


def test_a_folder_of_records_that_cannot_be_made_is_a_line(copy, monkeypatch):
    shutil.rmtree(copy / "records")
    (copy / "records").touch()
    for name in ("PROFILE_PASS", "MEASURE_CEILINGS"):
        monkeypatch.setattr(command, name, [sys.executable, "-c", "raise SystemExit('no room')"])
    with pytest.raises(ReportError, match="could not be profiled: exit code 1: no room"):
        command.collect(copy, None, True, Terminal(speaks=False))
    found = SimpleNamespace(to_json=dict)
    assert "no room" in command.profile(copy, "cpu", "float32", [], Terminal(speaks=False), ceilings=found)


def test_profile_accounts_for_one_whole_run():
    done = subprocess.run([sys.executable, RUNS, "--profile", "--runs", "2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --profile accounts for one whole run")
    assert len(done.stderr.splitlines()) == 1
