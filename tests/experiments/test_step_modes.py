import json

import pytest
import torch
from runs import tiny_config, tiny_dataset

from experiments import step_modes, step_speeds
from model.errors import RunError
from profiling.bench.timing import QUICK

CPU = torch.device("cpu")


def test_modes_take_turns_on_whole_batches(monkeypatch):
    """On a CPU nothing is captured, and the row says so."""
    monkeypatch.setattr("model.step.COMPILER", "eager")
    rows = step_speeds.measure(tiny_config(), tiny_dataset(), CPU, step_modes.MODES, 3, QUICK)
    assert [row["step"] for row in rows] == list(step_modes.MODES)
    eager, compiled, captured = rows
    for row in (eager, compiled):
        assert row["reason"] is None
        assert 0 < row["low"] <= row["images_per_s"] <= row["high"]
        assert row["idle_share"] is None
        assert row["against"] == "eager"
    assert "needs a CUDA GPU" in captured["reason"]
    assert "images_per_s" not in captured
    assert "unavailable: a CUDA graph" in step_speeds.cells(captured)[2]
    json.dumps(rows)


def test_a_batch_of_more_images_than_there_are_is_refused():
    with pytest.raises(RunError, match="batch 99 is more than the 70 images"):
        step_speeds.measure(tiny_config(batch_size=99), tiny_dataset(), CPU, ("eager",), 1, QUICK)


def test_training_goes_on_without_an_end():
    trainer, reason = step_speeds.prepare(tiny_config(epochs=1, lr_epochs=(0, 0.5, 1)), tiny_dataset(60), CPU)
    assert reason is None
    stream = step_speeds.endless(trainer)
    assert [next(stream) for _ in range(7)] == [20] * 7
    assert trainer.step.number == 7


def test_the_command_prints_a_table_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step_speeds, "load", lambda *args, **kwargs: tiny_dataset())
    monkeypatch.setattr(step_speeds, "as_many_as_cifar10", lambda dataset: dataset)
    settings = ["--set", "widths=8,8,8,8", "--set", "device=cpu", "--set", "dtype=float32"]
    command = ["step_modes", "--batch", "20", "35", "--modes", "eager", "--steps", "2", "--quick", "--preset", "laptop"]
    monkeypatch.setattr("sys.argv", [*command, *settings, "--out", str(tmp_path / "out")])
    step_modes.main()
    out = capsys.readouterr().out
    assert "eager" in out
    written = json.loads((tmp_path / "out" / "step_modes.json").read_text())
    assert [row["batch"] for row in written["rows"]] == [20, 35]
    assert written["environment"]["packages"]["torch"]


def test_a_batch_that_fails_leaves_what_was_measured(monkeypatch, tmp_path):
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
    monkeypatch.setattr(step_speeds, "load", lambda *args, **kwargs: tiny_dataset())
    monkeypatch.setattr(step_speeds, "as_many_as_cifar10", lambda dataset: dataset)
    settings = ["--set", "widths=8,8,8,8", "--set", "device=cpu", "--set", "dtype=float32"]
    command = ["step_modes", "--batch", "20", "35", "--modes", "eager", "captured", "--steps", "2", "--quick"]
    monkeypatch.setattr("sys.argv", [*command, "--preset", "laptop", *settings, "--out", str(tmp_path)])
    with pytest.raises(RuntimeError, match="illegal"):
        step_modes.main()
    eager, captured = json.loads((tmp_path / "step_modes.json").read_text())["rows"]
    assert (eager["batch"], eager["reason"]) == (20, None)
    assert "out of memory at batch_size=20" in captured["reason"]


def test_synthetic_images_are_as_many_as_cifar_10_s():
    data = step_speeds.as_many_as_cifar10(tiny_dataset())
    assert len(data.train_images) == len(data.train_labels) == 50_000
    assert torch.equal(data.train_images[140:210], tiny_dataset().train_images)
