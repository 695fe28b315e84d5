import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from train_runs import invoke, nowhere

from model.config import Config
from model.presets import PRESETS
from profiling import ROOT


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


def test_help_and_version():
    assert "--list-settings" in invoke("-h").output
    assert re.fullmatch(r"train-your-resnet \d+\.\d+\.\d+, commit \w+\n", invoke("--version").output)


def test_the_list_names_every_preset():
    result = invoke("--list")
    assert result.exit_code == 0
    assert all(name in result.output for name in PRESETS)
    assert json.loads(invoke("--list", "--json").output)["article-256"]["batch_size"] == 512


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
