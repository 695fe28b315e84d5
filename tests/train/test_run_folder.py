import datetime
import os
import re

import pytest
from runs import tiny_config, tiny_dataset, tiny_session
from train_runs import RUN, tiny

import train
from model import folder
from profiling.output.files import read_json


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
        done = tiny(*RUN, tmp_path, "--resume", "auto")
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


def test_leftovers_of_a_killed_writer_are_cleared_by_the_next_run(tiny_here, tmp_path):
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
