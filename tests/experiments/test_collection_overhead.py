import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import collection_overhead
from experiments.collection_overhead import measure, overhead
from experiments.study.folder import Request
from profiling import ROOT
from profiling.output.terminal import Terminal
from profiling.run import telemetry
from profiling.run.clock import StepClock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(collection_overhead, "BATCH", 4)
    monkeypatch.setattr(collection_overhead, "WIDTHS", (8, 8, 8, 8))


def test_the_ratios_are_of_each_turn():
    found = overhead([11.0, 22.0, 44.0], [10.0, 20.0, 40.0], [10.0, 20.0, 44.0])
    assert found.cost.median == pytest.approx(1.1)
    assert found.same.median == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("with_us", "inside"),
    [([101.0] * 9, True), ([97.0] * 9, False), ([105.0] * 9, False)],
    ids=["within", "faster", "slower"],
)
def test_a_cost_is_inside_where_no_difference_looks_like_it(with_us, inside):
    found = overhead(with_us, [100.0] * 9, [98.0, 100.0, 102.0] * 3)
    assert (found.same.low, found.same.high) == (0.98, 1.02)
    assert found.inside is inside


def test_the_turns_train_alike_but_for_the_collection(monkeypatch):
    """Which trainings had a clock, and whether the sampler sampled meanwhile, in the order of the turns."""
    recorders, seen, clocks, start = [], [], [], collection_overhead.sampling

    def sampling(*arguments):
        recorder, sampled = start(*arguments)
        recorders.append(recorder)
        return recorder, sampled

    def state() -> str:
        return Path(f"/proc/{recorders[0].process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    class Trainer:
        def train(self, epoch):
            time.sleep(0.05)  # for the signal to arrive
            seen.append("held" if state() == "T" else "sampling")
            yield from range(3)

        def check_finite(self):
            pass

    class Clock(StepClock):
        def __init__(self, device, steps):
            super().__init__(device, steps)
            clocks.append(self)

    monkeypatch.setattr(collection_overhead, "sampling", sampling)
    monkeypatch.setattr(collection_overhead, "small_trainer", lambda steps, device: Trainer())
    monkeypatch.setattr(collection_overhead, "StepClock", Clock)
    measure(3, 3, CPU)
    turn = ["sampling", "held", "held"]
    assert seen == ["sampling", "held", *turn, *turn[::-1], *turn]
    assert [len(clock.durations_ns()) for clock in clocks] == [3] * 4
    assert recorders[0].process.returncode == 0


def test_a_sampler_that_does_not_last_is_no_measurement(monkeypatch):
    def sampling(device, path):
        return telemetry.Recorder(telemetry.launch([sys.executable, "-c", ""])), "nothing"

    monkeypatch.setattr(collection_overhead, "sampling", sampling)
    with pytest.raises(RuntimeError, match="ended by itself"):
        measure(3, 8, CPU)


def test_a_sampler_that_never_samples_is_an_error(monkeypatch, tmp_path):
    launch = telemetry.launch
    monkeypatch.setattr(telemetry, "launch", lambda command: launch([sys.executable, "-c", ""]))
    with pytest.raises(RuntimeError, match="left no sample"):
        collection_overhead.sampling(CPU, tmp_path / "telemetry.jsonl")


def test_without_nvml_the_process_samples_nothing_at_the_same_period(tmp_path):
    recorder, sampled = collection_overhead.sampling(CPU, tmp_path / "telemetry.jsonl")
    recorder.stop()
    found = telemetry.read(tmp_path / "telemetry.jsonl")
    assert "no NVML" in sampled
    assert found.period_ms == 25.0
    assert found.samples[0].power_w is None
    assert recorder.process.returncode == 0


@pytest.mark.parametrize(
    ("with_us", "sentence"),
    [(101.0, "costs +1.00%, inside the interval"), (110.0, "costs +10.00%, outside the interval")],
)
def test_the_sentence(monkeypatch, capsys, with_us, sentence):
    found = overhead([with_us] * 9, [100.0] * 9, [98.0, 100.0, 102.0] * 3)
    monkeypatch.setattr(collection_overhead, "measure", lambda pairs, steps, device: (found, "nothing"))
    collection_overhead.run(Request(), Terminal(), None)
    out = capsys.readouterr().out
    assert sentence in out
    assert "0.9800 to 1.0200" in out


def test_the_command():
    code = (
        "import sys; from experiments import collection_overhead as c; c.BATCH, c.WIDTHS = 4, (8, 8, 8, 8);"
        "from experiments.__main__ import app; app(['collection-overhead', '--pairs', '3', '--steps', '2', '--json'])"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)
    found = json.loads(done.stdout)
    assert (found["pairs"], found["steps"], found["device"]) == (3, 2, "cpu")
    assert found["cost"]["low"] <= found["cost"]["median"] <= found["cost"]["high"]
    assert found["inside"] == (found["same"]["low"] <= found["cost"]["median"] <= found["same"]["high"])
    assert "no NVML" in done.stderr
