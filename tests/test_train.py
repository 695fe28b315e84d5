import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from emulation import EmulatedGraphs
from runs import final_tensors, tiny_config, tiny_dataset, tiny_session
from typer.testing import CliRunner

import train
from model import checkpoint, folder
from model.config import Config
from model.distributed import Ranks
from model.errors import CheckpointError, DeviceError, NonFiniteError, OutOfMemoryError, RunError, TargetMissedError
from model.evaluation import Evaluator
from model.interrupts import Interrupted
from model.presets import PRESETS
from model.session import require_fit
from model.step import TrainingStep
from model.trainer import Trainer
from profiling import ROOT
from profiling.output.files import read_json, read_jsonl

STEPS = 12

SUMMARY_KEYS = {
    "status", "preset", "data_identity", "device", "ops", "ops_requested", "epochs", "steps", "seed", "test_accuracy",
    "train_s", "eval_s", "train_plus_eval_s", "warmup_s", "wall_s", "images_per_s", "flops", "mfu", "v100_normalised",
    "peak_memory_bytes", "peak_reserved_bytes", "git_sha", "step", "step_requested",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped: its folder."""
    out = tmp_path_factory.mktemp("whole")
    train.run(tiny_session(), tiny_config(), out)
    return out


def losses(out: Path) -> list[tuple]:
    names = ("epoch", "step", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return [tuple(row[name] for name in names) for row in read_jsonl(out / "log.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, statistics, momentum, sums, and every figure of the log that is not a time."""
    left, right = final_tensors(a), final_tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert losses(a) == losses(b)


def digest(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("checkpoint-*"))}


# What a run leaves


def test_a_run_s_folder(whole):
    summary = read_json(whole / "summary.json")
    assert set(summary) >= SUMMARY_KEYS
    assert all(not isinstance(v, dict | list) for v in summary.values()), "flat"
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("complete", 3, STEPS)
    assert summary["flops"] > 0
    assert summary["train_plus_eval_s"] == summary["train_s"] + summary["eval_s"] <= summary["wall_s"]
    assert read_json(whole / "config.json") == tiny_config().to_json()
    assert read_json(whole / "environment.json")["packages"]["torch"]
    assert len(read_jsonl(whole / "log.jsonl")) == 3
    assert len((whole / "dawnbench.tsv").read_text().splitlines()) == 4
    assert len(digest(whole)) == 4  # two checkpoints of two files


def test_two_runs_of_a_seed_are_bit_equal_and_of_two_seeds_are_not(whole, tmp_path):
    train.run(tiny_session(), tiny_config(), tmp_path / "a")
    assert_same_run(whole, tmp_path / "a")
    train.run(tiny_session(), tiny_config(seed=1), tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


# Stopping and going on


def in_a_hurry(session, monkeypatch):
    """SIGTERM, after which nothing may wait: whoever sends it soon sends SIGKILL."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    session.interrupts.handle(signal.SIGTERM)


def stop_at(session, step, stop=lambda session: session.interrupts.handle(signal.SIGTERM)):
    def on_step(number):
        if number == step:
            stop(session)

    return on_step


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resuming_at_any_step_is_as_if_it_had_never_stopped(whole, tmp_path, step, monkeypatch):
    session = tiny_session()
    with monkeypatch.context() as patch:
        on_step = stop_at(session, step, functools.partial(in_a_hurry, monkeypatch=patch))
        with pytest.raises(Interrupted) as stopped:
            train.run(session, tiny_config(), tmp_path, on_step=on_step)
    assert stopped.value.exit_code == 143
    left = read_json(tmp_path / "summary.json")
    assert (left["status"], left["exit_code"], left["steps"]) == ("interrupted", 143, step)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found.step == step
    train.run(tiny_session(), tiny_config(), tmp_path, found)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("preprocess", ["once", "every_epoch"])
def test_resuming_inside_an_epoch_of_the_article_s_pipelines(tmp_path, preprocess):
    config = tiny_config(preprocess=preprocess, draw="per_image", workers=1)
    train.run(tiny_session(), config, tmp_path / "whole")
    session = tiny_session()
    with pytest.raises(Interrupted):
        train.run(session, config, tmp_path / "parts", on_step=stop_at(session, 6))
    train.run(tiny_session(), config, tmp_path / "parts", checkpoint.load(tmp_path / "parts"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def cpu_modes(monkeypatch):
    """Steps of every mode on a CPU: CUDA graphs emulated, a compiler that compiles nothing."""
    monkeypatch.setattr("model.capture.recorder", lambda device: EmulatedGraphs())
    monkeypatch.setattr("model.step.COMPILER", "aot_eager")
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("cpu_modes")
@pytest.mark.parametrize(("mode", "stops"), [("captured", (1, 6, 11)), ("compiled", (6,))])
def test_resuming_inside_an_epoch_in_every_mode(whole, tmp_path, mode, stops):
    config = tiny_config(step=mode)
    summary = train.run(tiny_session(), config, tmp_path / "whole")
    assert (summary["step"], summary["step_requested"]) == (mode, mode)
    assert summary["warmup_s"] > 0
    for stop in stops:
        session, out = tiny_session(), tmp_path / str(stop)
        with pytest.raises(Interrupted):
            train.run(session, config, out, on_step=stop_at(session, stop))
        train.run(tiny_session(), config, out, checkpoint.load(out))
        assert_same_run(tmp_path / "whole", out)
    if mode == "captured":
        assert_same_run(whole, tmp_path / "whole")


def test_a_step_that_cannot_be_captured_is_in_the_summary(whole, tmp_path, capsys):
    summary = train.run(tiny_session(), tiny_config(step="captured"), tmp_path)
    assert (summary["status"], summary["step"], summary["step_requested"]) == ("complete", "eager", "captured")
    assert re.search("warning: the training step runs eagerly, not captured: .* CUDA GPU", capsys.readouterr().err)
    assert_same_run(whole, tmp_path)


def test_a_signal_while_testing_ends_the_run_after_that_batch(tmp_path, monkeypatch):
    session, original, batches = tiny_session(tiny_dataset(20, 1100)), Evaluator._batch, []

    def batch(self, size):
        original(self, size)
        batches.append(size)
        if len(batches) == 2:
            in_a_hurry(session, monkeypatch)

    monkeypatch.setattr(Evaluator, "_batch", batch)
    with pytest.raises(Interrupted):
        train.run(session, tiny_config(), tmp_path)
    assert batches == [500, 500]


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_stopped_between_an_epoch_s_end_and_its_evaluation(whole, tmp_path, monkeypatch, how):
    session, original, calls = tiny_session(), Trainer.evaluate, []

    def evaluate(self, on_batch):
        calls.append(self.step.number)
        if len(calls) == 2:
            if how == "crash":
                raise ConnectionError("the machine is gone")
            session.interrupts.handle(signal.SIGTERM)
        return original(self, on_batch)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises((Interrupted, ConnectionError)):
        train.run(session, tiny_config(), tmp_path)
    found = checkpoint.load(tmp_path)
    assert found.step == (8 if how == "signal" else 4)
    train.run(tiny_session(), tiny_config(), tmp_path, found)
    assert_same_run(whole, tmp_path)


def test_a_complete_run_resumed_has_nothing_to_do(whole, tmp_path):
    train.run(tiny_session(), tiny_config(), tmp_path)
    before = digest(tmp_path)
    summary = train.run(tiny_session(), tiny_config(), tmp_path, checkpoint.load(tmp_path))
    assert summary["status"] == "complete"
    assert digest(tmp_path) == before
    assert_same_run(whole, tmp_path)


def test_times_of_all_sessions_count(tmp_path):
    session = tiny_session()
    with pytest.raises(Interrupted):
        train.run(session, tiny_config(), tmp_path, on_step=stop_at(session, 7))
    before = read_json(tmp_path / "summary.json")
    after = train.run(tiny_session(), tiny_config(), tmp_path, checkpoint.load(tmp_path))
    assert after["train_s"] > before["train_s"]
    assert after["images_per_s"] < 210 / before["train_s"]


# Failures


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


# Several runs


def test_several_runs_and_their_claim(whole, tmp_path):
    summary = train.repeat(tiny_session(), tiny_config(), tmp_path, 2, target=None, resume=False)
    assert_same_run(whole, tmp_path / "run-000")
    assert (summary["runs"], summary["seeds"]) == (2, [0, 1])
    each = [read_json(tmp_path / f"run-00{i}" / "summary.json")["test_accuracy"] for i in (0, 1)]
    assert summary["test_accuracy"] == pytest.approx(sum(each) / 2)
    assert summary == read_json(tmp_path / "summary.json")
    with pytest.raises(TargetMissedError):
        train.repeat(tiny_session(), tiny_config(), tmp_path / "b", 1, target=0.99, resume=False)
    assert read_json(tmp_path / "b" / "summary.json")["exit_code"] == 7


def test_several_runs_leave_their_figures_when_one_is_killed(tmp_path, monkeypatch):
    """Each run's as soon as it has them."""
    original, session = train.run, tiny_session()

    def killed(session, config, *arguments, **options):
        if config.seed == 2:
            raise SystemExit(137)
        return original(session, config, *arguments, **options)

    monkeypatch.setattr(train, "run", killed)
    with pytest.raises(SystemExit):
        train.repeat(session, tiny_config(), tmp_path, 3, target=None, resume=False)
    left = read_json(tmp_path / "summary.json")
    assert (left["status"], left["runs"], left["runs_requested"], left["seeds"]) == ("unfinished", 2, 3, [0, 1])


@pytest.mark.parametrize(("identity", "counted"), [("official", 0.94), ("copy", None), ("synthetic", None)])
def test_94_percent_is_of_the_official_images(tmp_path, identity, counted):
    session = tiny_session(dataclasses.replace(tiny_dataset(), identity=identity))
    summary = train.repeat(session, tiny_config(), tmp_path / "a", 1, target=None, resume=False)
    assert summary["target_accuracy"] == counted
    assert train.repeat(session, tiny_config(), tmp_path / "b", 1, 0.01, resume=False)["target_accuracy"] == 0.01


@pytest.mark.usefixtures("cpu_modes")
def test_the_peak_of_memory_is_forgotten_after_each_warm_up(tmp_path, monkeypatch):
    """It is the training's: what a search for algorithms or an earlier run took is not part of it."""
    order, warm_up, steps = [], Trainer.warm_up, TrainingStep.__call__
    monkeypatch.setattr(Trainer, "warm_up", lambda self, say: order.append("warm-up") or warm_up(self, say))
    monkeypatch.setattr("model.memory.forget_peak", lambda device: order.append("forget"))
    monkeypatch.setattr("model.memory.peak", lambda device, recorded: order.append("peak") or (7, 9))
    monkeypatch.setattr(TrainingStep, "__call__", lambda self, *batch: order.append("step") or steps(self, *batch))
    train.repeat(tiny_session(), tiny_config(step="captured"), tmp_path, 2, target=None, resume=False)
    assert order == ["warm-up", "forget", *["step"] * STEPS, "peak"] * 2
    summary = read_json(tmp_path / "run-001" / "summary.json")
    assert (summary["peak_memory_bytes"], summary["peak_reserved_bytes"]) == (7, 9)


def test_several_runs_go_on_where_they_stopped(tmp_path):
    train.repeat(tiny_session(), tiny_config(), tmp_path / "whole", 2, None, resume=False)
    session = tiny_session()
    train.run(session, tiny_config(), tmp_path / "parts" / "run-000")
    with pytest.raises(Interrupted):
        train.run(session, tiny_config(seed=1), tmp_path / "parts" / "run-001", on_step=stop_at(session, 5))
    before = digest(tmp_path / "parts" / "run-000")
    train.repeat(tiny_session(), tiny_config(), tmp_path / "parts", 2, None, resume=True)
    assert digest(tmp_path / "parts" / "run-000") == before
    for name in ("run-000", "run-001"):
        assert_same_run(tmp_path / "whole" / name, tmp_path / "parts" / name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text("[" * 200_000),
        lambda path: path.write_text('{"status": "complete"}'),
        lambda path: (path.unlink(), path.symlink_to("/dev/null")),
        *(
            lambda path, change=change: path.write_text(json.dumps(read_json(path) | change))
            for change in (
                {"test_accuracy": "good"},
                {"test_accuracy": 3},
                {"train_s": None},
                {"train_s": True},
                {"epochs": -1},
                {"peak_memory_bytes": "much"},
                {"git_sha": ["x"]},
                {"seed": 7},
                {"steps": 8},
                {"status": None},
            )
        ),
    ],
)
def test_a_damaged_summary_among_several_runs_is_written_anew(whole, tmp_path, capsys, damage):
    shutil.copytree(whole, tmp_path / "run-000")
    path = tmp_path / "run-000" / "summary.json"
    damage(path)
    together = train.repeat(tiny_session(), tiny_config(), tmp_path, 1, None, resume=True)
    again = read_json(path)
    assert (again["status"], again["seed"], again["steps"]) == ("complete", 0, STEPS)
    assert together["test_accuracy"] == again["test_accuracy"] == read_json(whole / "summary.json")["test_accuracy"]
    assert "summary.json" in capsys.readouterr().err


# The command line


def invoke(*arguments: str):
    return CliRunner().invoke(train.app, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "articl-256"], "article-256"),
        (["--set", "batchsize=4"], "batch_size"),
        (["--set", "batch_size=-4"], "at least 1"),
        (["--epochs", "0"], "epochs=0"),
        (["--set", "lr_values=nan,0,0"], "finite"),
        (["--synthetic", "--data-dir", "x"], "contradict"),
        (["--synthetic", "--download"], "contradict"),
        (["--runs", "0"], "--runs 0"),
        (["--target-accuracy", "94"], "0.94"),
        (["--resume", "auto"], "--out"),
        (["--runs", "2", "--resume", "x"], "--resume auto"),
        (["--evaluate", "x", "--epochs", "3"], "leave out"),
        (["--out", "pyproject.toml"], "not a folder"),
        (["--out", "tests"], "not empty"),
        (["--seed", "-1"], "seed"),
        (["--set", "preset=resnet9"], "a preset is no setting: give --preset resnet9"),
        (["--preset", ""], "unknown preset ''"),
        (["--list", "--preset", "nope"], "unknown preset 'nope'"),
        (["--epochs", "10", "--set", "epochs=5"], "--epochs and --set epochs= contradict each other"),
        (["--seed", "1", "--set", "seed=2"], "contradict"),
        (["--batch-size", "64", "--set", "batch_size=32"], "given twice"),
        (["--lr", "0.1", "--set", "lr_values=0,1,0"], "lr and lr_values contradict each other"),
        (["--profile", "--ceilings", "none.json"], "none.json does not exist"),
        (["--epochs", "three"], "--epochs"),
        (["--no-such-option"], "no-such-option"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else "",
)
def test_usage_errors_exit_2_in_one_line(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert sum(line.lower().startswith("error:") for line in result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x"}, "RANK='x' in the environment is no whole number; unset it"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE='x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 in the environment is not below WORLD_SIZE=0"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, dict) else "",
)
def test_an_environment_that_is_not_torchrun_s_exits_2(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = invoke("--synthetic")
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.count("\n") == 1


def test_arguments_are_read_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("import os; os._exit(99)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments, expected in [
        (["--list"], 0),
        (["--set", "batchsize=4"], 2),
        (["--out", "tests"], 2),
        (["--resume", "none.json"], 8),
        (["--evaluate", "none"], 8),
        (["--data-dir", "none"], 3),
        (["--synthetic"], 99),
    ]:
        command = [sys.executable, "train.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == expected, (arguments, done.stderr)


def test_every_setting_is_documented():
    shown = invoke("--list-settings", "--preset", "article-256", "--lr", "0.2", "--batch-size", "64").output
    fields = [f.name for f in dataclasses.fields(Config) if f.name != "preset"]
    assert [line.partition("=")[0] for line in shown.splitlines()] == [*fields, "lr"]
    assert all(len(line.split()) > 1 for line in shown.splitlines())
    assert {"lr_values=0,0.2,0.00227273,0", "batch_size=64"} <= {line.split()[0] for line in shown.splitlines()}


def test_what_people_type_for_help_and_the_version():
    assert "--list-settings" in invoke("-h").output
    assert re.fullmatch(r"train-your-resnet \d+\.\d+\.\d+, commit \w+\n", invoke("--version").output)


def test_the_list_names_every_preset():
    result = invoke("--list")
    assert result.exit_code == 0
    assert all(name in result.output for name in PRESETS)
    assert json.loads(invoke("--list", "--json").output)["article-256"]["batch_size"] == 512


def nowhere(how: str):
    """What takes nothing: a "pipe" whose reader has gone, or a "disk" that is full."""
    if how == "disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("needs /dev/full")
        return open("/dev/full", "w")
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize(("how", "arguments"), [("pipe", ["--list"]), ("disk", ["--list", "--json"])])
def test_the_list_may_find_no_reader(how, arguments):
    with nowhere(how) as stdout:
        command = [sys.executable, ROOT / "train.py", *arguments]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_wrong_data_exits_3(tmp_path):
    result = invoke("--data-dir", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 3
    assert str(tmp_path) in result.output
    assert "--download" in result.output


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels need triton")
def test_training_on_the_fused_kernels_is_training(tmp_path):
    """A run of `ops=fused` ends where the reference's does, and either's checkpoint goes on in the other."""
    data = tiny_dataset(16, 10)
    config = tiny_config(widths=(16, 16, 16, 16), batch_size=8, epochs=1, lr_epochs=(0, 0.5, 1), lr_values=(0, 0.02, 0))
    fused_config = dataclasses.replace(config, ops="fused")
    session = tiny_session(data)
    with pytest.raises(Interrupted):
        train.run(session, config, tmp_path / "reference", on_step=stop_at(session, 1))
    found = checkpoint.load(tmp_path / "reference")
    expected = train.run(tiny_session(data), config, tmp_path / "reference", found)
    require_fit(tiny_session(data), found, fused_config)
    fused = train.run(tiny_session(data), fused_config, tmp_path / "fused", found)
    assert (fused["ops"], fused["ops_requested"]) == ("fused", "fused")
    assert fused["triton_conv_share"] > 0.9
    for name in ("train_loss", "test_loss"):
        assert fused[name] == pytest.approx(expected[name], rel=1e-4)
    left, right = final_tensors(tmp_path / "reference"), final_tensors(tmp_path / "fused")
    assert left.keys() == right.keys()
    back = train.evaluate(tiny_session(data), config, checkpoint.load(tmp_path / "fused"))
    assert back["test_loss"] == pytest.approx(fused["test_loss"], rel=1e-4)


NO_KERNELS = {"TRITON_INTERPRET": "0"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run here")
def test_a_preset_falls_back_to_the_reference_ops_and_says_so(tmp_path):
    widths = ("--set", "widths=16,16,16,16")
    done = tiny("--preset", "fused", *widths, "--json", "--out", str(tmp_path / "run"), env=NO_KERNELS)
    assert done.returncode == 0, done.stderr
    assert b"REFERENCE OPS, NOT TRITON" in done.stderr
    summary = json.loads(done.stdout)
    assert (summary["ops"], summary["ops_requested"], summary["triton_conv_share"]) == ("reference", "fused", 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run here")
@pytest.mark.parametrize("ops", ["batchnorm", "composed", "fused"])
def test_kernels_asked_for_by_name_never_fall_back(tmp_path, ops):
    done = tiny("--set", f"ops={ops}", "--set", "widths=16,16,16,16", "--out", str(tmp_path / "run"), env=NO_KERNELS)
    assert done.returncode == 4
    assert f"ops={ops} cannot run here".encode() in done.stderr
    assert b"ops=reference" in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_kernels_that_are_refused_are_as_good_as_absent(tmp_path, monkeypatch):
    monkeypatch.setattr("model.verdict.refusal", lambda *_: "bn_apply is wrong")
    config = tiny_config(ops="batchnorm")
    summary = train.run(tiny_session(), config, tmp_path / "falls_back")
    assert (summary["status"], summary["ops"], summary["ops_requested"]) == ("complete", "reference", "batchnorm")
    with pytest.raises(DeviceError, match="ops=batchnorm cannot run here: bn_apply is wrong; use --set") as error:
        train.run(tiny_session(), config, tmp_path / "insists", require_ops=True)
    assert error.value.exit_code == 4
    assert not (tmp_path / "insists").exists()


def test_an_absent_device_exits_4(tmp_path):
    result = invoke("--set", "device=cuda:99", "--out", str(tmp_path / "out"))
    assert result.exit_code == 4
    assert "cuda:99" in result.output


def tiny(*arguments: str, fault: str = "", **kwargs) -> subprocess.CompletedProcess:
    """The program as users run it, but on the tiny data."""
    env = {**os.environ, "FAULT": fault, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "runs.py"),
        "--preset",
        "laptop",
        "--epochs",
        "3",
        *arguments,
    ]
    return subprocess.run(command, env=env, capture_output=True, timeout=120, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by the command line: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, tiny("--json", "--out", str(out))


def test_json_prints_exactly_the_summary(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_json(out / "summary.json")
    assert b"test accuracy" in done.stderr


def test_json_prints_the_summary_of_a_failure_too(tmp_path):
    done = tiny("--json", "--out", str(tmp_path / "run"), "--target-accuracy", "0.999")
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout) == read_json(tmp_path / "run" / "summary.json")
    assert json.loads(done.stdout)["exit_code"] == 7
    assert done.stderr.endswith(b"below the target of 99.90%\n")


@pytest.mark.parametrize("place", ["data", "preprocessing", "step", "evaluation", "save"])
def test_sigterm_anywhere_keeps_what_was_done(finished, tmp_path, place):
    done = tiny("--out", str(tmp_path / "run"), fault=f"TERM@{place}")
    assert done.returncode == 143, done.stderr
    assert b"Traceback" not in done.stderr
    again = tiny("--out", str(tmp_path / "run"), "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_the_end_of_the_terminal_finishes_the_step_and_saves(tmp_path, not_under_nohup):
    done = tiny("--out", str(tmp_path / "run"), fault="HUP@step")
    assert done.returncode == 129
    assert checkpoint.load(tmp_path / "run").step == 5


def test_sigint_once_finishes_the_step_and_saves(finished, tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="INT@step")
    assert done.returncode == 130
    assert done.stderr.strip() == b"SIGINT: finishing this step, then saving; once more stops at once, unsaved"
    assert checkpoint.load(tmp_path / "run").step == 5
    again = tiny("--resume", str(tmp_path / "run" / "checkpoint-00000005.json"))
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_what_a_stopped_run_says_to_type_goes_on_with_it(finished, tmp_path):
    """The data is named again: without, the program would look for other images first."""
    done = tiny("--out", str(tmp_path / "run"), fault="INT@step")
    said = re.search("stopped; go on with: python train.py (.*)", done.stdout.decode().replace("\n", " "))[1]
    assert said.split() == ["--out", str(tmp_path / "run"), "--resume", "auto", "--synthetic"]
    again = tiny(*said.split())
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_sigint_twice_ends_at_once(finished, tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="INT,INT@step")
    assert done.returncode == 130
    assert b"Traceback" not in done.stderr
    assert checkpoint.load(tmp_path / "run").step == 4
    assert tiny("--out", str(tmp_path / "run"), "--resume", "auto").returncode == 0
    assert_same_run(finished[0], tmp_path / "run")


def test_sigint_twice_in_a_save_corrupts_nothing(tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="INT,INT@save")
    assert done.returncode == 130
    again = tiny("--out", str(tmp_path / "run"), "--resume", "auto")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"COLUMNS": "20"},
        {"NO_COLOR": "1", "TERM": "dumb"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ],
    ids=["narrow", "no_colour", "ascii"],
)
def test_odd_terminals(tmp_path, env):
    done = tiny("--out", str(tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"test accuracy" in done.stdout.replace(b"\n", b" ")


@pytest.mark.parametrize(("how", "arguments"), [("pipe", []), ("disk", ["--json"])])
def test_output_that_cannot_be_written_does_not_end_the_training(tmp_path, how, arguments):
    """People's and scripts': with --json the former is on stderr, which shares the disk."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        ROOT / "tests" / "support" / "runs.py",
        "--preset",
        "laptop",
        "--out",
        tmp_path / "run",
        *arguments,
    ]
    with nowhere(how) as output:
        stderr = output if arguments else subprocess.PIPE
        done = subprocess.run(command, env=env, stdout=output, stderr=stderr, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "complete"


def test_resuming_without_a_preset_takes_the_checkpoint_s(finished, tmp_path):
    done = tiny("--out", str(tmp_path / "run"), fault="TERM@step")
    assert done.returncode == 143
    command = [sys.executable, ROOT / "tests" / "support" / "runs.py", "--out", tmp_path / "run", "--resume", "auto"]
    again = subprocess.run(command, env={**os.environ, "FAULT": "", "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert_same_run(finished[0], tmp_path / "run")


def test_evaluate_a_checkpoint(finished):
    out, _ = finished
    command = [sys.executable, ROOT / "tests" / "support" / "runs.py", "--evaluate", out, "--json"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["test_accuracy"] == pytest.approx(read_json(out / "summary.json")["test_accuracy"])
    assert "test_accuracy_airplane" in summary
    assert b"truck" in done.stderr
    done = subprocess.run(
        [*command, "--target-accuracy", "1"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["status"] == "target missed"
    assert done.stderr.endswith(b"is below the target of 100.00%\n")


def test_evaluating_weights_that_are_not_finite_exits_5(finished, tmp_path, tiny_here):
    found = checkpoint.load(finished[0])
    found.tensors["network.linear.weight"][0, 0] = float("nan")
    checkpoint.save(tmp_path, found.step, found.tensors, found.state)
    result = CliRunner().invoke(train.app, ["--evaluate", str(tmp_path), "--json"])
    assert result.exit_code == 5
    summary = json.loads(result.stdout)
    assert (summary["status"], summary["exit_code"]) == ("non-finite", 5)
    assert summary["test_loss"] is summary["test_accuracy"] is summary["test_accuracy_cat"] is None
    assert "the test loss of" in result.stderr


@pytest.mark.parametrize("option", ["--resume", "--evaluate"])
def test_a_pickle_is_refused_with_8(tmp_path, option, monkeypatch):
    import pickle

    class Payload:
        """Runs when unpickled."""

        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Payload()))
    monkeypatch.setattr("model.data.cifar10.load", lambda *a, **k: tiny_dataset())
    result = invoke(option, str(path))
    assert result.exit_code == 8
    assert "model.pt" in result.output
    assert not (tmp_path / "executed").exists()


def test_branching_off_needs_another_folder(finished, tmp_path, monkeypatch):
    out, _ = finished
    monkeypatch.setattr("model.data.cifar10.load", lambda *a, **k: tiny_dataset())
    result = invoke("--resume", str(out / "checkpoint-00000008.json"))
    assert result.exit_code == 8
    assert "later checkpoint" in result.output
    result = invoke("--resume", str(out / "checkpoint-00000008.json"), "--out", str(tmp_path / "branch"))
    assert result.exit_code == 0, result.output
    assert_same_run(out, tmp_path / "branch")


# A run's folder


@pytest.fixture
def tiny_here(monkeypatch):
    """`train.py` in this process, on the tiny data, for an epoch: `tiny_here(*arguments)`."""
    monkeypatch.setattr("model.data.cifar10.load", lambda *a, **k: tiny_dataset())
    monkeypatch.setattr(train.Interrupts, "install", lambda self: None)  # pytest's handlers stay
    settings = [f"--set={name}={value}" for name, value in {"widths": "8,8,16,16", "batch_size": 20}.items()]
    return lambda *arguments: invoke("--epochs", "1", *settings, *arguments)


def test_two_runs_of_one_second_have_a_folder_each(tiny_here, tmp_path, monkeypatch):
    class Frozen(datetime.datetime):
        """Says the same time whenever it is asked."""

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(train.datetime, "datetime", Frozen)
    monkeypatch.chdir(tmp_path)
    for seed in "01":
        assert tiny_here("--preset", "laptop", "--seed", seed).exit_code == 0
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["20260102-030405-laptop", "20260102-030405-laptop-2"]
    assert [read_json(run / "config.json")["seed"] for run in runs] == [0, 1]


def test_a_second_process_is_refused_and_named_the_first(tmp_path):
    with folder.hold(tmp_path, pytest.fail):
        done = tiny("--out", str(tmp_path), "--resume", "auto")
        assert folder.is_empty(tmp_path)
    assert done.returncode == 2
    assert re.search(f"error: .* is in use by process {os.getpid()} on .* since 20", done.stderr.decode())


def test_a_folder_that_was_filled_meanwhile_is_refused(tiny_here, tmp_path, monkeypatch):
    """Between the look at the arguments and the lock another run may have begun and ended."""

    def load(*args, **options):
        train.run(tiny_session(), tiny_config(), tmp_path)
        return tiny_dataset()

    monkeypatch.setattr("model.data.cifar10.load", load)
    result = tiny_here("--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is not empty" in result.output
    assert read_json(tmp_path / "summary.json")["epochs"] == 3


def test_what_a_killed_writer_left_is_cleared_when_the_folder_s_next_run_begins(tiny_here, tmp_path):
    for path in (tmp_path, tmp_path / "run-000"):
        path.mkdir(exist_ok=True)
        (path / ".tmp-12345678.safetensors").touch()
    assert tiny_here("--out", str(tmp_path), "--resume", "auto", "--runs", "1").exit_code == 0
    assert not list(tmp_path.glob(".tmp-*"))
    assert tiny_here("--out", str(tmp_path), "--resume", "auto", "--runs", "2").exit_code == 0
    assert not list(tmp_path.rglob(".tmp-*"))


def test_nothing_is_made_or_cleared_for_a_checkpoint_that_is_missing(tiny_here, tmp_path):
    result = tiny_here("--resume", str(tmp_path / "new" / "checkpoint-00000001.json"))
    assert result.exit_code == 8
    (tmp_path / ".tmp-12345678.json").touch()
    assert tiny_here("--resume", str(tmp_path / "checkpoint-00000001.json")).exit_code == 8
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-12345678.json"]


# Signals before a run and after its launcher


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("module", "said"), [("typer", b""), ("torch", b"loading PyTorch and the images ...\n")])
def test_ctrl_c_during_the_imports_leaves_in_silence(tmp_path, module, said):
    (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "train.py", "--synthetic", "--out", tmp_path / "run"]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, said, b"")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_profiled_pass_ends_when_its_parent_is_killed(finished):
    """It would wait for ever."""
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        code,
        sys.executable,
        ROOT / "tests" / "support" / "runs.py",
        "--profile-pass",
        finished[0],
    ]
    done = subprocess.run(
        command, env={**os.environ, "FAULT": "ORPHAN@data", "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120
    )  # until the pass has closed its output
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == b""


def test_no_data_and_no_network_trains_on_synthetic_images(tmp_path):
    """The whole program, as a newcomer meets it, with one epoch of a very narrow network."""
    env = {**os.environ, "CIFAR10_MIRRORS": "off", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", "--epochs", "1", "--set", "widths=8,8,8,8", "--json"]
    start_s = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"SYNTHETIC IMAGES" in done.stderr
    summary = json.loads(done.stdout)
    assert summary["data_identity"] == "synthetic"
    assert summary["preset"] == "laptop"
    assert 0 < summary["wall_s"] <= time.monotonic() - start_s
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_json(folder / "summary.json") == summary
