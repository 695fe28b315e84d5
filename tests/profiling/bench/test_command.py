"""`python -m profiling bench`: what is refused, measured, kept, resumed, checked and tuned."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from kernels import jit, tiles
from kernels.tiles import Gpu
from profiling import ROOT
from profiling.__main__ import app
from profiling.bench import OPS, cases, kernel_facts, tuning
from profiling.bench import command as bench_command
from profiling.bench import measure as bench
from profiling.bench.ahead_of_time import Facts
from profiling.bench.case import Correctness, OperandFactory, with_moments
from profiling.bench.tuning import Timings
from profiling.device import environment as environments
from profiling.output.errors import CommandError
from profiling.output.files import read_jsonl

CPU = torch.device("cpu")
FIRST, SECOND = ("bn_finalize", "--quick", "--shape", "256x4x4"), ("--shape", "512x4x4")


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, whose compiler says the same of every kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled = Facts("", 90, registers=40, warps=4)
    monkeypatch.setattr(kernel_facts.kernel_facts, "__defaults__", (lambda builds: [compiled] * len(builds),))


def invoke(*arguments, code=0):
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def ours(path) -> list[str]:
    """The shapes of our timings in a file of results."""
    return [r["shape"] for r in read_jsonl(path) if r["kind"] == "timing" and r["provider"] == "ours"]


@pytest.mark.usefixtures("no_gpu")
def test_a_case_is_timed_on_a_cpu_compared_with_before_and_resumed(tmp_path):
    """A file of another machine is refused before anything is timed, and not resumed."""
    out = tmp_path / "bench.jsonl"
    done = invoke(*FIRST, "--json", "--out", out)
    document = json.loads(done.stdout)
    assert (document["schema"], document["rows"]) == (1, read_jsonl(out))
    timings = {row["provider"]: row for row in document["rows"] if row["kind"] == "timing"}
    assert timings["eager channels_last"]["us"]["status"] == "measured"
    assert timings["ours"]["us"] == {"value": None, "unit": "us", "status": "unavailable", "source": "no CUDA GPU"}
    assert "max-autotune" not in timings
    (facts,) = (row for row in document["rows"] if row["kind"] == "facts")
    assert (facts["kernel"], facts["gpu"], facts["registers"]) == ("bn_finalize_kernel", "sm_90", 40)
    assert "CPU reference timings" in done.stderr

    assert " -> " in invoke(*FIRST, "--compare", out).stdout
    assert len(read_jsonl(out)) == len(document["rows"])
    assert f"{out} has none of these cases" in invoke("bn_finalize", "--quick", *SECOND, "--compare", out).stdout
    invoke(*FIRST, *SECOND, "--resume", "--out", out)
    assert ours(out) == ["256x4x4", "512x4x4"]

    elsewhere = out.read_text().replace('"torch": "', '"torch": "1.').replace('"fingerprint": "', '"fingerprint": "x')
    out.write_text(elsewhere)
    refused = invoke(*FIRST, "--compare", out, code=2)
    assert "torch: 1." in refused.stderr
    assert "provider" not in refused.stdout
    invoke(*FIRST, "--out", out, "--resume")
    assert len(ours(out)) == 3


BAD = {
    "conv_fpro": "did you mean conv_fprop?",
    "zzz": "expected one of augment, conv_fprop",
    "--dtype float61": "did you mean float16?",
    "bn_stats --shape 64x32x3": "did you mean 64x32x32?",
    "conv_wgrad --shape 64x32x32": "is unknown",
    "--out .": "expected a file",
    "--out no/such/folder/x.jsonl": "expected a file in a folder that exists",
    "--compare no-such-file": "no such file",
    "bn_stats --tune": "no tiles to tune",
    "--tune --json": "leave --json out",
    "--check --json": "--check times nothing; leave --json out",
    "--check --quick": "leave --quick out",
    "--jobs 2": "without --check there is nothing to spread or to limit; leave --jobs out",
    "--check --jobs 0": "--jobs is 0, expected a positive number",
    "bn_finalize --short": "--short has none of these; it is augment 3x32x32, ",
    "--resume": "--resume goes on with what --out holds",
    "--tunes": "No such option",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_exits_2_with_a_line(arguments):
    done = invoke(*arguments.split(), code=2)
    assert BAD[arguments] in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("words", [["bn_stat"], ["--dtype", "float61"]], ids=["op", "dtype"])
def test_a_typo_does_not_import_torch(words):
    code = (
        "import sys, profiling.__main__ as m\n"
        f"try: m.app({['bench', *words]})\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr


def test_ops_are_those_of_the_cases():
    assert tuple(dict.fromkeys(case.op for case in cases.cases())) == OPS


@pytest.mark.usefixtures("no_gpu")
def test_without_a_device_the_code_is_4(monkeypatch):
    done = invoke("--tune", code=4)
    assert ("needs a CUDA GPU" in done.stderr, done.stderr.count("\n")) == (True, 1)
    monkeypatch.setattr(jit, "unavailable", lambda device: "there is no GPU")
    assert invoke("--check", code=4).stderr == "error: --check runs the kernels: there is no GPU\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert invoke("--tune", code=4).stderr == "error: --tune: there is no GPU\n"


@pytest.mark.usefixtures("no_gpu")
def test_a_wrong_kernel_exits_1_and_a_crash_70(monkeypatch):
    monkeypatch.setattr(Correctness, "refusal", lambda self, result: "off")
    possible = (bench.EAGER, bench.OURS)
    monkeypatch.setattr(bench, "_why_not", lambda provider, device: None if provider in possible else "not here")
    assert "unavailable: wrong: off" in invoke(*FIRST, code=1).stdout
    monkeypatch.setattr(bench, "measure", lambda *arguments: 1 / 0)
    assert "division by zero" in invoke(*FIRST, code=70).stderr


def test_a_full_disk_is_a_line(tmp_path):
    with pytest.raises(CommandError, match="No space left"), bench_command._disk_errors(tmp_path / "x"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "jobs", [pytest.param((), marks=pytest.mark.slow), ("--jobs", "1")], ids=["in_processes", "in_this_one"]
)
def test_kernels_are_checked_without_being_timed(tmp_path, jobs):
    out = tmp_path / "checks.jsonl"
    done = invoke("bn_finalize", "--shape", "256x4x4", *SECOND, "--check", "--images", 2, "--out", out, *jobs)
    assert [line.split()[-3:] for line in done.stdout.splitlines()[:2]] == [["2", "images", "right"]] * 2
    assert "2 of 2 checks of 2 cases on" in done.stdout
    assert done.stdout.endswith(": 2 right, 0 wrong, 0 failed, 0 unknown\n")
    assert [(r["case"], r["op"], r["batch"], r["status"], r["error"]) for r in read_jsonl(out)] == [
        (f"bn_finalize {shape}", "bn_finalize", 2, "right", None) for shape in ("256x4x4", "512x4x4")
    ]


def test_a_failing_check_names_its_tile_and_the_others_go_on(monkeypatch):
    case = next(c for c in cases.cases() if c.op == "bn_finalize")
    conv = {"op": "conv_fprop", "shape": "64x32x32-64x3x3-s1", "operands": lambda d: (d.activation(64, 4),)}
    conv = dataclasses.replace(case, **conv, library=lambda x: (x,), comparable=with_moments)
    wrong = dataclasses.replace(conv, variant="wrong", ours=lambda x: (1.01 * x, x.new_empty((3, 0, 64))))
    raises = dataclasses.replace(conv, variant="raises", ours=lambda x: 1 / 0)
    monkeypatch.setattr(cases, "cases", lambda: (wrong, raises, case))
    *broken, good, last = invoke("--check", "--jobs", 1, "--images", 2, code=1).stdout.splitlines()
    for line, says in zip(broken, ("wrong: output 0 is off by", "failed: ZeroDivisionError: "), strict=True):
        assert says in line
        assert re.search(r"  \(\d+x\d+x\d+ \d warps .*\)$", line), "the tile that it ran with"
    assert good.endswith("right")
    assert ": 1 right, 1 wrong, 1 failed, " in last


class Backend:
    """Tells what it is asked; each time is `fate()`."""

    gpu = Gpu("NVIDIA H200", (9, 0))

    def __init__(self, fate):
        self.fate, self.prepared = fate, []

    def prepare(self, problems):
        self.prepared = [problem.case().shape for problem in problems]

    def time(self, case, tried):
        return self.fate(case, tried)


@pytest.fixture
def tuned(monkeypatch):
    """A GPU of which a `Backend` is told how to time; and the commands that the program starts of itself."""
    commands, run = [], subprocess.run

    def started(command, **how):
        if command[0] != sys.executable:
            return run(command, **how)
        commands.append(command)
        return types.SimpleNamespace(returncode=1)

    def with_fate(fate):
        backend = Backend(fate)
        monkeypatch.setattr(tuning, "CudaBackend", lambda setup, ahead: backend)
        return backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "unavailable", lambda device: None)
    monkeypatch.setattr(bench, "setup", lambda dtype, quick: None)
    monkeypatch.setattr(tuning.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(bench_command.subprocess, "run", started)
    return with_fate, commands


def test_an_interrupted_tuning_keeps_what_it_measured_and_goes_on(monkeypatch, tuned):
    table, asked = [], []

    def fate(case, tried):
        if len(asked) == limit:
            raise KeyboardInterrupt
        asked.append(case.name)
        return Timings({tried[0]: 1.0}, 2.0, {tried[1]: "wrong: output 0 is off"})

    tuned[0](fate)
    monkeypatch.setattr(tiles, "load", lambda: tuple(table))
    monkeypatch.setattr(tuning, "keep", lambda entries: table.__setitem__(slice(None), entries))
    for limit in (2, 4):
        invoke("conv_wgrad", "--tune", code=130)
        assert len(table) == limit
    assert len(set(asked)) == 4


def test_a_tuning_goes_on_in_another_process_after_a_tile_lost_the_device(tuned):
    with_fate, commands = tuned
    lost = "AcceleratorError: an illegal memory access"
    backend = with_fate(lambda case, tried: Timings({}, None, {tried[0]: lost}, lost=True))
    done = invoke("conv_wgrad", "--tune", "--quick", code=1)  # the code of the other process
    assert "1 tiles refused, 0 of them wrong" in done.stdout
    shapes = [f"--shape={shape}" for shape in backend.prepared[1:]]
    options = ["--dtype", "float16", "--tune", "--quick"]
    assert [command[1:] for command in commands] == [["-m", "profiling", "bench", "conv_wgrad", *shapes, *options]]


def test_a_bench_goes_on_in_another_process_after_a_kernel_lost_the_device(monkeypatch, tmp_path, tuned, no_gpu):
    """Each case's rows are kept before; the case that did it is not run again."""
    out, commands, measured = tmp_path / "bench.jsonl", tuned[1], []
    setup = bench.Setup(CPU, torch.float16, 2, bench.QUICK, bench.CpuTimer())
    measure = bench.measure
    monkeypatch.setattr(bench, "setup", lambda dtype, quick: setup)
    monkeypatch.setattr(bench, "lost", lambda device: True)
    monkeypatch.setattr(bench, "measure", lambda case, *more: measured.append(case.shape) or measure(case, *more))
    invoke("bn_finalize", "--quick", "--out", out, code=1)  # the code of the other process
    first, *left = (case.shape for case in cases.cases() if case.op == "bn_finalize")
    options = ["--dtype", "float16", "--quick", f"--out={out}", "--resume"]
    shapes = [f"--shape={shape}" for shape in left]
    assert [command[3:] for command in commands] == [["bench", "bn_finalize", *shapes, *options]]
    assert measured == ours(out) == [first]


def test_on_a_gpu_facts_follow_their_case_without_a_compilation(monkeypatch, tmp_path):
    """A case whose facts cannot be had keeps its timings."""
    out = tmp_path / "bench.jsonl"
    where = bench.Setup(torch.device("cuda"), torch.float16, 512, bench.QUICK, bench.CpuTimer())
    about = environments.environment(CPU, ROOT)

    def loaded(case, setup):
        if case.shape != "256x4x4":
            raise RuntimeError("no disassembler")
        about = (case.name, case.op, "", case.shape, "float16", "bn_finalize_kernel", "NVIDIA H200", 90)
        return [kernel_facts.KernelFacts(*about, "measured", "read", 40)]

    def measure(case, setup, providers):
        samples = bench.Samples(us=[1.0, 2.0, 3.0])
        cost = case.cost(*case.operands(OperandFactory(2, CPU)))
        return [bench._result(case, where, cost, bench.OURS, "hot", samples, {}, {bench.OURS: 0.1})]

    monkeypatch.setattr(bench, "setup", lambda dtype, quick: where)
    monkeypatch.setattr(bench, "lost", lambda device: False)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(kernel_facts, "loaded_facts", loaded)
    monkeypatch.setattr(kernel_facts, "kernel_facts", lambda *arguments: pytest.fail("compiled"))
    monkeypatch.setattr(environments, "environment", lambda device, root: about)
    done = invoke(*FIRST, *SECOND, "--out", out)
    found = [(row["kind"], row["shape"]) for row in read_jsonl(out)]
    assert found == [("timing", "256x4x4"), ("facts", "256x4x4"), ("timing", "512x4x4")]
    assert "warning: bn_finalize 512x4x4: no facts of its kernels: RuntimeError: no disassembler" in done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_short_list_is_a_dozen_cases(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda case, setup, providers: asked.append((case.name, providers)) or [])
    invoke("--short")
    assert {name for name, _ in asked} == set(cases.SHORT)
    assert len(asked) == 12
    assert all(bench.MAX_AUTOTUNE not in providers and bench.COMPILED in providers for _, providers in asked)
