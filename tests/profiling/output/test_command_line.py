import re
import sys
from pathlib import Path

import pytest
import typer

import experiments.__main__
import profiling.__main__
import train
from profiling.output import command_line

TRAIN, PROFILING, EXPERIMENTS = train.app, profiling.__main__.app, experiments.__main__.app
REFUSED = {
    "no_number": (TRAIN, "--epochs 1.5", "Invalid value for '--epochs': .*'1.5'.*"),
    "joined": (TRAIN, "--target-accuracy=94%", "Invalid value for '--target-accuracy': .*'94%'.*"),
    "unknown_option": (TRAIN, "--presett laptop", "No such option: --presett .*--preset.*"),
    "no_value": (TRAIN, "--preset laptop --out", "Option '--out' requires an argument"),
    "too_many": (PROFILING, "report a b", r"Got unexpected extra argument.* \(b\)"),
    "unknown_command": (PROFILING, "repor a", "No such command 'repor'.*"),
    "missing": (EXPERIMENTS, "tritons", "Missing argument '.*'"),
}
LONG = "a" * 300
TOO_LONG = {
    "train": (TRAIN, ["--synthetic", f"--out={LONG}"]),
    "profiling": (PROFILING, ["bench", "--compare", LONG]),
    "experiments": (EXPERIMENTS, ["lr-finder", "--synthetic", "--out", LONG]),
}
EMPTY = {
    "apart": (TRAIN, ["--out", "", "--synthetic"], "--out"),
    "joined": (PROFILING, ["collect", "runs/a", "--data-dir="], "--data-dir"),
    "argument": (PROFILING, ["report", ""], "an argument"),
}


def answer(monkeypatch, capsys, app, words):
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as end:
        command_line.run(app)
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize(("app", "words", "text"), REFUSED.values(), ids=REFUSED)
def test_what_typer_refuses_is_one_line(monkeypatch, capsys, app, words, text):
    code, out, err = answer(monkeypatch, capsys, app, words.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {text}; --help shows what there is\n", err), err


@pytest.mark.parametrize(("app", "words", "name"), EMPTY.values(), ids=EMPTY)
def test_an_empty_word_is_not_the_present_folder(monkeypatch, capsys, app, words, name):
    """As of a shell variable that is not set."""
    code, out, err = answer(monkeypatch, capsys, app, words)
    assert (code, out, err) == (2, "", f"error: {name} is empty; give it a value, or leave it out\n")


@pytest.mark.parametrize(("app", "words"), TOO_LONG.values(), ids=TOO_LONG)
def test_a_path_that_the_system_refuses_is_one_line(monkeypatch, capsys, app, words):
    code, out, err = answer(monkeypatch, capsys, app, words)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {LONG}: File name too long; name another path\n", err), err


def test_an_error_about_another_file_is_a_fault_of_the_program(monkeypatch, capsys):
    app = typer.Typer()

    @app.command()
    def faulty(path: str):
        Path("/nowhere/at/all").read_bytes()

    monkeypatch.setattr(sys, "argv", ["program", "/nowhere/else"])
    with pytest.raises(FileNotFoundError):
        command_line.run(app)
    assert answer(monkeypatch, capsys, app, ["/nowhere/at"])[0] == 2


@pytest.mark.parametrize("app", [PROFILING, EXPERIMENTS], ids=["profiling", "experiments"])
def test_without_a_word_there_is_help(monkeypatch, capsys, app):
    code, out, err = answer(monkeypatch, capsys, app, [])
    assert code in (0, 2)  # click 8.1 says 0
    assert "Usage: " in out + err
    assert "error: " not in out + err


@pytest.mark.parametrize("app", [TRAIN, PROFILING, EXPERIMENTS], ids=["train", "profiling", "experiments"])
def test_help_fits_a_terminal(monkeypatch, capsys, app):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = answer(monkeypatch, capsys, app, ["-h"])
    assert (code, err) == (0, "")
    assert "..." not in out.replace("[ARGS]...", "")


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    app = typer.Typer()

    @app.command()
    def interrupted():
        raise KeyboardInterrupt

    assert answer(monkeypatch, capsys, app, []) == (130, "", "")
