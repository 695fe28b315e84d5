import json

import pytest
import torch
from runs import tiny_config, tiny_dataset
from typer.testing import CliRunner

from experiments import step_speeds
from experiments.__main__ import app
from experiments.steps import MODES
from experiments.study.folder import Request
from model.errors import RunError
from model.network import ResNet
from profiling.account.work import flops_per_image
from profiling.bench.timing import QUICK
from profiling.output.terminal import Terminal

CPU = torch.device("cpu")


def test_modes_take_turns_on_whole_batches(monkeypatch):
    """On a CPU nothing is captured, and the row says so."""
    monkeypatch.setattr("model.step.COMPILER", "eager")
    rows = step_speeds.measure(tiny_config(), tiny_dataset(), CPU, MODES, 3, QUICK)
    assert [row["step"] for row in rows] == list(MODES)
    eager, compiled, captured, plain = rows
    for row in (eager, compiled):
        assert row["reason"] is None
        assert 0 < row["low"] <= row["images_per_s"] <= row["high"]
        assert row["idle_share"] is None
        assert row["against"] == "eager"
    assert "needs a CUDA GPU" in captured["reason"]
    assert "images_per_s" not in captured
    assert "unavailable: a CUDA graph" in step_speeds.cells(captured)[2]
    assert plain["reason"] == "the plain loop is of network=resnet"
    json.dumps(rows)


def test_plain_loop_trains_the_article_s_network():
    network = step_speeds.PlainResNet()
    assert flops_per_image(step_speeds.PlainResNet) == flops_per_image(ResNet)
    assert sum(p.numel() for p in network.parameters()) == 5_205_834
    config = tiny_config(network="resnet", widths=(8, 8, 8, 8), batch_size=4)
    (row,) = step_speeds.measure(config, tiny_dataset(), CPU, ("plain",), 2, QUICK)
    assert row["images_per_s"] > 0
    assert row["against"] == "plain"


def test_a_batch_of_more_images_than_there_are_is_refused():
    with pytest.raises(RunError, match="batch 99 is more than the 70 images"):
        step_speeds.measure(tiny_config(batch_size=99), tiny_dataset(), CPU, ("eager",), 1, QUICK)


def test_training_goes_on_without_an_end():
    trainer, reason = step_speeds.prepare(tiny_config(epochs=1, lr_epochs=(0, 0.5, 1)), tiny_dataset(60), CPU)
    assert reason is None
    stream = step_speeds.endless(trainer)
    assert [next(stream) for _ in range(7)] == [20] * 7
    assert trainer.step.number == 7


WORDS = ["--set", "widths=8,8,8,8", "--set", "device=cpu", "--set", "dtype=float32", "--preset", "laptop", "--small"]


@pytest.fixture
def tiny_data(monkeypatch):
    monkeypatch.setattr(step_speeds, "load", lambda *args, **kwargs: tiny_dataset())
    monkeypatch.setattr(step_speeds, "as_many_as_cifar10", lambda dataset: dataset)
    monkeypatch.setattr("model.interrupts.Interrupts.install", lambda self: None)


def test_command_prints_a_table_and_writes_what_it_measured(tiny_data, tmp_path):
    words = ["steps", "--batch", "20", "--batch", "35", "--mode", "eager", "--steps", "2", *WORDS]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "eager" in done.output
    written = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert [row["batch"] for row in written["rows"]] == [20, 35]
    assert written["environment"]["packages"]["torch"]


def test_a_batch_that_fails_leaves_what_was_measured(monkeypatch, tiny_data, tmp_path):
    """One mode that runs out of memory is a row with its reason; an error that nobody expects comes after the rows."""
    original, batches = step_speeds.prepare, []

    def prepare(config, *rest):
        batches.append(config.batch_size)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(config, *rest)

    def breaks(stream, wall_us, device):
        if len(batches) > 2:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(step_speeds, "prepare", prepare)
    monkeypatch.setattr(step_speeds, "idle_share", breaks)
    settings = ("widths=8,8,8,8", "device=cpu", "dtype=float32")
    request = Request(small=True, out=tmp_path, settings=settings)
    with pytest.raises(RuntimeError, match="illegal"):
        step_speeds.report(request, Terminal(speaks=False), "laptop", (20, 35), ("eager", "captured"), 2)
    eager, captured = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert (eager["batch"], eager["reason"]) == (20, None)
    assert "out of memory at batch_size=20" in captured["reason"]


def test_synthetic_images_are_as_many_as_cifar_10_s():
    data = step_speeds.as_many_as_cifar10(tiny_dataset())
    assert len(data.train_images) == len(data.train_labels) == 50_000
    assert torch.equal(data.train_images[140:210], tiny_dataset().train_images)
