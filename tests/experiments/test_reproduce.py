import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from experiments import reproduce
from experiments.reproduce import limits
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


def script(name: str, code: str, limit_s: float = 60, stage: str = "smoke", **more) -> Step:
    """A step that runs a line of Python."""
    return Step(name, stage, (sys.executable, "-c", code), limit_s, **more)


def once(path) -> str:
    """Code that leaves a line each time it runs."""
    return f"open({str(path)!r}, 'a').write('ran\\n')"


@pytest.fixture
def run(monkeypatch):
    """Run these steps in a folder, as the command would."""

    def call(out, steps, stage="smoke", terminal=QUIET, budget=None, pack=None, **more) -> dict:
        monkeypatch.setattr(reproduce, "facts", lambda: CPU)
        monkeypatch.setattr(reproduce, "plan", lambda *arguments: steps)
        request = Request(out=out, synthetic=True, **more)
        return reproduce.run(request, terminal, Interrupts(), stage, budget, pack)

    return call


def statuses(document: dict) -> dict:
    return {row["name"]: row["status"] for row in document["steps"]}


def whys(document: dict) -> dict:
    return {row["name"]: row["why"] for row in document["steps"] if row["why"]}


def test_steps_are_done_in_order_and_what_came_of_them_is_kept(tmp_path, run):
    steps = [
        script("first", "print('a b c')"),
        script("wrong", "raise SystemExit(1)", accepts=(0, 1)),
        script("nothing", "pass", reason="no GPU"),
        script("broken", "import sys; print('it broke'); sys.exit(3)"),
        script("killed", "import os, signal; print('on its way', flush=True); os.kill(os.getpid(), signal.SIGKILL)"),
        script("after", "pass"),
    ]
    document = run(tmp_path, steps)
    expected = {"first": "done", "wrong": "done", "nothing": "unavailable", "broken": "failed", "killed": "failed"}
    assert statuses(document) == expected | {"after": "done"}
    assert whys(document) == {
        "nothing": "no GPU",
        "broken": "exit code 3: it broke",
        "killed": "killed by SIGKILL: on its way",
    }
    assert (tmp_path / "first.log").read_text() == "a b c\n"
    assert read_json(tmp_path / "reproduce.json") == document


def test_each_result_is_on_the_disk_before_the_next_step_begins(tmp_path, run):
    out, pack = tmp_path / "out", tmp_path / "out.tar.gz"
    look = (
        f"import json, tarfile; rows = json.load(open({str(out / 'reproduce.json')!r}))['steps']\n"
        f"page, names = open({str(out / 'reproduce.md')!r}).read(), tarfile.open({str(pack)!r}).getnames()\n"
        "print(rows[0]['status'], 'done, s: first' in page, 'out/first.log' in names)"
    )
    run(out, [script("first", "pass"), script("look", look)], pack=pack)
    assert (out / "look.log").read_text() == "done True True\n"


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path, run):
    steps = [script("good", once(tmp_path / "good.txt")), script("bad", once(tmp_path / "bad.txt") + "; exit(1)")]
    steps.append(script("later", once(tmp_path / "later.txt"), stage="numbers"))
    run(tmp_path / "out", steps)
    document = run(tmp_path / "out", steps)
    assert (tmp_path / "good.txt").read_text() == "ran\n"
    assert (tmp_path / "bad.txt").read_text() == "ran\nran\n"
    assert statuses(document) == {"good": "done", "bad": "failed", "later": "left"}
    document = run(tmp_path / "out", steps, stage="numbers")
    assert statuses(document) == {"good": "done", "bad": "failed", "later": "done"}
    assert (tmp_path / "bad.txt").read_text() == "ran\nran\n", "a stage does its own steps"


def test_what_reads_the_results_of_others_is_done_last_by_every_call(tmp_path, run):
    code = f"open({str(tmp_path / 'read.txt')!r}, 'a').write(str(int(__import__('os').path.exists({{!r}}))))"
    read = script("read", code.format(str(tmp_path / "made")), stage="numbers", repeats=True)
    steps = [read, script("make", f"open({str(tmp_path / 'made')!r}, 'w')")]
    for seen in ("1", "11"):
        assert set(statuses(run(tmp_path / "out", steps)).values()) == {"done"}
        assert (tmp_path / "read.txt").read_text() == seen


def test_a_step_that_runs_out_of_time_is_interrupted_and_saves(tmp_path, run):
    code = (
        "import time\n"
        "try:\n    time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'saved')!r}, 'w').write('saved')\n"
        "    raise SystemExit(130)"
    )
    document = run(tmp_path / "out", [script("slow", code, limit_s=8), script("next", "pass")])
    assert statuses(document) == {"slow": "out of time", "next": "done"}
    assert whys(document)["slow"] == "exit code 130: no word"
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_step_that_was_just_done_when_time_ran_out_is_done(tmp_path, run):
    code = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('done')"
    assert statuses(run(tmp_path, [script("late", code, limit_s=8)])) == {"late": "done"}


def test_a_step_that_ignores_the_signal_is_ended(tmp_path, run):
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True)\n"
    document = run(tmp_path, [script("deaf", code + "time.sleep(600)", limit_s=8)])
    assert statuses(document) == {"deaf": "out of time"}
    assert whys(document) == {"deaf": "killed by SIGKILL: deaf"}
    assert document["steps"][0]["exit_code"] == -9


def test_steps_run_at_once_and_each_has_its_own_limit(tmp_path, run):
    """Each of two waits for the other; the third of them never ends, and is not waited for longer than its limit."""

    def meets(mine: str, other: str) -> str:
        paths = [str(tmp_path / name) for name in (mine, other)]
        return f"import os, time; open({paths[0]!r}, 'w')\nwhile not os.path.exists({paths[1]!r}): time.sleep(0.01)"

    steps = [
        script("one", meets("a", "b"), together=True),
        script("hangs", "import time; time.sleep(600)", limit_s=6, together=True),
        script("other", meets("b", "a"), together=True),
        script("alone", f"import os; print(os.path.exists({str(tmp_path / 'a')!r}))"),
    ]
    document = run(tmp_path / "out", steps)
    assert statuses(document) == {"one": "done", "hangs": "out of time", "other": "done", "alone": "done"}
    assert (tmp_path / "out" / "alone.log").read_text() == "True\n"


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
    steps = [script("parent", code, together=True), script("beside", beside, together=True)]
    assert statuses(run(tmp_path / "out", steps)) == {"parent": "failed", "beside": "done"}
    assert (tmp_path / "out" / "beside.log").read_text() == "True\n"
    assert alive.stat().st_size > 0


def test_a_step_is_not_begun_with_less_than_it_needs(tmp_path, run):
    steps = [script("long", "pass", least_s=1000), script("short", "pass")]
    assert statuses(run(tmp_path, steps)) == {"long": "left", "short": "done"}
    assert statuses(run(tmp_path, steps, budget=5.0)) == {"long": "left", "short": "done"}
    assert statuses(run(tmp_path / "other", steps, budget=5.0)) == {"long": "left", "short": "left"}


def test_no_step_goes_beyond_the_budget(tmp_path, run):
    steps = [script("slow", "import time; time.sleep(600)", limit_s=500), script("more", "pass")]
    document = run(tmp_path, steps, budget=12.0)
    assert statuses(document) == {"slow": "out of time", "more": "left"}
    assert document["steps"][0]["limit_s"] < 12 - reproduce.CLOSE_S


def test_a_step_waits_for_what_it_needs(tmp_path, run):
    steps = [script("reads", "pass", needs="made.txt")]
    document = run(tmp_path, steps)
    assert (statuses(document), whys(document)) == ({"reads": "left"}, {"reads": "it needs made.txt"})
    (tmp_path / "made.txt").touch()
    document = run(tmp_path, steps)
    assert (statuses(document), whys(document)) == ({"reads": "done"}, {})


def test_an_attempt_that_cannot_go_on_begins_afresh(tmp_path, run):
    run_folder, ok = str(tmp_path / "out" / "run"), str(tmp_path / "ok")
    step = script("trained", f"import os; os.mkdir({run_folder!r}); exit(not os.path.exists({ok!r}))", fresh="run")
    assert statuses(run(tmp_path / "out", [step])) == {"trained": "failed"}
    (tmp_path / "ok").touch()
    assert statuses(run(tmp_path / "out", [step])) == {"trained": "done"}


def test_what_an_earlier_step_measured_is_given_to_a_later_one(tmp_path, run):
    file = tmp_path / "measured"
    later = script("later", "import sys; print(len(sys.argv))", given=lambda: ("--with", "it") if file.exists() else ())
    run(tmp_path / "without", [later])
    run(tmp_path / "with", [script("first", once(file)), later])
    assert [(tmp_path / name / "later.log").read_text() for name in ("without", "with")] == ["1\n", "3\n"]


def test_a_steps_environment_is_added_to_ours(tmp_path, monkeypatch, run):
    monkeypatch.setenv("OURS", "here")
    code = "import os; print(os.environ['OURS'], os.environ['ITS'])"
    run(tmp_path, [script("env", code, environment=(("ITS", "too"),))])
    assert (tmp_path / "env.log").read_text() == "here too\n"


def test_a_command_that_is_not_there_is_a_failed_step(tmp_path, run):
    document = run(tmp_path, [Step("absent", "smoke", ("no-such-command",), 10), script("next", "pass")])
    assert statuses(document) == {"absent": "failed", "next": "done"}
    assert "no-such-command" in whys(document)["absent"]


def test_a_full_disk_costs_no_step_and_is_one_line_at_the_end(tmp_path, monkeypatch, run, capsys):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reproduce, "write_json", full)
    with pytest.raises(RunError, match=r"No space left on device\); free some space"):
        run(
            tmp_path,
            [script("one", once(tmp_path / "ran")), script("two", once(tmp_path / "ran"))],
            terminal=Terminal(),
        )
    assert (tmp_path / "ran").read_text() == "ran\nran\n"
    assert "done, s: one" in capsys.readouterr().out


def test_ctrl_c_ends_the_step_and_leaves_it_for_the_next_time(tmp_path, run):
    code = (
        "import os, signal, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGINT); time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'saved')!r}, 'w'); raise"
    )
    interrupts = Interrupts()
    before = signal.signal(signal.SIGINT, interrupts.handle)
    try:
        with pytest.raises(Interrupted):
            run(tmp_path / "out", [script("first", "pass"), script("second", code), script("third", "pass")])
    finally:
        signal.signal(signal.SIGINT, before)
    document = read_json(tmp_path / "out" / "reproduce.json")
    assert statuses(document) == {"first": "done", "second": "left", "third": "left"}
    assert whys(document) == {"second": "interrupted"}
    assert (tmp_path / "saved").exists()


def test_a_command_that_is_killed_loses_nothing_and_leaves_nobody_behind(tmp_path):
    """Its page and its archive are there, the step that ran ends with it, and the same command goes on."""
    out, pack, number = tmp_path / "out", tmp_path / "out.tar.gz", tmp_path / "number"
    code = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    driver = (
        "import sys; from pathlib import Path; sys.path[:0] = ['.', 'tests/support']\n"
        "from experiments import reproduce; from tests.experiments.test_reproduce import *\n"
        "reproduce.facts = lambda: CPU\n"
        f"reproduce.plan = lambda *a: [script('first', {once(tmp_path / 'first')!r}), script('second', {code!r})]\n"
        "from experiments.__main__ import app\n"
        f"app(['reproduce', '--stage=smoke', '--synthetic', '--out', {str(out)!r}, '--pack', {str(pack)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (number.exists() and number.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    step = int(number.read_text())
    for _ in range(600):
        if not running(step):
            break
        time.sleep(0.05)
    assert not running(step)
    assert statuses(read_json(out / "reproduce.json")) == {"first": "done", "second": "left"}
    assert "done, s: first" in (out / "reproduce.md").read_text()
    with tarfile.open(pack) as kept:
        assert {"out/reproduce.json", "out/reproduce.md", "out/first.log"} <= set(kept.getnames())
    again = subprocess.run(
        [sys.executable, "-c", driver.replace(repr(code), repr(once(tmp_path / "second")))], cwd=ROOT, timeout=120
    )
    assert again.returncode == 0
    assert statuses(read_json(out / "reproduce.json")) == {"first": "done", "second": "done"}
    assert (tmp_path / "first").read_text() == "ran\n"


def running(process: int) -> bool:
    """Whether there is such a process, other than as a name that waits for its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_table_is_printed_last_and_is_not_too_long(tmp_path, run, capsys):
    def wordy(number: int) -> Step:
        return script(f"step-{number:03d}", f"print('x' * 190 + '{number}'); exit(9)")

    run(tmp_path, [wordy(number) for number in range(60)], terminal=Terminal(), budget=600.0)
    printed = capsys.readouterr().out.partition("reproduce on a CPU")[2]
    assert 9_000 < len(printed) < 11_000
    assert printed.rstrip().split("\n")[-1].startswith("left: step-000, step-001")
    assert "the rest is in reproduce.md" in printed
    assert "step-059: exit code 9" in (tmp_path / "reproduce.md").read_text()


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
    ids=["its_own", "less", "more", "ten_minutes", "all", "an_hour"],
)
def test_a_stage_ends_by_its_limit_or_by_the_budget(stage, budget, ends):
    assert limits(stage, budget) == ends


def test_stages_come_in_their_order(tmp_path, run):
    steps = [script(name, "pass", stage=name) for name in STAGES]
    assert set(statuses(run(tmp_path, steps, stage=None)).values()) == {"done"}
    assert list(STAGES) == ["smoke", "numbers", "peers"]


def test_the_archive_holds_results_and_neither_weights_nor_data(tmp_path):
    out = tmp_path / "out"
    (out / "run" / "records").mkdir(parents=True)
    (out / "cifar-10-batches-bin").mkdir()
    for name in ("summary.json", "checkpoint-98.safetensors", "records/trace.json.gz"):
        (out / "run" / name).touch()
    (out / "cifar-10-batches-bin" / "data_batch_1.bin").touch()
    reproduce.archive(out, out / "all.tar.gz")
    reproduce.archive(out, out / "all.tar.gz")
    with tarfile.open(out / "all.tar.gz") as kept:
        files = sorted(member.name for member in kept if member.isfile())
    assert files == ["out/run/records/trace.json.gz", "out/run/summary.json"]
    assert sorted(path.name for path in out.iterdir()) == ["all.tar.gz", "cifar-10-batches-bin", "run"]


def test_a_folder_of_another_plan_or_machine_is_refused(tmp_path, monkeypatch, run):
    run(tmp_path, [])
    with pytest.raises(UsageError, match="seed: None, now 3"):
        run(tmp_path, [], seed=3)
    monkeypatch.setitem(CPU, "machine", {"device": "cpu", "torch": "2.14"})
    with pytest.raises(UsageError, match=r"torch: None, now '2\.14'"):
        run(tmp_path, [])


def test_a_damaged_record_is_refused(tmp_path, run):
    run(tmp_path, [])
    (tmp_path / "reproduce.json").write_text("{}")
    with pytest.raises(UsageError, match=r"reproduce\.json is damaged"):
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
    ],
    ids=["stage", "none", "infinite", "no_number", "no_folder", "a_folder"],
)
def test_a_slip_of_the_finger_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        reproduce.check(Request(), **options)


def test_settings_that_the_runs_differ_in_are_refused():
    with pytest.raises(UsageError, match="--set ops would make runs alike"):
        reproduce.check(Request(settings=("momentum=0.8", "ops=reference")))


def test_the_machine_is_asked_in_a_process_of_its_own(monkeypatch):
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


def test_the_command_prints_its_record_for_a_script(tmp_path):
    driver = (
        "import sys; sys.path[:0] = ['.', 'tests/support']\n"
        "from experiments import reproduce; from tests.experiments.test_reproduce import *\n"
        "reproduce.facts, reproduce.plan = lambda: CPU, lambda *a: [script('first', 'pass')]\n"
        "from experiments.__main__ import app\n"
        f"app(['reproduce', '--stage=smoke', '--json', '--out', {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", driver], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == read_json(tmp_path / "out" / "reproduce.json")
    assert done.stderr.rstrip().endswith("everything is done")


ILL = """
import sys; sys.path[:0] = [".", "tests/support"]
from dataclasses import replace
from experiments import reproduce, reproduce_plan
ill = {
    "doctor": (sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(600)"),
    "check": ("no-such-command",),
    "reference-eager": (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
    "tests": (sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"),
}
def tiny(step):
    words = ["tests/support/runs.py" if word == "train.py" else word for word in step.command if word != "--profile"]
    limit_s = 5.0 if step.name == "doctor" else 300.0
    return replace(step, command=ill.get(step.name, tuple(words)), limit_s=limit_s)
def plan(*arguments):
    chosen = (*ill, "reference", "ours", "fused-0", "reference-0", "memcheck")
    return [tiny(step) for step in reproduce_plan.plan(*arguments) if step.name in chosen]
reproduce.plan = plan
from experiments.__main__ import app
app(["reproduce", "--small", "--synthetic", "--budget", "1230", *sys.argv[1:]])
"""


def test_with_a_step_that_hangs_one_that_fails_and_one_that_is_killed_the_table_comes(tmp_path):
    """Both stages on this machine with trainings on a tiny data set: nothing that was finished is lost."""
    out, pack = tmp_path / "out", tmp_path / "kept.tar.gz"
    words = ["--out", str(out), "--pack", str(pack)]
    done = subprocess.run([sys.executable, "-c", ILL, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = read_json(out / "reproduce.json")
    became = {name: status for name, status in statuses(document).items() if status != "unavailable"}
    assert became == {
        **{"doctor": "out of time", "check": "failed", "reference": "done", "reference-eager": "failed"},
        **{"reference-0": "done", "tests": "done"},
    }
    table = done.stdout.partition("reproduce on ")[2]
    assert len(table) < 11_000
    for name in ("reference", "reference-0"):
        (line,) = (line for line in table.split("\n") if line.startswith(f"{name} "))
        assert "eager/reference" in line
    assert "data: synthetic" in table
    assert "reference: n = 1, mean accuracy" in table
    assert "== tests: 1 failed" in table
    assert "doctor: killed by SIGINT: KeyboardInterrupt" in table
    assert "reference-eager: killed by SIGKILL" in table
    assert table.rstrip().split("\n")[-1].startswith("left: check, ")
    with tarfile.open(pack) as kept:
        names = set(kept.getnames())
        page = kept.extractfile("out/reproduce.md").read().decode()
    assert {f"out/{name}/summary.json" for name in ("reference", "reference-0")} <= names
    assert not any("checkpoint" in name for name in names)
    assert table.partition("\n")[2].strip() in page
