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
from train_runs import RUN, assert_same_run, digest, losses, tiny

import train
from model import checkpoint
from model.distributed import Ranks
from model.errors import CheckpointError, NonFiniteError, OutOfMemoryError, RunError, TargetMissedError
from model.session import require_fit
from model.step import TrainingStep
from profiling.output.files import read_json


@pytest.fixture
def before_step(monkeypatch):
    """`before_step(number, act)`: `act(step)` comes just before that step, as long as nobody has counted on."""

    def install(number, act):
        original = TrainingStep.__call__

        def faulty(self, *batch):
            if self.number == number - 1:
                act(self)
            original(self, *batch)

        monkeypatch.setattr(TrainingStep, "__call__", faulty)

    return install


def poison_statistics(step):
    """A running mean is NaN, as nothing is that gradients pass through."""
    next(b for name, b in step.network.named_buffers() if name.endswith("running_mean")).fill_(float("nan"))


def poison_weights(step):
    with torch.no_grad():
        step.network.linear.weight[0, 0] = float("nan")


def poison_gradient(step):
    step.network.linear.weight.register_hook(lambda g: g * float("inf"))


@pytest.mark.usefixtures("cpu_modes")
@pytest.mark.parametrize(
    ("poison", "mode"), [(poison_weights, "eager"), (poison_gradient, "eager"), (poison_weights, "captured")]
)
def test_a_value_that_is_not_finite_ends_the_run_and_spares_the_checkpoints(tmp_path, before_step, poison, mode):
    kept = {}
    before_step(10, lambda step: (kept.update(digest(tmp_path)), poison(step)))
    with pytest.raises(NonFiniteError, match=r"step 10 \(epoch 3\).*learning rate 0\.025.*seed is 0") as error:
        train.run(tiny_session(), tiny_config(step=mode), tmp_path)
    assert error.value.exit_code == 5
    assert digest(tmp_path) == kept
    assert len(kept) == 4
    assert checkpoint.load(tmp_path).step == 8
    assert read_json(tmp_path / "summary.json")["status"] == "non-finite"


@pytest.mark.parametrize(("step", "epochs"), [(3, 0), (7, 1)])
def test_a_test_loss_that_is_not_finite_ends_the_run(tmp_path, before_step, step, epochs):
    before_step(step, poison_statistics)
    with pytest.raises(
        NonFiniteError, match=rf"test loss after step {4 * epochs + 4} \(epoch {epochs + 1}\) is nan.*seed is 0"
    ):
        train.run(tiny_session(), tiny_config(), tmp_path)
    summary = read_json(tmp_path / "summary.json")
    assert (summary["status"], summary["exit_code"], summary["epochs"]) == ("non-finite", 5, epochs)
    assert (summary["test_loss"] is None) == (epochs == 0)
    assert len(digest(tmp_path)) == 2 * epochs
    assert len(losses(tmp_path)) == epochs if epochs else not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("what", ["gradient", "statistics"])
def test_a_signal_saves_nothing_that_is_not_finite(tmp_path, before_step, what):
    """Within an epoch on a GPU nobody reads whether the gradients were finite; here it shows after the step's look."""
    session, kept, steps = tiny_session(), {}, []
    before_step(6, lambda step: steps.append(step) or (what == "statistics" and poison_statistics(step)))

    def on_step(number):
        if number == 6:
            kept.update(digest(tmp_path))
            if what == "gradient":
                steps[0].bad_step.fill_(6)
            session.interrupts.handle(signal.SIGTERM)

    words = {"gradient": r"step 6 \(epoch 2\)", "statistics": r"network\.\S+running_mean was not finite after step 6"}
    with pytest.raises(NonFiniteError, match=words[what]):
        train.run(session, tiny_config(), tmp_path, on_step=on_step)
    assert digest(tmp_path) == kept
    assert len(kept) == 2
    assert read_json(tmp_path / "summary.json")["exit_code"] == 5


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux only")
@pytest.mark.parametrize("step", [15, 9], ids=["within_an_epoch", "in_its_last_step"])
def test_a_killed_worker_is_a_line_with_advice(tmp_path, before_step, step):
    def kill(_):
        for worker in multiprocessing.active_children():
            worker.kill()
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the signal of its end has arrived

    before_step(step + 1, kill)
    session, config = tiny_session(tiny_dataset(200)), tiny_config(preprocess="once", workers=1)
    with pytest.raises(RunError, match=r"makes batches has ended: .*\) exited.*--resume auto.*workers=0"):
        train.run(session, config, tmp_path)
    assert read_json(tmp_path / "summary.json")["exit_code"] == 1
    saved = checkpoint.load(tmp_path)
    assert saved.step > step  # the step in which the worker ended is whole
    require_fit(session, saved, dataclasses.replace(config, workers=0))


def test_out_of_memory_names_a_batch_to_try(tmp_path, before_step):
    def greedy(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_step(7, greedy)
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
    original, full = checkpoint.save, 8

    def save(out, step, tensors, state):
        if step == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(out, step, tensors, state)

    monkeypatch.setattr(checkpoint, "save", save)
    train.run(tiny_session(), tiny_config(), tmp_path / "a")
    assert_same_run(whole, tmp_path / "a")
    assert re.search(r"warning: .*step 8.*No space left.*goes on", capsys.readouterr().err)
    full = 12
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


def with_steps(found, step, epochs):
    """The checkpoint at another step, with `epochs` rows of history, of data with two steps an epoch."""
    rows = [{**row, "step": 2 * row["epoch"]} for row in found.state.history[:epochs]]
    return dataclasses.replace(found, step=step, state=dataclasses.replace(found.state, history=rows))


def other_data(session):
    return tiny_session(tiny_dataset(71))


def four_ranks(session):
    return dataclasses.replace(session, ranks=Ranks(0, 4))


@pytest.mark.parametrize(
    ("changes", "other", "steps", "words"),
    [
        ({"widths": (8, 8, 16, 8)}, None, None, "widths"),
        ({"epochs": 6, "lr_epochs": (0, 1, 6)}, None, None, "epochs: 3 in the checkpoint, 6"),
        ({"seed": 5}, None, None, "seed"),
        ({"network": "resnet"}, None, None, "network"),
        ({}, other_data, None, r"other images than these \(synthetic: made in a test\); name its own"),
        ({}, four_ranks, None, "processes: 1 in the checkpoint, 4"),
        # A step that its run cannot have; with rows of the log, that much is seen as a checkpoint is loaded.
        ({}, None, (10**6, 0), r"checkpoint-00000012\.json: step"),
        ({}, None, (5, 0), r"checkpoint-00000012\.json: step"),
        ({}, None, (8, 3), r"checkpoint-00000012\.json: history"),
        ({"dtype": "bfloat16", "checkpoint_s": 9.0}, None, None, None),
    ],
    ids=["architecture", "schedule", "seed", "network", "data", "processes", "far_beyond", "history_empty",
         "longer_history", "what_may_differ"],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(whole, changes, other, steps, words):
    found, session = checkpoint.load(whole), tiny_session()
    found, session = with_steps(found, *steps) if steps else found, other(session) if other else session
    if words is None:
        require_fit(session, found, tiny_config(**changes))
    else:
        with pytest.raises(CheckpointError, match=words):
            require_fit(session, found, tiny_config(**changes))


def test_no_memory_is_taken_for_what_a_checkpoint_claims(whole):
    found = checkpoint.load(whole)
    huge = tiny_config(batch_size=10**9, epochs=10**5, lr_epochs=(0, 1, 10**5))
    assert train.evaluate(tiny_session(), huge, found)["test_accuracy"] == found.state.history[-1]["test_accuracy"]
    wide = tiny_config(widths=(65536,) * 4)
    with pytest.raises(CheckpointError, match=r"does not fit the network: .* and [0-9]+ more"):
        train.evaluate(tiny_session(), wide, found)
    found = dataclasses.replace(found, state=dataclasses.replace(found.state, config=wide))
    with pytest.raises(CheckpointError, match="does not fit the network"):
        require_fit(tiny_session(), found, wide)


def test_a_batch_of_more_images_than_there_are_is_refused(tmp_path):
    done = tiny(*RUN, tmp_path / "run", "--set", "batch_size=71")
    assert done.returncode == 2
    assert done.stderr == b"error: batch_size=71 is more than the 70 training images\n"


def test_evaluating_on_other_images_is_said(whole, capsys):
    found = checkpoint.load(whole)
    train.evaluate(tiny_session(), tiny_config(), found)
    assert "other images" not in capsys.readouterr().err
    train.evaluate(tiny_session(tiny_dataset(60)), tiny_config(), found)
    assert "was trained on other images than these (synthetic: made in a test)" in capsys.readouterr().err
