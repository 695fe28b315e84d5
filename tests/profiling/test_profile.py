"""`train.py --profile` from the run to the report, on a CPU and very small."""

import functools
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
from typer.testing import CliRunner

import profile_pass
import train
from model.errors import UsageError
from profiling import ROOT
from profiling.device import ceilings
from profiling.output.errors import ReportError
from profiling.output.files import read_json, write_json
from profiling.output.terminal import Terminal
from profiling.report import build, command

RUNS = str(ROOT / "tests" / "support" / "runs.py")
SMALL = """
from profiling.__main__ import app
from profiling.device import ceilings
ceilings.GEMMS["cpu"], ceilings.COPY_BYTES["cpu"], ceilings.CPU_BATCH = ((64, False),), 1 << 20, 1
app()
"""
NOBODY = Terminal(speaks=False)


def fails(words: str) -> list[str]:
    return [sys.executable, "-c", f"raise SystemExit('{words}')"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> Path:
    """A profiled run of 12 steps, and its report."""
    out, session = tmp_path_factory.mktemp("profiled") / "run", runs.tiny_session()
    train.run(session, runs.tiny_config(), out, collect=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_pass, "record_trace", functools.partial(profile_pass.record_trace, active=5))
        profile_pass.profile_pass(session, out, counters=False)
        patch.setattr(ceilings, "GEMMS", {"cpu": ((64, False),)})
        patch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 20})
        found = ceilings.measure(session.device, torch.float32, seconds=0.002, batch=1)
    write_json(out / "records" / "ceilings.json", found.to_json())
    build.write(out)
    return out


@pytest.fixture
def copy(profiled, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(profiled, tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch):
    """The pass on the tests' images, and ceilings in a moment."""
    monkeypatch.setattr(command, "PROFILE_PASS", [sys.executable, RUNS, "--profile-pass"])
    monkeypatch.setattr(command, "MEASURE_CEILINGS", [sys.executable, "-c", SMALL, "device", "--seconds", "0.002"])


def but_for_noise(lacks: list[str]) -> list[str]:
    """Steps of some milliseconds take longer in one pass than in another, which a report says too."""
    return [line for line in lacks if "something else used this machine" not in line]


def test_the_report_is_whole(profiled):
    """Terms sum to the training, phases to the process, and each step of the timed run is in its phase."""
    made = read_json(profiled / "report.json")
    phases, steps, work = (read_json(profiled / "records" / f"{name}.json") for name in ("phases", "steps", "work"))
    assert but_for_noise(made["lacks"]) == []
    assert {"report.html", "report.md", "report.json"} <= {p.name for p in profiled.iterdir()}
    keys = [t["key"] for t in made["terms"]]
    assert {"conv_inefficiency", "batch norm", "optimiser and loss", "augmentation and data", "idle"} <= set(keys)
    assert (keys[0], keys[-1]) == ("ideal", "residual")
    training = [p for p in phases["phases"] if p["name"] == "training"]
    assert sum(t["ns"] for t in made["terms"]) == sum(p["end_ns"] - p["start_ns"] for p in training) > 0
    wall_ns = phases["end_ns"] - phases["start_ns"]
    assert sum(p["ns"] for p in made["phases"]) == wall_ns
    assert read_json(profiled / "summary.json")["wall_s"] == wall_ns / 1e9
    assert [len(epoch) for epoch in steps["epochs"]] == [5, 5, 5]  # four steps have five ends
    for phase, epoch in zip(training, steps["epochs"], strict=True):
        assert phase["start_ns"] <= epoch[0] < epoch[-1] <= phase["end_ns"]
    layers = {row["name"]: row for row in made["layers"]}
    assert set(layers) >= {f"{row['layer']} fprop" for row in work["ops"] if row["family"] == "fprop"}
    assert all(row["flops"] and row["flops_per_s"] and row["roof_fraction"] > 0 for row in layers.values())
    assert not {"mfu", "energy_j", "throttled_share", "sm_clock_hz"} & set(made["figures"]), "only a GPU has them"
    assert (made["timeline"]["reason"], made["timeline"]["samples"]) == ("no NVIDIA driver", {})


RECORDS = [f"records/{n}" for n in ("phases.json", "steps.json", "work.json", "profile.json", "ceilings.json")]
RECORDS.append("records/trace.json.gz")
DAMAGES = ("gone", "empty", "half", "garbage", "another_version")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, "gone") for name in ("config.json", "environment.json", "log.jsonl")),
        *(
            pytest.param(name, damage, marks=[] if (i - j) % 5 == 0 else pytest.mark.slow)
            for i, name in enumerate(RECORDS)
            for j, damage in enumerate(DAMAGES)
        ),
    ],
)
def test_a_damaged_record_is_named_and_the_rest_stands(copy, name, damage):
    path = copy / name
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
    if Path(name).name in ("steps.json", "trace.json.gz", "profile.json"):
        assert "idle" not in {t["key"] for t in made["terms"]}


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
    summary = read_json(copy / "summary.json") | {"preset": "<script>alert(1)</script>", "device": "x\0" * 2000}
    (copy / "summary.json").write_text(json.dumps(summary))
    build.write(copy)
    assert "<script>alert(1)" not in (copy / "report.html").read_text()


@pytest.mark.slow
def test_the_pass_runs_in_a_process_of_its_own(copy, quick):
    for name in ("trace.json.gz", "profile.json", "work.json", "ceilings.json"):
        (copy / "records" / name).unlink()
    train.profile(runs.tiny_session(), runs.tiny_config(), copy, ["--synthetic"], counters=False)
    assert but_for_noise(read_json(copy / "report.json")["lacks"]) == []


def test_a_run_that_was_not_profiled_is_profiled_afterwards(copy, quick):
    """Its report has the kernels, and lacks what was not recorded in the run."""
    shutil.rmtree(copy / "records")
    for name in ("report.html", "report.md", "report.json"):
        (copy / name).unlink()
    assert command.collect(copy, None, False, NOBODY) == 0
    made = read_json(copy / "report.json")
    assert "conv_inefficiency" in {t["key"] for t in made["terms"]}
    assert "There is no record of the steps." in made["lacks"]
    assert not [line for line in made["lacks"] if "ceilings" in line]
    assert (copy / "report.html").exists()


@pytest.mark.slow
def test_a_profile_that_was_interrupted_is_taken_up_as_it_says(tmp_path, quick):
    """Ctrl-C after the training, before its profile."""
    out = tmp_path / "run"
    words = [sys.executable, RUNS, "--preset", "laptop", "--epochs", "1", "--profile", "--out", out]
    done = subprocess.run(words, env={**os.environ, "FAULT": "INT@profile"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
    said = re.search("its profile is not: python -m profiling collect (.*)", done.stdout.replace("\n", " "))[1]
    assert said.split() == [str(out), "--synthetic"]
    assert command.collect(out, None, True, NOBODY) == 0
    assert but_for_noise(read_json(out / "report.json")["lacks"]) == []


def test_ceilings_of_this_machine_are_taken_instead_of_measured(copy, monkeypatch, tmp_path):
    """Those of another device are refused before the run begins."""
    file, session = tmp_path / "ceilings.json", runs.tiny_session()
    measured = (copy / "records" / "ceilings.json").rename(file)
    found = profile_pass.ceilings_for(measured, session, runs.tiny_config())
    monkeypatch.setattr(command, "PROFILE_PASS", [sys.executable, "-c", "pass"])
    monkeypatch.setattr(command, "MEASURE_CEILINGS", fails("measured again"))
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


def test_a_pass_that_fails_is_told_and_the_run_stands(copy, monkeypatch):
    monkeypatch.setattr(command, "PROFILE_PASS", fails("no images"))
    monkeypatch.setattr(command, "MEASURE_CEILINGS", [sys.executable, "-c", "pass"])
    with pytest.raises(ReportError, match=r"could not be profiled: exit code 1: no images"):
        command.collect(copy, None, True, NOBODY)
    assert any("exit code 1: no images" in line for line in read_json(copy / "report.json")["lacks"])


def test_a_folder_of_records_that_cannot_be_made_is_a_line(copy, monkeypatch):
    shutil.rmtree(copy / "records")
    (copy / "records").touch()
    monkeypatch.setattr(command, "PROFILE_PASS", fails("no room"))
    found = SimpleNamespace(to_json=dict)
    assert "no room" in command.profile(copy, "cpu", "float32", [], NOBODY, ceilings=found)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: (run / "config.json").unlink(), "is not the folder of a run: expected its summary.json"),
        (lambda run: (run / "summary.json").unlink(), "is not the folder of a run"),
        (lambda run: (run / "summary.json").write_text("[]"), "is not the folder of a run"),
        (
            lambda run: write_json(run / "summary.json", read_json(run / "summary.json") | {"status": "interrupted"}),
            r"has not ended \(interrupted\): first python train.py --resume",
        ),
    ],
    ids=["no_config", "no_summary", "damaged_summary", "interrupted"],
)
def test_records_that_cannot_be_collected_are_a_line(copy, damage, says):
    damage(copy)
    with pytest.raises(ReportError, match=says):
        command.collect(copy, None, True, NOBODY)
    if not (copy / "summary.json").exists():
        with pytest.raises(ReportError, match=says):
            build.build(copy)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--ceilings c.json", "give --profile too"),
        ("--ncu", "give --profile too"),
        ("--profile --runs 2", "--profile accounts for one whole run"),
    ],
)
def test_contradictions_are_a_line(words, says):
    done = CliRunner().invoke(train.app, words.split())
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
