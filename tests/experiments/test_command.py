import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.__main__ import app
from model.errors import DataError
from model.interrupts import Interrupted
from profiling import ROOT

STEPS = {"trained": None, "batches": [128, 512, 2048], "modes": ["eager", "compiled", "captured"]}
COMMANDS = {
    "ladder --cutout 8 --full": ("ladder", {"cutout": 8, "full": True, "epochs_per_rung": None}),
    "lr-finder": ("lr_finder", {}),
    "forgetting": ("forgetting", {}),
    "batch-size --evidence e": ("batch_size", {"evidence": Path("e")}),
    "reproduce --stage smoke": ("reproduce", {"stage": "smoke", "budget": None, "pack": None}),
    "steps --quick": ("steps", {**STEPS, "steps": 20, "quick": True, "apart": False}),
    "collection-overhead": ("collection_overhead", {"pairs": 30, "steps": 50}),
    "longest-kernels run --synthetic": ("longest_kernels", {"folder": Path("run"), "data": ["--synthetic"]}),
    "machine-code": ("machine_code", {"out": None}),
    "tritons 3.6.0 --arch 90": ("tritons", {"tritons": ["3.6.0"], "architectures": [90], "out": None}),
}


def command(words: str):
    return CliRunner().invoke(app, words.split())


@pytest.fixture
def fake(monkeypatch):
    """Put an experiment's module with this `run` in place of the one of this name."""

    def install(run, name: str = "ladder"):
        module = types.ModuleType(f"experiments.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("model.interrupts.Interrupts.install", lambda self: None)

    return install


@pytest.mark.parametrize(("words", "expected"), COMMANDS.items(), ids=lambda value: str(value).partition(" ")[0])
def test_every_command_is_an_experiment_that_gets_its_options(fake, words, expected):
    name, options = expected
    assert hasattr(importlib.import_module(f"experiments.{name}"), "run")
    seen = []
    fake(lambda request, terminal, interrupts, **given: seen.append(given), name)
    done = command(words)
    assert (done.exit_code, seen) == (0, [options]), done.output


def test_no_command_is_left_out():
    commands = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands}
    assert commands == {words.partition(" ")[0] for words in COMMANDS}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ladder --set widhts=8,8,8,8", "did you mean 'widths'"),
        ("ladder --set workers=2", "would make rungs alike"),
        ("ladder --synthetic --data-dir x", "contradict"),
        ("ladder --epochs-per-rung 5", "an even number"),
        ("steps --batch 99999999999999999999", "batch_size=99999999999999999999 is too large"),
        ("steps --preset lapto", "did you mean 'laptop'?"),
        ("steps --set batch-size=8", "--set batch_size is what this measures several of; give --batch"),
        ("steps --out README.md", "README.md is not a folder"),
        ("reproduce --budget 1", "at least 5"),
    ],
    ids=["unknown", "varied", "two_sources", "odd_turns", "huge", "no_preset", "batch_twice", "a_file", "no_budget"],
)
def test_a_slip_of_the_finger_is_a_line_and_exit_code_2(words, message):
    done = command(words)
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().split("\n")) == 1


def test_arguments_are_checked_before_torch_is_imported():
    code = (
        "import sys; from experiments.__main__ import app\n"
        "for words in (['ladder', '--epochs-per-rung', '5'], ['batch-size', '--evidence', 'nowhere']):\n"
        "    try:\n        app(words)\n"
        "    except SystemExit as e:\n        print(e.code, {'torch', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 set()\n" * 2


def test_shared_options_reach_the_experiment_and_json_prints_its_result(fake):
    asked = {}

    def run(request, terminal, interrupts, **options):
        asked.update(vars(request))
        return {"sentences": ["it is so"]}

    fake(run)
    done = command("ladder --small --seed 3 --set momentum=0.8 --synthetic --out o --json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"sentences": ["it is so"]})
    assert asked == {
        **{"small": True, "seed": 3, "settings": ("momentum=0.8",), "synthetic": True, "json": True},
        **{"out": Path("o"), "data_dir": None},
    }


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("no data there"), 3), (Interrupted(2), 130), (Interrupted(15), 143)]
)
def test_a_failure_is_its_exit_code(fake, error, code):
    def run(*arguments, **options):
        raise error

    fake(run)
    done = command("ladder")
    assert done.exit_code == code
    assert str(error) in done.output
