"""The command that does a plan's steps: what becomes of each, what is kept, and how it ends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import reproduce, reproduce_page, reproduce_plan
from experiments.__main__ import app
from experiments.reproduce_plan import STAGES, Step
from experiments.study.folder import Request
from model.errors import DeviceError, RunError, UsageError
from model.interrupts import Interrupted, Interrupts
from profiling import ROOT
from profiling.output.files import read_json
from profiling.output.terminal import Terminal

QUIET = Terminal(speaks=False)
CPU = {
    "device_name": "a CPU",
    "on_gpu": False,
    "machine": {"device": "cpu"},
    "environment": {"cores": 2, "python": "3.11.7", "packages": {"torch": "2.13.0"}, "git_sha": "abc", "gpu": None},
}


def script(name: str, code: str = "pass", seconds: float = 60, **more) -> Step:
    """A step that runs some Python."""
    return Step(name, (sys.executable, "-S", "-c", code), seconds, **more)


def once(path: Path) -> str:
    """Code that leaves a line each time it runs."""
    return f"open({str(path)!r}, 'a').write('ran\\n')"


@pytest.fixture
def run(monkeypatch):
    """Do these steps in a folder, as the command would: by stage, or all of smoke; those in a list at once."""

    def call(out, steps, stage="smoke", terminal=QUIET, budget=None, pack=None, **more) -> dict:
        steps = steps if isinstance(steps, dict) else {"smoke": steps}
        groups = {stage: [s if isinstance(s, list) else [s] for s in steps.get(stage, [])] for stage in STAGES}
        monkeypatch.setattr(reproduce, "facts", lambda: CPU)
        monkeypatch.setattr(reproduce, "plan", lambda *arguments: groups)
        return reproduce.run(Request(out=out, synthetic=True, **more), terminal, Interrupts(), stage, budget, pack)

    return call


def statuses(document: dict) -> dict:
    return {row["name"]: row["status"] for row in document["steps"]}


def whys(document: dict) -> dict:
    return {row["name"]: row["why"] for row in document["steps"] if row["why"]}


SLEEP = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    "
MEET = "import os, time; open('{0}', 'w')\nwhile not os.path.exists('{1}'): time.sleep(0.01)"
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
PATIENT = "import os, time\nwhile not (os.path.exists('{0}') and 'Keyb' in open('{0}').read()): time.sleep(0.05)"
OUTCOMES = {  # name: (code, status, why)
    "good": ("print('a b c')", "done", ""),
    "tests": ("raise SystemExit(1)", "done", ""),
    "broken": ("import sys; print('it broke'); sys.exit(3)", "failed", "exit code 3: it broke"),
    "wrong": ("raise SystemExit(1)", "failed", "exit code 1: no word"),
    "killed": ("import os; print('on its way', flush=True); os.kill(os.getpid(), 9)", "failed", "SIGKILL: on its way"),
    "one": (MEET.format("{tmp}/a", "{tmp}/b"), "done", ""),
    "other": (MEET.format("{tmp}/b", "{tmp}/a"), "done", ""),
    "hangs": (SLEEP + "raise", "out of time", "killed by SIGINT: KeyboardInterrupt"),
    "saves": (SLEEP + "open('{tmp}/saved', 'w'); raise SystemExit(130)", "out of time", "exit code 130: no word"),
    "late": (SLEEP + "print('done')", "done", ""),
    "deaf": (DEAF, "out of time", "killed by SIGKILL: deaf"),
}


def test_outcomes_of_steps_that_run_at_once(tmp_path, run):
    """Each has its own limit; one that hangs, fails or is killed costs no other one, and the next begins after all."""
    group = [script("patient", PATIENT.format(tmp_path / "out" / "hangs.log"))]
    group += [script(name, code.replace("{tmp}", str(tmp_path)), 6) for name, (code, *_) in OUTCOMES.items()]
    group += [script("nothing", reason="no GPU"), Step("absent", ("no-such-command",), 4)]
    document = run(tmp_path / "out", [group, script("next", f"import os; print(os.listdir({str(tmp_path)!r}))")])
    expected = {name: status for name, (_, status, _) in OUTCOMES.items()}
    expected |= {"patient": "done", "nothing": "unavailable", "absent": "failed", "next": "done"}
    assert statuses(document) == expected
    said = whys(document)
    for name, (_, _, why) in {**OUTCOMES, "nothing": ("", "", "no GPU"), "absent": ("", "", "no-such-command")}.items():
        assert why in said.get(name, "")
        assert bool(why) == (name in said)
    assert {row["name"]: row["exit_code"] for row in document["steps"]}["deaf"] == -9
    assert (tmp_path / "out" / "good.log").read_text() == "a b c\n"
    assert "saved" in (tmp_path / "out" / "next.log").read_text()
    assert read_json(tmp_path / "out" / "reproduce.json") == document


def test_another_call_goes_on_with_what_is_left(tmp_path, run):
    """Done steps are skipped; a step that failed, or lacked a file, is done again in a fresh folder."""
    out, ok = tmp_path / "out", tmp_path / "ok"
    mkdir = f"import os; os.mkdir({str(out / 'run')!r}); raise SystemExit(not os.path.exists({str(ok)!r}))"
    given = ("-c", "import sys; print(sys.argv[1:])", reproduce_plan.CEILINGS, reproduce_plan.DATA)
    steps = {
        "smoke": [
            script("good", once(tmp_path / "good.txt")),
            script("bad", once(tmp_path / "bad.txt") + "; raise SystemExit(1)"),
            script("reads", needs="ok"),
            script("trained", mkdir, fresh="run"),
            Step("given", (sys.executable, *given), 60),
        ],
        "numbers": [script("later", once(out / "ok"))],
    }
    first = run(out, steps)
    assert statuses(first) == {
        **{"good": "done", "bad": "failed", "reads": "left", "trained": "failed", "given": "done", "later": "left"}
    }
    assert whys(first)["reads"] == "it needs ok"
    assert (out / "given.log").read_text() == "['--synthetic']\n"
    assert statuses(run(out, steps, stage="numbers"))["later"] == "done"
    assert (tmp_path / "bad.txt").read_text() == "ran\n", "a stage does its own steps"
    ok.touch()
    assert statuses(run(out, steps)) == dict.fromkeys(statuses(first), "done") | {"bad": "failed"}
    assert [(tmp_path / name).read_text() for name in ("good.txt", "bad.txt")] == ["ran\n", "ran\nran\n"]
    unable = [script("unable", reason="no GPU")]
    assert [statuses(run(tmp_path / "gpu", steps))["unable"] for steps in (unable, [script("unable")])] == [
        *("unavailable", "done")
    ]


def test_no_step_goes_beyond_the_budget_or_begins_with_a_quarter_less(tmp_path, run):
    sleep = "import time; time.sleep(600)"
    steps = [script("long", sleep, 1000), script("slow", sleep, 8), script("more", sleep, 8), script("short")]
    document = run(tmp_path, steps, budget=8.0)
    assert statuses(document) == {"long": "left", "slow": "out of time", "more": "left", "short": "left"}
    assert document["steps"][1]["limit_s"] < 8 - reproduce.CLOSE_S


def test_nothing_of_a_step_outlives_it(tmp_path, run):
    """Not even a child that ignores the signal at which its parent ends, and not until those beside it have ended."""
    alive = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(alive)!r}, 'a').write('x')\n    time.sleep(0.02)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not __import__('os').path.exists({str(alive)!r}): time.sleep(0.01)\n"
        "raise SystemExit(4)"
    )
    beside = (
        f"import json, os, time\nrecord, alive = {str(tmp_path / 'out' / 'reproduce.json')!r}, {str(alive)!r}\n"
        "while json.load(open(record))['steps'][0]['status'] == 'left': time.sleep(0.05)\n"
        "size = os.path.getsize(alive); time.sleep(0.3); print(os.path.getsize(alive) == size)"
    )
    document = run(tmp_path / "out", [[script("parent", code), script("beside", beside)]])
    assert statuses(document) == {"parent": "failed", "beside": "done"}
    assert (tmp_path / "out" / "beside.log").read_text() == "True\n"
    assert alive.stat().st_size > 0


def test_full_disk_costs_no_step_and_is_one_line_at_the_end(tmp_path, monkeypatch, run, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reproduce, "write_json", full)
    monkeypatch.setattr(reproduce, "tidy", full)
    steps = [script("one", once(tmp_path / "ran")), script("two", once(tmp_path / "ran"))]
    with pytest.raises(RunError, match=r"No space left on device\); free some space"):
        run(tmp_path, steps, terminal=Terminal())
    assert (tmp_path / "ran").read_text() == "ran\nran\n"
    assert "done, s: one" in capsys.readouterr().out


def test_ctrl_c_ends_the_step_and_leaves_it_for_the_next_time(tmp_path, run):
    code = (
        "import os, signal, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGINT); time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'saved')!r}, 'w'); raise"
    )
    before = signal.signal(signal.SIGINT, Interrupts().handle)
    try:
        with pytest.raises(Interrupted):
            run(tmp_path / "out", [script("first"), script("second", code), script("third")])
    finally:
        signal.signal(signal.SIGINT, before)
    document = read_json(tmp_path / "out" / "reproduce.json")
    assert statuses(document) == {"first": "done", "second": "left", "third": "left"}
    assert whys(document) == {"second": "interrupted"}
    assert (tmp_path / "saved").exists()


def test_killed_command_loses_nothing_and_leaves_nobody_behind(tmp_path):
    """Record, page and archive of a step are there before the next begins, and the one that ran ends with it."""
    out, pack, number = tmp_path / "out", tmp_path / "out.tar.gz", tmp_path / "number"
    code = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    driver = (
        "import sys; from pathlib import Path; sys.path[:0] = ['.', 'tests/support']\n"
        "from tests.experiments.test_reproduce import *; reproduce.facts = lambda: CPU\n"
        f"steps = [[script('first')], [script('second', {code!r})]]\n"
        "reproduce.plan = lambda *arguments: {'smoke': steps}\n"
        f"reproduce.run(Request(out=Path({str(out)!r})), QUIET, Interrupts(), 'smoke', None, Path({str(pack)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT)
    while not (number.exists() and number.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 30
    while running(int(number.read_text())):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert statuses(read_json(out / "reproduce.json")) == {"first": "done", "second": "left"}
    assert "done, s: first" in (out / "reproduce.md").read_text()
    with tarfile.open(pack) as kept:
        assert {"out/reproduce.json", "out/reproduce.md", "out/first.log"} <= set(kept.getnames())


def running(process: int) -> bool:
    """Whether there is such a process, other than as a name that waits for its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_command_prints_its_record_and_a_table_that_is_not_too_long(tmp_path, run, monkeypatch):
    run(tmp_path, [[script(f"step-{n}", f"print('x' * 190 + '{n}'); raise SystemExit(9)") for n in range(9)]])
    monkeypatch.setattr(reproduce_page, "LONGEST", 900)
    monkeypatch.setattr(Interrupts, "install", lambda self: None)
    done = CliRunner().invoke(app, ["reproduce", "--stage=smoke", "--synthetic", "--json", "--out", str(tmp_path)])
    assert json.loads(done.stdout) == read_json(tmp_path / "reproduce.json")
    table = done.stderr.partition("reproduce on a CPU")[2]
    assert 600 < len(table) < 1000
    assert table.rstrip().split("\n")[-1].startswith("left: step-0, step-1")
    assert "the rest is in reproduce.md" in table
    assert "step-8: exit code 9" in (tmp_path / "reproduce.md").read_text()


@pytest.mark.parametrize(
    ("stage", "budget", "ends"),
    [
        ("smoke", None, {"smoke": (230, 1)}),
        ("numbers", 100.0, {"numbers": (100, 1)}),
        ("numbers", 960.0, {"numbers": (960, 2)}),
        (None, 600.0, {"smoke": (230, 1), "numbers": (600, 1), "peers": (600, 1)}),
        (None, None, {"smoke": (230, 1), "numbers": (710, 1), "peers": (1270, 1)}),
        (None, 3810.0, {"smoke": (690, 3), "numbers": (2130, 3), "peers": (3810, 3)}),
    ],
)
def test_stage_ends_by_its_limit_or_by_the_budget(stage, budget, ends):
    assert reproduce.limits(stage, budget) == ends


def test_archive_holds_results_and_neither_weights_nor_data(tmp_path):
    out = tmp_path / "out"
    names = ("run/summary.json", "run/checkpoint-98.safetensors", "run/records/trace.json.gz", "cifar-10-x/batch.bin")
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    for _ in range(2):
        reproduce.archive(out, out / "all.tar.gz")
    with tarfile.open(out / "all.tar.gz") as kept:
        files = sorted(member.name for member in kept if member.isfile())
    assert files == ["out/run/records/trace.json.gz", "out/run/summary.json"]
    assert sorted(path.name for path in out.iterdir()) == ["all.tar.gz", "cifar-10-x", "run"]


def test_folder_of_another_plan_or_machine_or_with_a_damaged_record_is_refused(tmp_path, monkeypatch, run):
    run(tmp_path, [])
    with pytest.raises(UsageError, match="seed: None, now 3"):
        run(tmp_path, [], seed=3)
    (tmp_path / "reproduce.json").write_text("{}")
    with pytest.raises(UsageError, match=r"reproduce\.json is damaged"):
        run(tmp_path, [])
    monkeypatch.setitem(CPU, "machine", {"device": "cpu", "torch": "2.14"})
    with pytest.raises(UsageError, match=r"torch: None, now '2\.14'"):
        run(tmp_path, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "fast"}, "--stage fast is unknown; expected smoke, numbers, peers"),
        ({"budget": 0.0}, "--budget 0: expected seconds, at least 5"),
        ({"budget": float("inf")}, "--budget inf"),
        ({"budget": float("nan")}, "--budget nan"),
        ({"pack": Path("/no/such/folder/x.tar.gz")}, "--pack /no/such/folder"),
        ({"pack": Path(".")}, "--pack ."),
        ({"request": Request(settings=("momentum=0.8", "ops=reference"))}, "--set ops would make runs alike"),
    ],
    ids=["stage", "no_time", "infinite", "no_number", "no_folder", "a_folder", "varied_setting"],
)
def test_wrong_word_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        reproduce.check(**{"request": Request(), **options})


@pytest.mark.slow
def test_machine_is_asked_in_a_process_of_its_own(monkeypatch):
    """A context on the device would stay open, and a device may never answer."""
    here = reproduce.facts()
    assert here["environment"]["python"]
    assert here["machine"]["torch"]
    assert isinstance(here["on_gpu"], bool)
    monkeypatch.setattr(reproduce, "PATIENCE_S", 0.01)
    with pytest.raises(DeviceError, match=r"did not answer within 0\.01 s"):
        reproduce.facts()
    monkeypatch.setattr(reproduce, "PATIENCE_S", 60)
    monkeypatch.setenv("PYTHONPATH", os.devnull)
    monkeypatch.setattr(reproduce, "ROOT", Path("/"))
    with pytest.raises(DeviceError, match=r"cannot be asked for its name: .*experiments"):
        reproduce.facts()


def test_training_of_the_plan_is_in_the_table_and_in_the_archive(tmp_path, run):
    """One of the plan's own for this machine, on a tiny data set."""
    out, pack = tmp_path / "out", tmp_path / "kept.tar.gz"
    planned = reproduce_plan.plan(out, Request(synthetic=True), True, None)["numbers"]
    step = next(step for step in itertools.chain(*planned) if step.name == "reference-0")
    argv = tuple("tests/support/runs.py" if word == "train.py" else word for word in step.argv)
    steps = {"numbers": [step._replace(argv=argv, seconds=300.0)]}
    assert statuses(run(out, steps, None, budget=6000.0, pack=pack, small=True)) == {"reference-0": "done"}
    with tarfile.open(pack) as kept:
        names, page = set(kept.getnames()), kept.extractfile("out/reproduce.md").read().decode()
    (line,) = (line for line in page.split("\n") if line.startswith("reference-0 "))
    assert "eager/reference" in line
    assert "data: synthetic" in page
    assert "reference: n = 1, mean accuracy" in page
    assert "out/reference-0/summary.json" in names
    assert not any("checkpoint" in name for name in names)
