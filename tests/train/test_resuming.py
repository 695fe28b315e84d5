import functools
import re
import signal

import pytest
from runs import tiny_config, tiny_dataset, tiny_session
from train_runs import assert_same_run, digest, in_a_hurry, losses, stop_at

import train
from model import checkpoint
from model.evaluation import Evaluator
from model.interrupts import Interrupted
from model.trainer import Trainer
from profiling.output.files import read_json, read_jsonl

STEPS = 12

SUMMARY_KEYS = {
    "status", "preset", "data_identity", "device", "ops", "ops_requested", "epochs", "steps", "seed", "test_accuracy",
    "train_s", "eval_s", "train_plus_eval_s", "warmup_s", "wall_s", "images_per_s", "flops", "mfu", "v100_normalised",
    "peak_memory_bytes", "peak_reserved_bytes", "git_sha", "step", "step_requested",
}  # fmt: skip


def test_files_of_a_run(whole):
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


def test_runs_are_bit_equal_for_one_seed_only(whole, tmp_path):
    train.run(tiny_session(), tiny_config(), tmp_path / "a")
    assert_same_run(whole, tmp_path / "a")
    train.run(tiny_session(), tiny_config(seed=1), tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step in (1, 6, 12) else pytest.mark.slow) for step in range(1, STEPS + 1)]
)
def test_resuming_at_any_step_changes_no_bit(whole, tmp_path, step, monkeypatch):
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


PIPELINE = {"draw": "per_image", "workers": 1}


@pytest.mark.usefixtures("cpu_modes")
@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        (PIPELINE | {"preprocess": "once"}, (6,)),
        pytest.param(PIPELINE | {"preprocess": "every_epoch"}, (6,), marks=pytest.mark.slow),
        pytest.param({"step": "captured"}, (1, 6, 11), marks=pytest.mark.slow),
        pytest.param({"step": "compiled"}, (6,), marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else value)),
)
def test_resuming_in_each_pipeline_and_mode(whole, tmp_path, changes, stops):
    config, mode = tiny_config(**changes), changes.get("step", "eager")
    summary = train.run(tiny_session(), config, tmp_path / "whole")
    assert (summary["step"], summary["step_requested"]) == (mode, mode)
    assert mode == "eager" or summary["warmup_s"] > 0
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
