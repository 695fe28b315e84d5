import dataclasses
import json
import shutil

import pytest
from runs import tiny_config, tiny_dataset, tiny_session
from train_runs import assert_same_run, digest, stop_at

import train
from model.errors import TargetMissedError
from model.interrupts import Interrupted
from model.step import TrainingStep
from model.trainer import Trainer
from profiling.output.files import read_json

STEPS = 12


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
    if identity == "synthetic":
        assert train.repeat(session, tiny_config(), tmp_path / "b", 1, 0.01, resume=False)["target_accuracy"] == 0.01


@pytest.mark.usefixtures("cpu_modes")
def test_the_peak_of_memory_is_forgotten_after_each_warm_up(tmp_path, monkeypatch):
    """It is the training's: what a search for algorithms or an earlier run took is not part of it."""
    order, warm_up, steps = [], Trainer.warm_up, TrainingStep.__call__
    monkeypatch.setattr(Trainer, "warm_up", lambda self, say: order.append("warm-up") or warm_up(self, say))
    monkeypatch.setattr("model.session.forget_peak", lambda device: order.append("forget"))
    monkeypatch.setattr("train.peak", lambda device, recorded: order.append("peak") or (7, 9))
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
