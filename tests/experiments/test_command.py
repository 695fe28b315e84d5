import json
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

from experiments.__main__ import app
from model.errors import DataError
from model.interrupts import Interrupted
from profiling import ROOT

NAMES = {
    *("ladder", "lr-finder", "forgetting", "batch-size", "reproduce", "steps", "collection-overhead"),
    *("longest-kernels", "machine-code", "tritons"),
}


def command(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def fake(monkeypatch):
    """Put an experiment's module in place of the ladder's."""

    def install(run):
        module = types.ModuleType("experiments.ladder")
        module.run = run
        monkeypatch.setitem(sys.modules, "experiments.ladder", module)
        monkeypatch.setattr("model.interrupts.Interrupts.install", lambda self: None)

    return install


def test_every_experiment_is_a_command():
    commands = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands}
    assert commands == NAMES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ladder", "--set", "widhts=8,8,8,8"], "did you mean 'widths'"),
        (["ladder", "--set", "workers=2"], "would make rungs alike"),
        (["ladder", "--synthetic", "--data-dir", "x"], "contradict"),
        (["ladder", "--epochs-per-rung", "5"], "an even number"),
        (["steps", "--batch", "99999999999999999999"], "batch_size=99999999999999999999 is too large"),
        (["steps", "--preset", "lapto"], "did you mean 'laptop'?"),
        (["steps", "--set", "batch-size=8"], "--set batch_size is what this measures several of; give --batch"),
        (["steps", "--out", "README.md"], "README.md is not a folder"),
        (["reproduce", "--budget", "1"], "at least 5"),
    ],
    ids=[
        "unknown_setting",
        "varied_setting",
        "two_sources",
        "odd_turns",
        "huge_batch",
        "no_preset",
        "batch_twice",
        "a_file",
        "no_budget",
    ],
)
def test_a_slip_of_the_finger_is_a_line_and_exit_code_2(words, message):
    done = command(*words)
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().split("\n")) == 1


def test_arguments_are_checked_before_torch_is_imported():
    code = (
        "import sys; from experiments.__main__ import app\n"
        "try:\n    app(['ladder', '--epochs-per-rung', '5'])\n"
        "except SystemExit as e:\n    print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n"


def test_an_experiment_gets_what_was_asked_and_json_prints_its_result(fake):
    asked = {}

    def run(request, terminal, interrupts, **options):
        asked.update(vars(request), **options)
        return {"sentences": ["it is so"]}

    fake(run)
    words = ["ladder", "--small", "--seed", "3", "--set", "momentum=0.8", "--json", "--cutout", "8", "--full"]
    done = command(*words)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"sentences": ["it is so"]}
    assert asked["small"]
    assert asked["seed"] == 3
    assert asked["settings"] == ("momentum=0.8",)
    assert (asked["cutout"], asked["full"], asked["epochs_per_rung"]) == (8, True, None)


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
