"""The README and docs/: every command works, every link leads somewhere, every setting and exit code is there."""

import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import train
from experiments.__main__ import app as experiments_app
from model import errors
from model.config import Config
from profiling import ROOT
from profiling.__main__ import app as profiling_app
from profiling.device.ceilings import measure
from profiling.output import errors as profiling_errors
from profiling.output.files import write_json

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
APPS = {"train.py": train.app, "-m profiling": profiling_app, "-m experiments": experiments_app}
RUNS = ROOT / "tests" / "support" / "runs.py"


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [(path.name, text) for path in DOCUMENTS for text in pattern.findall(path.read_text(encoding="utf-8"))]


def commands() -> list[str]:
    """Every command once, in the order in which a reader meets them."""
    found = []
    for _, text in blocks("sh"):
        for line in text.splitlines():
            found += [part.strip() for part in re.sub(r"\s#.*", "", line).split("&&")]
    return list(dict.fromkeys(found))


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """("-m profiling", its arguments), ("train.py", its arguments), ("pytest", ...)."""
    if words[0] == "python":
        length = 2 if words[1] == "-m" else 1
        return " ".join(words[1 : 1 + length]), words[1 + length :]
    if words[0] == "torchrun":
        return "torchrun", words[1:]
    return words[0], words[1:]


def of(*programs: str) -> list[str]:
    return [command for command in commands() if program_of(shlex.split(command))[0] in programs]


def parse(app: typer.Typer, words: list[str]) -> None:
    """As the program reads its arguments; raises for a word that it does not know."""
    command = typer.main.get_command(app)
    context = command.make_context("program", list(words), resilient_parsing=False)
    if hasattr(command, "commands"):
        name, *rest = words
        command.commands[name].make_context(name, rest, parent=context)


@pytest.mark.parametrize("command", of(*APPS))
def test_command_is_known(command):
    program, words = program_of(shlex.split(command))
    parse(APPS[program], words)
    settings = [value for option, value in pairwise(words) if option == "--set"]
    Config().with_settings(settings)


def test_a_wrong_word_is_found():
    with pytest.raises(Exception, match=r"--nosuch"):
        parse(train.app, ["--nosuch"])
    with pytest.raises(Exception, match=r"--nosuch"):
        parse(profiling_app, ["report", "runs/a", "--nosuch"])


def test_every_command_is_of_a_known_program():
    programs = {program_of(shlex.split(command))[0] for command in commands()}
    assert programs == {*APPS, "pip", "pytest", "torchrun", "ruff"}


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in of("pip"):
        for wanted in re.findall(r"\[(\w+)\]", command):
            assert wanted in extras


def run(words: list[str], folder: Path) -> str:
    """In `folder`, on data that is tiny; fails unless it exits with 0."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


SHORT = "--synthetic --epochs 1 --set widths=8,8,8,8 --ceilings ceilings.json"
"""A profiled run starts processes of its own, which know nothing of the tests' tiny data."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader's commands run: the README's two profiled runs, which others go on with, are there."""
    folder = tmp_path_factory.mktemp("reader")
    ceilings = measure(torch.device("cpu"), torch.bfloat16, seconds=0.002, batch=1)
    write_json(folder / "ceilings.json", ceilings.to_json())
    (folder / "cifar").mkdir()
    for command in (c for c in of("train.py") if "--profile" in c and "--out" in c):
        run([sys.executable, str(ROOT / "train.py"), *shlex.split(f"{command} {SHORT}")[2:]], folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in of("train.py", "torchrun") if "--profile" not in c])
def test_training_command_runs(command, folder):
    """On data that is tiny; a command that lists something runs as it is."""
    command = command.replace("~/cifar", "cifar").replace("0.94", "0.01")
    goes_on = "runs/a" in command
    program = ROOT / "train.py" if goes_on or "--list" in command else RUNS
    words = [str(program) if word == "train.py" else word for word in shlex.split(command)]
    start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    run([*start, *words[1:], *(["--synthetic"] if goes_on else [])], folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in of("-m profiling") if re.search("report|compare|doctor", c)])
def test_report_command_runs(command, folder):
    run([sys.executable, *shlex.split(command)[1:]], folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", of("pytest"))
def test_pytest_command_collects(command):
    words = [word for word in shlex.split(command)[1:] if not word.startswith("--benchmark-json")]
    told = run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *words], ROOT)
    assert re.search(r"::test_", told)


@pytest.mark.parametrize(
    "command", [c for c in of("-m experiments", "-m profiling") if not re.search("profiling (report|compare)", c)]
)
def test_command_reaches_its_work(command, monkeypatch):
    """Up to where measuring begins: the words' meaning is accepted, not only their spelling."""
    program, words = program_of(shlex.split(command))
    reached = []
    for name in ("bench.command.run", "device.command.run", "device.doctor.run", "report.command.collect"):
        monkeypatch.setattr(f"profiling.{name}", lambda *_, **__: reached.append(words[0]) or 0)
    module = words[0].replace("-", "_")
    if program == "-m experiments":
        module = importlib.import_module(f"experiments.{module}")
        monkeypatch.setattr(module, "run", lambda *_, **__: reached.append(words[0]) or {})
        monkeypatch.setattr("model.interrupts.Interrupts.install", lambda self: None)
        if {"FOLDER", "runs/a"} & set(words):  # finished runs, which nobody has here
            monkeypatch.setattr(module, "check", lambda *_, **__: None, raising=False)
    done = CliRunner().invoke(APPS[program], words)
    assert done.exit_code == 0, done.output
    assert reached == [words[0]]


@pytest.mark.parametrize("text", [text for _, text in blocks("python")])
def test_code_runs(text):
    exec(compile(text, "README.md", "exec"), {})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)|src(?:set)?=\"([^\"]+)\"", text)
    for target in (a or b for a, b in targets):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_are_there(path):
    """Every file of the checkout that the text names, but for patterns."""
    houses = "kernels|model|profiling|experiments|tests"
    for name in re.findall(rf"`((?:{houses})/[\w/]+\.\w+)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_setting_is_described():
    text = (ROOT / "docs" / "command-line.md").read_text()
    names = {f.name for f in dataclasses.fields(Config) if "about" in f.metadata} | {"lr"}
    assert names <= set(re.findall(r"`(\w+)`", text))


def test_every_exit_code_is_described():
    rows = re.findall(r"^\| ([\d, ]+) \| ", (ROOT / "docs" / "command-line.md").read_text(), re.M)
    described = {int(code) for row in rows for code in row.split(",")}
    for module in (errors, profiling_errors):
        for error in vars(module).values():
            if isinstance(error, type) and isinstance(getattr(error, "exit_code", None), int):
                assert error.exit_code in described, error
