"""Every refusal of a command line is one line and an exit code, in all three programs."""

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
LONG = "a" * 300
HELP, EMPTY = "; --help shows what there is", "is empty; give it a value, or leave it out"
REFUSED = [
    (TRAIN, ["--epochs", "1.5"], f"Invalid value for '--epochs': .*'1.5'.*{HELP}"),
    (TRAIN, ["--target-accuracy=94%"], f"Invalid value for '--target-accuracy': .*'94%'.*{HELP}"),
    (TRAIN, ["--presett", "laptop"], f"No such option: --presett .*--preset.*{HELP}"),
    (TRAIN, ["--preset", "laptop", "--out"], f"Option '--out' requires an argument{HELP}"),
    (PROFILING, ["report", "a", "b"], rf"Got unexpected extra argument.* \(b\){HELP}"),
    (PROFILING, ["repor", "a"], f"No such command 'repor'.*{HELP}"),
    (EXPERIMENTS, ["tritons"], f"Missing argument '.*'{HELP}"),
    # As of a shell variable that is not set; it must not mean the present folder.
    (TRAIN, ["--out", "", "--synthetic"], f"--out {EMPTY}"),
    (PROFILING, ["collect", "runs/a", "--data-dir="], f"--data-dir {EMPTY}"),
    (PROFILING, ["report", ""], f"an argument {EMPTY}"),
    (TRAIN, ["--synthetic", f"--out={LONG}"], f"{LONG}: File name too long; name another path"),
    (PROFILING, ["bench", "--compare", LONG], f"{LONG}: File name too long; name another path"),
    (EXPERIMENTS, ["lr-finder", "--synthetic", "--out", LONG], f"{LONG}: File name too long; name another path"),
]


def answer(monkeypatch, capsys, app, words):
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as end:
        command_line.run(app)
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize(
    ("app", "words", "line"), REFUSED, ids=[" ".join(words).replace(LONG, "LONG") for _, words, _ in REFUSED]
)
def test_a_refusal_is_one_line(monkeypatch, capsys, app, words, line):
    code, out, err = answer(monkeypatch, capsys, app, words)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {line}\n", err), err


def app_that(raises) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def only(path: str = ""):
        raises()

    return app


def test_an_error_about_another_file_is_a_fault_of_the_program_and_ctrl_c_is_no_traceback(monkeypatch, capsys):
    faulty = app_that(lambda: Path("/nowhere/at/all").read_bytes())
    with pytest.raises(FileNotFoundError):
        answer(monkeypatch, capsys, faulty, ["--path", "/nowhere/else"])
    refused = answer(monkeypatch, capsys, faulty, ["--path", "/nowhere/at"])
    assert refused == (2, "", "error: /nowhere/at/all: No such file or directory; name another path\n")

    def interrupt():
        raise KeyboardInterrupt

    assert answer(monkeypatch, capsys, app_that(interrupt), []) == (130, "", "")


@pytest.mark.parametrize("app", [TRAIN, PROFILING, EXPERIMENTS], ids=["train", "profiling", "experiments"])
def test_help_fits_a_terminal_and_stands_for_no_word(monkeypatch, capsys, app):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = answer(monkeypatch, capsys, app, ["-h"])
    assert (code, err) == (0, "")
    assert "..." not in out.replace("[ARGS]...", "")
    if app is not TRAIN:
        code, out, err = answer(monkeypatch, capsys, app, [])
        assert code in (0, 2)  # click 8.1 says 0
        assert "Usage: " in out + err
        assert "error: " not in out + err
