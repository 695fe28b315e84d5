import itertools
import json
import sys
import time

import pytest
import torch

from experiments import reproduce, reproduce_page, reproduce_plan
from experiments.reproduce_plan import Step, last_line
from experiments.study import Request, Study
from kernels.conv_shape import RESNET_LAYERS
from model.errors import RunError, UsageError
from model.interrupts import Interrupted, Interrupts
from profiling import cases
from profiling.bench_records import fingerprint, machine
from profiling.ceilings import GEMMS, Ceiling, Ceilings
from profiling.console import Terminal
from profiling.environment import device_name, environment
from profiling.records import append_jsonl, read_json, write_json

QUIET = Terminal(speaks=False)
FINISH = Study.finish
GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """A page takes longer than most of these steps."""
    monkeypatch.setattr(Study, "finish", lambda *arguments: None)


def script(name: str, code: str, weight: float = 1, **more) -> Step:
    """A step that runs a line of Python."""
    return Step(name, (sys.executable, "-c", code), weight, **more)


def once(path) -> str:
    """Code that leaves a line each time it runs."""
    return f"open({str(path)!r}, 'a').write('ran\\n')"


def run(out, steps, budget: float = 60, **more) -> dict:
    request = Request(out=out, synthetic=True, **more)
    return reproduce.run(request, QUIET, Interrupts(), budget, steps)


def statuses(status: dict) -> dict:
    return {row["name"]: row["status"] for row in status["steps"]}


def test_steps_are_done_in_order_and_their_findings_kept(tmp_path):
    steps = [
        script("first", "print('a b c')", found=last_line("first")),
        script("missed", "raise SystemExit(7)", accepts=(0, 7)),
        script("nothing", "pass", reason="no GPU"),
        script("broken", "import sys; print('it broke'); sys.exit(3)"),
    ]
    status = run(tmp_path, steps)
    assert statuses(status) == {"first": "done", "missed": "done", "nothing": "unavailable", "broken": "failed"}
    found = {row["name"]: row["found"] for row in status["steps"]}
    assert found == {"first": "a b c", "missed": "", "nothing": "no GPU", "broken": "exit code 3: it broke"}
    assert json.loads((tmp_path / "status.json").read_text()) == status


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path):
    steps = [script("good", once(tmp_path / "good.txt")), script("bad", once(tmp_path / "bad.txt") + "; exit(1)")]
    out = tmp_path / "out"
    run(out, steps)
    status = run(out, steps)
    assert (tmp_path / "good.txt").read_text() == "ran\n"
    assert (tmp_path / "bad.txt").read_text() == "ran\nran\n"
    assert statuses(status) == {"good": "done", "bad": "failed"}


def test_what_reads_the_results_of_others_is_done_by_every_call(tmp_path):
    """The predictions are held against the article's run too, which comes after them, maybe only in a later call."""
    steps = [script("read", once(tmp_path / "read.txt"), repeats=True), script("measured", "pass")]
    for lines in ("ran\n", "ran\nran\n"):
        assert set(statuses(run(tmp_path / "out", steps)).values()) == {"done"}
        assert (tmp_path / "read.txt").read_text() == lines
    plan = reproduce_plan.plan(tmp_path, Request(), False, GPU)
    assert [step.name for step in plan if step.repeats] == ["predictions", "predictions-again"]
    assert plan[-1].name == "predictions-again"


def test_a_step_that_runs_out_of_time_is_interrupted_and_saves(tmp_path):
    """It gets its share of the time, SIGINT, and some seconds to save."""
    code = (
        "import time\n"
        "try:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    open({str(tmp_path / 'saved')!r}, 'w').write('saved')\n"
        "    raise SystemExit(130)"
    )
    begun_s = time.monotonic()
    status = run(tmp_path / "out", [script("slow", code)], budget=12)
    assert time.monotonic() - begun_s < 60  # or it has slept to its end
    assert statuses(status)["slow"] == "out of time"
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_step_that_was_just_done_when_time_ran_out_is_done(tmp_path):
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('done')"
    assert statuses(run(tmp_path, [script("late", code)], budget=12)) == {"late": "done"}


def test_a_step_that_ignores_the_signal_is_ended(tmp_path, monkeypatch):
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(reproduce, "GRACE_S", 0.2)
    monkeypatch.setattr(reproduce, "LEAST_S", 0.5)
    row = run(tmp_path, [script("deaf", code)], budget=1.5)["steps"][0]
    assert row["status"] == "out of time"
    assert row["exit_code"] == -9


def test_a_full_disk_is_one_line(tmp_path):
    def full(out, done):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"No space left on device; free some space"):
        run(tmp_path, [script("tiles", "pass", after=full)])


def test_nothing_of_a_step_outlives_it(tmp_path, monkeypatch):
    """Not even a child that ignores the signal at which its parent ends."""
    alive = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(alive)!r}, 'a').write('x')\n    time.sleep(0.02)"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(reproduce, "LEAST_S", 0.5)
    assert run(tmp_path / "out", [script("parent", code)], budget=4)["steps"][0]["status"] == "out of time"
    size = alive.stat().st_size
    time.sleep(0.3)
    assert alive.stat().st_size == size > 0


def test_a_budget_is_shared_by_weight_and_what_is_not_needed_goes_on(tmp_path, monkeypatch):
    clock = itertools.count(0, 0)
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(reproduce.Reproduction, "_execute", lambda self, step, limit_s: (0, False))
    steps = [script("a", "", 3), script("none", "", 5, reason="no GPU"), script("b", "", 1), script("c", "", 1)]
    limits = [row["limit_s"] for row in run(tmp_path, steps, budget=100)["steps"]]
    assert limits == [60, None, 50, 100]


def test_too_little_time_leaves_the_rest_and_a_new_budget_goes_on(tmp_path):
    ran = tmp_path / "ran.txt"
    steps = [script("a", once(ran), 1), script("b", once(ran), 100)]
    out = tmp_path / "out"
    assert statuses(run(out, steps, budget=6))["a"] == "left"
    assert set(statuses(run(out, steps, budget=1000)).values()) == {"done"}


def test_ctrl_c_ends_the_step_and_leaves_it_for_the_next_time(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(reproduce, "_end", lambda process, grace_s: ended.append(process.kill() or process.wait()))

    def interrupted(self, timeout=None):
        raise Interrupted(2)

    steps = [script("first", "pass"), script("second", "import time; time.sleep(60)")]
    run(tmp_path, steps[:1])
    original = reproduce.subprocess.Popen.wait
    calls = []

    def wait(self, timeout=None):
        calls.append(timeout)
        return interrupted(self) if len(calls) == 1 else original(self, timeout)

    monkeypatch.setattr(reproduce.subprocess.Popen, "wait", wait)
    with pytest.raises(Interrupted):
        run(tmp_path, steps)
    assert ended == [-9]
    status = json.loads((tmp_path / "status.json").read_text())
    assert statuses(status) == {"first": "done", "second": "left"}


def test_an_attempt_that_cannot_go_on_begins_afresh(tmp_path):
    run_folder, ok = str(tmp_path / "out" / "run"), str(tmp_path / "ok")
    code = f"import os; os.mkdir({run_folder!r}); exit(not os.path.exists({ok!r}))"
    step = script("profiled", code, fresh="run")
    assert statuses(run(tmp_path / "out", [step])) == {"profiled": "failed"}
    (tmp_path / "ok").touch()
    assert statuses(run(tmp_path / "out", [step])) == {"profiled": "done"}


def test_what_was_done_is_a_page_that_says_what_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Study, "finish", FINISH)
    summary = '{"data_identity": "copy", "status": "complete"}'
    write = f"import os; os.mkdir({str(tmp_path / 'run')!r}); open({str(tmp_path / 'run/summary.json')!r}, 'w')"
    steps = [
        script("first", f"{write}.write({summary!r}); print('ten to one')", found=last_line("first")),
        script("broken", "raise SystemExit(3)"),
        script("nothing", "pass", reason="no GPU"),
    ]
    reproduce.run(Request(out=tmp_path, synthetic=True), Terminal(), Interrupts(), 60, steps)
    document = read_json(tmp_path / "reproduce.json")
    assert document["data_identity"] == "copy"
    assert document["environment"]["git_sha"]
    headline, *said = document["sentences"]
    assert "1 of 2 steps are done" in headline
    assert said[0] == "first: ten to one."
    assert said[1:] == ["Failed: broken (exit code 3: no output).", "Unavailable here, nothing: no GPU."]
    assert [row[:2] for row in document["tables"][0]["rows"]] == [
        ["first", "done"],
        ["broken", "failed"],
        ["nothing", "unavailable"],
    ]
    page = (tmp_path / "reproduce.html").read_text(encoding="utf-8")
    assert "A COPY OF CIFAR-10" in page
    assert "ten to one" in page
    assert "left: broken; the same command with --out" in " ".join(capsys.readouterr().out.split())


def test_nothing_begun_is_no_picture():
    plot = reproduce_page.plot([{"name": "a", "status": "left", "seconds": None, "found": ""}])
    assert not plot.chart.data
    assert plot.chart.reason == "no step was begun"


def test_a_folder_of_another_plan_is_refused(tmp_path):
    run(tmp_path, [])
    with pytest.raises(UsageError, match="seed: None, now 3"):
        run(tmp_path, [], seed=3)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(UsageError, match="--budget"):
        reproduce.check(Request(), budget)


@pytest.mark.parametrize(("small", "gpu"), [(True, None), (False, GPU), (True, GPU)], ids=["cpu", "gpu", "look"])
def test_the_plan_is_the_same_list_in_order_of_value(tmp_path, small, gpu):
    request = Request(data_dir=tmp_path, settings=("momentum=0.8",), seed=4)
    steps = {step.name: step for step in reproduce_plan.plan(tmp_path, request, small, gpu)}
    first = ["suite", "doctor", "ceilings", "tiles", "bench", "ladder", "profiled", "accuracy", "predictions"]
    further = ["suite-again", "memcheck", "racecheck", "profiled-article", "accuracy-article", "accuracy-resnet9"]
    assert list(steps) == [*first, *further, "step-modes", "predictions-again"]
    assert [name for name, step in steps.items() if not step.further] == first
    unavailable = {name for name, step in steps.items() if step.reason} - {"memcheck", "racecheck"}
    assert unavailable == (set() if gpu else {"tiles", "predictions", "step-modes", "predictions-again"})
    for name in ("ladder", "profiled", "accuracy", "profiled-article", "accuracy-article", "accuracy-resnet9"):
        assert {"--set=momentum=0.8", "--seed", "4", "--data-dir", str(tmp_path)} <= set(steps[name].command)
    assert ("--small" in steps["ladder"].command) == small
    assert ("article-256" in steps["accuracy-article"].command) == (not small)
    assert ("tests/test_conv_fprop.py" in steps["suite"].command) == (not small)
    assert "tests/test_config.py" in steps["suite"].command or not small


def test_the_checkers_need_a_gpu_and_their_program(tmp_path, monkeypatch):
    def reasons(gpu: str | None) -> set:
        steps = reproduce_plan.plan(tmp_path, Request(), False, gpu)
        return {step.reason for step in steps if step.name in ("memcheck", "racecheck")}

    monkeypatch.setattr(reproduce_plan.shutil, "which", lambda name: None)
    assert reasons(None) == {"it needs a CUDA GPU"}
    assert reasons(GPU) == {"compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"}
    monkeypatch.setattr(reproduce_plan.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert reasons(GPU) == {None}


@pytest.mark.parametrize(
    ("cores", "plugin", "words"),
    [(16, True, ["-n", "8"]), (6, True, ["-n", "3"]), (2, True, []), (16, False, []), (None, True, [])],
    ids=["many_cores", "some", "two", "no_plugin", "unknown"],
)
def test_the_suite_uses_the_cores_that_there_are(tmp_path, monkeypatch, cores, plugin, words):
    monkeypatch.setattr(reproduce_plan.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(reproduce_plan.importlib.util, "find_spec", lambda name: plugin or None)
    suite = reproduce_plan.plan(tmp_path, Request(), False, GPU)[0].command
    assert [word for word in suite if word == "-n" or word.isdigit()] == words


def test_on_another_gpu_nothing_was_predicted(tmp_path):
    steps = {step.name: step for step in reproduce_plan.plan(tmp_path, Request(), False, "NVIDIA A100-SXM4-40GB")}
    assert steps["predictions"].reason == "the predictions are for NVIDIA H100 80GB HBM3 and NVIDIA H200"
    assert not steps["bench"].reason


def test_every_op_is_among_the_small_cases():
    """With all that can be fused into it."""
    small = [case for case in cases.cases() if case.shape in reproduce_plan.SMALL_CASES]
    assert {(case.op, case.variant) for case in small} == {(case.op, case.variant) for case in cases.cases()}
    assert set(reproduce_plan.SMALL_CASES) == {case.shape for case in small}


def test_what_is_further_shares_what_is_left_by_all_else(tmp_path, monkeypatch):
    clock = itertools.count(0, 0)
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(reproduce.Reproduction, "_execute", lambda self, step, limit_s: (0, False))
    steps = [script("a", "", 1), script("b", "", 3), script("c", "", 100, further=True)]
    assert [row["limit_s"] for row in run(tmp_path, steps, budget=100)["steps"]] == [25, 100, 100]


def ceilings(**about) -> Ceilings:
    one = Ceiling("one", "1", 1.0, 1.0, "FLOP/s", 1, 1.0)
    return Ceilings(gemm=[one], convolutions=[], copy=one, launch=one, sm_clock_mhz=None, reasons=(), lacks=(), **about)


def test_what_an_earlier_step_measured_is_given_to_a_later_one(tmp_path):
    code, file = "import sys; print(len(sys.argv))", tmp_path / "measured"
    given = {"given": lambda: ("--with", "it") if file.exists() else ()}
    later = script("later", code, found=last_line("later"), **given)
    assert run(tmp_path / "without", [later])["steps"][0]["found"] == "1"
    assert run(tmp_path / "with", [script("first", once(file)), later])["steps"][1]["found"] == "3"


@pytest.mark.parametrize("changes", [{}, {"fingerprint": "of another driver"}, None], ids=["here", "elsewhere", "none"])
def test_ceilings_are_given_to_the_runs_that_they_fit(tmp_path, changes):
    """Others are measured again: a folder may have been begun on another machine, and train.py refuses its ceilings."""
    device = torch.device("cpu")
    here = fingerprint(machine(environment(device, reproduce_plan.ROOT)))
    about = {"device": device_name(device), "dtype": "float32", "fingerprint": here}
    if changes is not None:
        write_json(tmp_path / "ceilings.json", ceilings(**about | changes).to_json())

    def given(*settings: str) -> set:
        steps = reproduce_plan.plan(tmp_path, Request(settings=settings), True, None)
        return {step.given() for step in steps if step.name in ("profiled", "profiled-article")}

    fits = ("--ceilings", str(tmp_path / "ceilings.json"))
    assert given("dtype=float32") == {fits if changes == {} else ()}
    assert given("dtype=bfloat16") == {()}


def test_a_steps_environment_is_added_to_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("OURS", "here")
    code = "import os; print(os.environ['OURS'], os.environ['ITS'])"
    step = script("env", code, environment=(("ITS", "too"),), found=last_line("env"))
    assert run(tmp_path, [step])["steps"][0]["found"] == "here too"


def test_what_the_doctor_misses_is_found(tmp_path):
    (tmp_path / "doctor.log").write_text(
        "ok      rich     15\nmissing CIFAR-10          not in data\nmissing CUDA GPU  no\n"
    )
    assert reproduce_plan._doctor_says(tmp_path) == "missing: CIFAR-10, CUDA GPU"
    (tmp_path / "doctor.log").write_text("ok      rich     15\n")
    assert reproduce_plan._doctor_says(tmp_path) == "nothing is missing"


def test_the_benchmarks_verdicts_are_counted(tmp_path):
    def row(verdict: str | None, mode: str = "cold", provider: str = "ours", wrong: bool = False) -> None:
        row = {"kind": "timing", "provider": provider, "mode": mode, "verdict": verdict, "wrong": wrong}
        append_jsonl(tmp_path / "bench.jsonl", row)

    row(None)
    append_jsonl(tmp_path / "bench.jsonl", {"kind": "facts"})
    assert reproduce_plan._bench_says(tmp_path) == "our kernels: none timed beside another"
    for verdict in ("FAST", "SLOW", "FAST"):
        row(verdict)
    row("SLOW", mode="hot")
    row("SLOW", provider="torch.compile")
    row(None, wrong=True)
    assert reproduce_plan._bench_says(tmp_path) == "our kernels: 2 FAST, 1 SLOW; 1 WRONG"


def test_finished_runs_keep_no_weights(tmp_path):
    (tmp_path / "accuracy" / "run-000").mkdir(parents=True)
    run_folder = tmp_path / "accuracy" / "run-000"
    for name in ("checkpoint-1.safetensors", "checkpoint-1.json", "summary.json"):
        (run_folder / name).touch()
    for done in (False, True):
        assert (run_folder / "checkpoint-1.json").exists()
        reproduce_plan._drop_checkpoints("accuracy")(tmp_path, done)
    assert [path.name for path in run_folder.iterdir()] == ["summary.json"]


def test_the_tiles_of_a_tuning_without_an_end_are_kept(tmp_path):
    """Of the machine it ran on, nothing but OUT may be left."""
    steps = {step.name: step for step in reproduce_plan.plan(tmp_path, Request(), False, GPU)}
    interrupted = script("tiles", "raise SystemExit(130)", after=steps["tiles"].after)
    assert statuses(run(tmp_path / "out", [interrupted])) == {"tiles": "failed"}
    table = reproduce_plan.TILES.read_text()
    assert (tmp_path / "out" / "tiles.json").read_text() == table


def test_a_folder_that_goes_on_in_another_checkout_brings_its_tiles(tmp_path, monkeypatch):
    table, out = tmp_path / "tiles.json", tmp_path / "out"
    monkeypatch.setattr(reproduce_plan, "TILES", table)
    monkeypatch.setattr(reproduce, "_device", lambda: ("NVIDIA H200", True))
    table.write_text("tuned")
    run(out, [script("tiles", "pass", after=reproduce_plan._keep_tiles)])
    table.write_text("as committed")
    run(out, [])
    assert table.read_text() == "tuned"


def test_the_ceilings_have_the_time_that_they_must_take(tmp_path):
    """They keep nothing of an attempt without an end, and without them each profiled run measures its own, for longer.

    A candidate runs for a quarter more than its seconds; a process is given ten to begin, and a call 540 in all.
    """
    steps = {step.name: step for step in reproduce_plan.plan(tmp_path, Request(), False, GPU)}
    first, command = [step.weight for step in steps.values() if not step.further], steps["ceilings"].command
    candidates = len(GEMMS["cuda"]) + 3 * sum(layer.R == 3 for layer in RESNET_LAYERS) + 2
    takes_s = 10 + 1.25 * candidates * float(command[command.index("--seconds") + 1])
    limit_s = 540 * steps["ceilings"].weight / sum(first)
    assert limit_s - min(reproduce.GRACE_S, limit_s / 4) > takes_s
