"""The cost of the collection: the turns, the two ratios, and a sampler that does not do its part."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments import collection_overhead
from experiments.__main__ import app
from experiments.collection_overhead import measure, overhead, sampling
from experiments.study.folder import Request
from model.interrupts import Interrupts
from profiling.output.terminal import Terminal
from profiling.run import telemetry
from profiling.run.clock import StepClock

CPU = torch.device("cpu")


class Trainer:
    """Epochs of three steps that do nothing, each behind a look around."""

    def __init__(self, look=lambda: None):
        self.look = look

    def train(self, epoch):
        self.look()
        yield from range(3)

    def check_finite(self):
        pass


def test_ratios_are_of_each_turn():
    found = overhead([11.0, 22.0, 44.0], [10.0, 20.0, 40.0], [10.0, 20.0, 44.0])
    assert (found.cost.median, found.same.median) == (pytest.approx(1.1), pytest.approx(1.0))


@pytest.mark.parametrize(
    ("with_us", "inside", "sentence"),
    [
        (101.0, True, "costs +1.00%, inside the interval"),
        (97.0, False, "costs -3.00%, outside the interval"),
        (110.0, False, "costs +10.00%, outside the interval"),
    ],
)
def test_cost_is_inside_where_no_difference_looks_like_it(monkeypatch, capsys, with_us, inside, sentence):
    found = overhead([with_us] * 9, [100.0] * 9, [98.0, 100.0, 102.0] * 3)
    assert (found.same.low, found.same.high, found.inside) == (0.98, 1.02, inside)
    monkeypatch.setattr(collection_overhead, "measure", lambda pairs, steps, device: (found, "nothing"))
    collection_overhead.run(Request(), Terminal(), None)
    out = capsys.readouterr().out
    assert sentence in out
    assert "0.9800 to 1.0200" in out


def test_turns_train_alike_but_for_the_collection(monkeypatch):
    """Which trainings had a clock, and whether the sampler sampled meanwhile, in the order of the turns."""
    recorders, seen, clocks = [], [], []

    def start(device, path):
        recorders.append(sampling(device, path)[0])
        found = telemetry.read(path)
        assert (found.period_ms, found.samples[0].power_w) == (25.0, None)
        return recorders[0], "nothing"

    def state() -> str:
        return Path(f"/proc/{recorders[0].process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def look() -> None:
        time.sleep(0.05)  # for the signal to arrive
        seen.append("held" if state() == "T" else "sampling")

    class Clock(StepClock):
        def __init__(self, device, steps):
            super().__init__(device, steps)
            clocks.append(self)

    monkeypatch.setattr(telemetry, "STOP_S", 60.0)
    monkeypatch.setattr(collection_overhead, "READY_S", 60.0)
    monkeypatch.setattr(collection_overhead, "sampling", start)
    monkeypatch.setattr(collection_overhead, "small_trainer", lambda steps, device: Trainer(look))
    monkeypatch.setattr(collection_overhead, "StepClock", Clock)
    measure(3, 3, CPU)
    turn = ["sampling", "held", "held"]
    assert seen == ["sampling", "held", *turn, *turn[::-1], *turn]
    assert [len(clock.durations_ns()) for clock in clocks] == [3] * 4
    assert recorders[0].process.returncode == 0


def test_sampler_that_ends_by_itself_is_an_error(monkeypatch, tmp_path):
    """Whether it leaves no sample at all, or does not last."""
    ended = telemetry.launch([sys.executable, "-S", "-c", ""])
    ended.wait()
    monkeypatch.setattr(telemetry, "launch", lambda command: ended)
    with pytest.raises(RuntimeError, match="left no sample"):
        sampling(CPU, tmp_path / "telemetry.jsonl")
    monkeypatch.setattr(collection_overhead, "sampling", lambda *_: (telemetry.Recorder(ended), "nothing"))
    monkeypatch.setattr(collection_overhead, "small_trainer", lambda steps, device: Trainer())
    with pytest.raises(RuntimeError, match="ended by itself"):
        measure(3, 3, CPU)


def test_command(monkeypatch):
    monkeypatch.setattr(collection_overhead, "BATCH", 4)
    monkeypatch.setattr(collection_overhead, "WIDTHS", (8, 8, 8, 8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Interrupts, "install", lambda self: None)
    done = CliRunner().invoke(app, ["collection-overhead", "--pairs", "3", "--steps", "2", "--json"])
    found = json.loads(done.stdout)
    assert (found["pairs"], found["steps"], found["device"]) == (3, 2, "cpu")
    assert found["cost"]["low"] <= found["cost"]["median"] <= found["cost"]["high"]
    assert found["inside"] == (found["same"]["low"] <= found["cost"]["median"] <= found["same"]["high"])
    assert "no NVML" in done.stderr
