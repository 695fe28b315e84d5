import dataclasses
import errno
import multiprocessing
import os
import re
import signal
import sys

import pytest
import torch
from runs import tiny_config, tiny_dataset, tiny_session
from train_runs import assert_same_run, digest, losses, tiny

import train
from model import checkpoint
from model.distributed import Ranks
from model.errors import CheckpointError, NonFiniteError, OutOfMemoryError, RunError, TargetMissedError
from model.session import require_fit
from model.step import TrainingStep
from profiling.output.files import read_json


@pytest.mark.usefixtures("cpu_modes")
@pytest.mark.parametrize(("where", "mode"), [("weights", "eager"), ("gradient", "eager"), ("weights", "captured")])
def test_a_value_that_is_not_finite_ends_the_run_and_spares_the_checkpoints(tmp_path, monkeypatch, where, mode):
    original, kept = TrainingStep.__call__, {}

    def poisoned(self, *batch):
        if self.number == 9:
            kept.update(digest(tmp_path))
            target = self.network.linear.weight
            if where == "weights":
                with torch.no_grad():
                    target[0, 0] = float("nan")
            else:
                target.register_hook(lambda g: g * float("inf"))
        original(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 10 \(epoch 3\).*learning rate 0\.025.*seed is 0") as error:
        train.run(tiny_session(), tiny_config(step=mode), tmp_path)
    assert error.value.exit_code == 5
    assert digest(tmp_path) == kept
    assert len(kept) == 4
    assert checkpoint.load(tmp_path).step == 8
    assert read_json(tmp_path / "summary.json")["status"] == "non-finite"


def poison_statistics(monkeypatch, step):
    """From `step` on a running mean is NaN, as nothing is that gradients pass through."""
    original = TrainingStep.__call__

    def poisoned(self, *batch):
        original(self, *batch)
        if self.number == step:
            next(b for name, b in self.network.named_buffers() if name.endswith("running_mean")).fill_(float("nan"))

    monkeypatch.setattr(TrainingStep, "__call__", poisoned)


@pytest.mark.parametrize(("step", "epochs"), [(2, 0), (6, 1)])
def test_a_test_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, step, epochs):
    poison_statistics(monkeypatch, step)
    with pytest.raises(NonFiniteError, match=rf"test loss after step {4 * epochs + 4} \(epoch {epochs + 1}\) is nan"):
        train.run(tiny_session(), tiny_config(), tmp_path)
    summary = read_json(tmp_path / "summary.json")
    assert (summary["status"], summary["exit_code"], summary["epochs"]) == ("non-finite", 5, epochs)
    assert (summary["test_loss"] is None) == (epochs == 0)
    assert len(digest(tmp_path)) == 2 * epochs
    assert len(losses(tmp_path)) == epochs if epochs else not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("what", ["gradient", "statistics"])
def test_a_signal_saves_nothing_that_is_not_finite(tmp_path, monkeypatch, what):
    """Within an epoch on a GPU nobody reads whether the gradients were finite; here it shows after the step's look."""
    session, kept, steps = tiny_session(), {}, []
    original = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda self, *batch: steps.append(self) or original(self, *batch))
    if what == "statistics":
        poison_statistics(monkeypatch, 6)

    def on_step(number):
        if number == 6:
            kept.update(digest(tmp_path))
            if what == "gradient":
                steps[-1].bad_step.fill_(6)
            session.interrupts.handle(signal.SIGTERM)

    with pytest.raises(NonFiniteError, match="step 6"):
        train.run(session, tiny_config(), tmp_path, on_step=on_step)
    assert digest(tmp_path) == kept
    assert len(kept) == 2
    assert read_json(tmp_path / "summary.json")["exit_code"] == 5


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux only")
@pytest.mark.parametrize("step", [15, 9], ids=["within_an_epoch", "in_its_last_step"])
def test_a_killed_worker_is_a_line_with_advice(tmp_path, monkeypatch, step):
    original = TrainingStep.__call__

    def faulty(self, *batch):
        if self.number == step:
            for worker in multiprocessing.active_children():
                worker.kill()
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the signal of its end has arrived
        original(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", faulty)
    session, config = tiny_session(tiny_dataset(200)), tiny_config(preprocess="once", workers=1)
    with pytest.raises(RunError, match=r"makes batches has ended: .*\) exited.*--resume auto.*workers=0"):
        train.run(session, config, tmp_path)
    assert read_json(tmp_path / "summary.json")["exit_code"] == 1
    saved = checkpoint.load(tmp_path)
    assert saved.step > step  # the step in which the worker ended is whole
    require_fit(session, saved, dataclasses.replace(config, workers=0))


def test_out_of_memory_names_a_batch_to_try(tmp_path, monkeypatch):
    original = TrainingStep.__call__

    def greedy(self, *batch):
        if self.number == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, *batch)

    monkeypatch.setattr(TrainingStep, "__call__", greedy)
    with pytest.raises(OutOfMemoryError, match="batch_size=10") as error:
        train.run(tiny_session(), tiny_config(), tmp_path)
    assert error.value.exit_code == 6
    assert read_json(tmp_path / "summary.json")["status"] == "out of memory"
    assert checkpoint.load(tmp_path).step == 4


@pytest.mark.gpu
def test_a_full_gpu_names_a_batch_to_try(tmp_path):
    """By the device's own allocator, in whatever of warm-up, search, capture and step meets its end first."""
    device = torch.device("cuda", 0)
    session = dataclasses.replace(tiny_session(tiny_dataset(4000)), device=device)
    config = tiny_config(batch_size=4000, widths=(64, 64, 64, 64), device="cuda")
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved(device) + 2**28
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info(device)[1], device)
    try:
        with pytest.raises(OutOfMemoryError, match="batch_size=2000"):
            train.run(session, config, tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert read_json(tmp_path / "summary.json")["exit_code"] == 6


def test_a_full_disk_is_a_warning_until_the_last_checkpoint(whole, tmp_path, monkeypatch, capsys):
    original = checkpoint.save

    def full_at(*steps):
        def save(out, step, tensors, state):
            if step in steps:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(out, step, tensors, state)

        monkeypatch.setattr(checkpoint, "save", save)

    full_at(8)
    train.run(tiny_session(), tiny_config(), tmp_path / "a")
    assert_same_run(whole, tmp_path / "a")
    assert re.search(r"warning: .*step 8.*No space left.*goes on", capsys.readouterr().err)
    full_at(12)
    with pytest.raises(CheckpointError, match=r"step 12.*No space left.*--resume auto") as error:
        train.run(tiny_session(), tiny_config(), tmp_path / "b")
    assert error.value.exit_code == 8
    assert checkpoint.load(tmp_path / "b").step == 8


def test_a_missed_target(tmp_path):
    with pytest.raises(TargetMissedError, match="below the target of 99"):
        train.run(tiny_session(), tiny_config(), tmp_path, target=0.99)
    summary = read_json(tmp_path / "summary.json")
    assert (summary["status"], summary["exit_code"]) == ("target missed", 7)
    assert train.run(tiny_session(), tiny_config(), tmp_path / "b", target=0.01)["exit_code"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": (8, 8, 16, 8)}, "widths"),
        ({"epochs": 6, "lr_epochs": (0, 1, 6)}, "epochs: 3 in the checkpoint, 6"),
        ({"seed": 5}, "seed"),
        ({"network": "resnet"}, "network"),
    ],
    ids=["architecture", "schedule", "seed", "network"],
)
def test_a_checkpoint_of_another_run_is_refused(whole, changes, words):
    with pytest.raises(CheckpointError, match=words):
        require_fit(tiny_session(), checkpoint.load(whole), tiny_config(**changes))


def test_a_checkpoint_of_other_data_or_another_number_of_processes_is_refused(whole):
    found = checkpoint.load(whole)
    with pytest.raises(CheckpointError, match=r"other images than these \(synthetic: made in a test\); name its own"):
        require_fit(tiny_session(tiny_dataset(71)), found, tiny_config())
    session = dataclasses.replace(tiny_session(), ranks=Ranks(0, 4))
    with pytest.raises(CheckpointError, match="processes: 1 in the checkpoint, 4"):
        require_fit(session, found, tiny_config())
    require_fit(tiny_session(), found, tiny_config(dtype="bfloat16", checkpoint_s=9.0))


@pytest.mark.parametrize(
    ("step", "epochs"), [(10**6, 0), (5, 0), (8, 3)], ids=["far_beyond", "history_empty", "longer_history"]
)
def test_a_checkpoint_of_a_step_that_its_run_cannot_have_is_refused(whole, step, epochs):
    """Of data with another number of steps an epoch; with rows of the log, that much is seen as it is loaded."""
    found = checkpoint.load(whole)
    rows = [{**row, "step": 2 * row["epoch"]} for row in found.state.history[:epochs]]
    found = dataclasses.replace(found, step=step, state=dataclasses.replace(found.state, history=rows))
    with pytest.raises(CheckpointError, match=r"checkpoint-00000012\.json: (step|history)"):
        require_fit(tiny_session(), found, tiny_config())


def test_no_memory_is_taken_for_what_a_checkpoint_claims(whole):
    found = checkpoint.load(whole)
    huge = tiny_config(batch_size=10**9, epochs=10**5, lr_epochs=(0, 1, 10**5))
    assert train.evaluate(tiny_session(), huge, found)["test_accuracy"] == found.state.history[-1]["test_accuracy"]
    wide = tiny_config(widths=(65536,) * 4)
    with pytest.raises(CheckpointError, match=r"does not fit the network: .* and [0-9]+ more"):
        train.evaluate(tiny_session(), wide, found)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        require_fit(
            tiny_session(), dataclasses.replace(found, state=dataclasses.replace(found.state, config=wide)), wide
        )


def test_a_batch_of_more_images_than_there_are_is_refused(tmp_path):
    done = tiny("--set", "batch_size=71", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr == b"error: batch_size=71 is more than the 70 training images\n"


def test_evaluating_on_other_images_is_said(whole, capsys):
    found = checkpoint.load(whole)
    train.evaluate(tiny_session(), tiny_config(), found)
    assert "other images" not in capsys.readouterr().err
    train.evaluate(tiny_session(tiny_dataset(60)), tiny_config(), found)
    assert "was trained on other images than these (synthetic: made in a test)" in capsys.readouterr().err
