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
from profiling.bench import cases, kernel_facts, precompile, tuning
from profiling.bench import command as bench_command
from profiling.bench import measure as bench
from profiling.bench.ahead_of_time import Facts
from profiling.bench.case import OperandFactory, with_moments
from profiling.bench.tuning import Timings
from profiling.device import environment as environments
from profiling.device.environment import environment
from profiling.output.errors import CommandError
from profiling.output.files import read_jsonl


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, whose compiler says the same of every kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled = Facts("", 90, registers=40, warps=4)
    monkeypatch.setattr(kernel_facts.kernel_facts, "__defaults__", (lambda builds: [compiled] * len(builds),))


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.usefixtures("no_gpu")
def test_one_case_on_a_cpu(tmp_path):
    out = tmp_path / "bench.jsonl"
    done = invoke("bn_stats", "--shape", "256x4x4", "--quick", "--json", "--out", out)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert document["rows"] == read_jsonl(out)
    timings = {row["provider"]: row for row in document["rows"] if row["kind"] == "timing"}
    assert timings["eager channels_last"]["us"]["status"] == "measured"
    assert timings["ours"]["us"] == {"value": None, "unit": "us", "status": "unavailable", "source": "no CUDA GPU"}
    assert "max-autotune" not in timings
    (facts,) = (row for row in document["rows"] if row["kind"] == "facts")
    assert (facts["kernel"], facts["gpu"], facts["registers"]) == ("bn_stats_kernel", "sm_90", 40)
    assert "CPU reference timings" in done.stderr

    again = invoke("bn_stats", "--shape", "256x4x4", "--quick", "--compare", out)
    assert again.exit_code == 0, again.output
    assert " -> " in again.stdout
    assert len(read_jsonl(out)) == len(document["rows"])


@pytest.mark.usefixtures("no_gpu")
def test_results_of_another_machine_are_refused_before_anything_is_timed(tmp_path):
    out = tmp_path / "bench.jsonl"
    assert invoke("bn_finalize", "--shape", "256x4x4", "--quick", "--out", out).exit_code == 0
    out.write_text(
        out.read_text().replace('"torch": "', '"torch": "1.').replace('"fingerprint": "', '"fingerprint": "x')
    )
    done = invoke("bn_finalize", "--shape", "256x4x4", "--quick", "--compare", out)
    assert done.exit_code == 2
    assert "torch: 1." in done.stderr
    assert "provider" not in done.stdout


BAD = {
    "unknown_op": (("conv_fpro",), "did you mean conv_fprop?"),
    "far_from_any_op": (("zzz",), "expected one of augment, conv_fprop"),
    "unknown_dtype": (("--dtype", "float61"), "did you mean float16?"),
    "unknown_shape": (("bn_stats", "--shape", "64x32x3"), "did you mean 64x32x32?"),
    "shape_of_another_op": (("conv_wgrad", "--shape", "64x32x32"), "is unknown"),
    "out_is_a_folder": (("--out", "."), "expected a file"),
    "out_in_no_folder": (("--out", "no/such/folder/x.jsonl"), "expected a file in a folder that exists"),
    "compare_with_nothing": (("--compare", "no-such-file"), "no such file"),
    "nothing_to_tune": (("bn_stats", "--tune"), "no tiles to tune"),
    "tune_and_compare": (("--tune", "--json"), "leave --json out"),
    "check_and_compare": (("--check", "--json"), "--check times nothing; leave --json out"),
    "check_quickly": (("--check", "--quick"), "leave --quick out"),
    "jobs_without_check": (("--jobs", "2"), "without --check there is nothing to spread or to limit; leave --jobs out"),
    "no_jobs": (("--check", "--jobs", "0"), "--jobs is 0, expected a positive number"),
    "short_of_nothing": (("bn_finalize", "--short"), "--short has none of these; it is augment 3x32x32, "),
    "resume_nothing": (("--resume",), "--resume goes on with what --out holds"),
    "unknown_option": (("--tunes",), "No such option"),
}


@pytest.mark.parametrize(("arguments", "line"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(arguments, line):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert line in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.usefixtures("no_gpu")
def test_tuning_needs_a_gpu():
    done = invoke("--tune")
    assert done.exit_code == 4
    assert done.stderr.count("\n") == 1
    assert "needs a CUDA GPU" in done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_a_kernel_found_wrong_is_exit_1(monkeypatch):
    from profiling.bench import gate

    monkeypatch.setattr(gate.Correctness, "refusal", lambda gate, result: "off")
    monkeypatch.setattr(
        bench, "_why_not", lambda provider, device: None if provider in (bench.EAGER, bench.OURS) else "not here"
    )
    done = invoke("bn_finalize", "--shape", "256x4x4", "--quick")
    assert done.exit_code == 1
    assert "unavailable: wrong: off" in done.stdout


def test_a_slip_of_the_finger_does_not_import_torch():
    code = (
        "import sys, profiling.__main__ as m\n"
        "try: m.app(['bench', 'bn_stat'])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
    assert "did you mean bn_stats?" in done.stderr


def test_a_disk_that_fills_up_is_one_line(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(CommandError, match="No space left"), bench_command._disk_errors(tmp_path / "x"):
        full()


@pytest.mark.parametrize("jobs", [(), ("--jobs", "1")], ids=["in_processes", "in_this_one"])
def test_kernels_are_checked_without_being_timed(tmp_path, jobs):
    out = tmp_path / "checks.jsonl"
    done = invoke(
        "bn_finalize", "--shape", "256x4x4", "--shape", "512x4x4", "--check", "--images", 2, "--out", out, *jobs
    )
    assert done.exit_code == 0, done.output
    assert [line.split()[-3:] for line in done.stdout.splitlines()[:2]] == [["2", "images", "right"]] * 2
    assert "2 of 2 checks of 2 cases on" in done.stdout
    assert done.stdout.endswith(": 2 right, 0 wrong, 0 failed, 0 unknown\n")
    rows = read_jsonl(out)
    assert [(r["case"], r["op"], r["batch"], r["status"], r["error"]) for r in rows] == [
        (f"bn_finalize {shape}", "bn_finalize", 2, "right", None) for shape in ("256x4x4", "512x4x4")
    ]


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (lambda x: (1.01 * x, x.new_empty((3, 0, 64))), "wrong: output 0 is off by"),
        (lambda x: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "raises"],
)
def test_a_wrong_kernel_is_named_and_those_after_it_are_checked(monkeypatch, ours, says):
    case = next(c for c in cases.cases() if c.op == "bn_finalize")
    broken = dataclasses.replace(
        case, op="conv_fprop", shape="64x32x32-64x3x3-s1", operands=lambda d: (d.activation(64, 4),),
        library=lambda x: (x,), ours=ours, comparable=with_moments,
    )  # fmt: skip
    monkeypatch.setattr(cases, "cases", lambda: (broken, case))
    done = invoke("--check", "--jobs", 1, "--images", 2)
    assert done.exit_code == 1
    first, second, last = done.stdout.splitlines()
    assert says in first
    assert re.search(r"  \(\d+x\d+x\d+ \d warps .*\)$", first), "the tile that it ran with"
    assert second.endswith("right")
    assert ": 1 right, " in last


def test_kernels_that_cannot_run_are_not_checked(monkeypatch):
    monkeypatch.setattr(jit, "unavailable", lambda device: "there is no GPU")
    done = invoke("--check")
    assert (done.exit_code, done.stderr) == (4, "error: --check runs the kernels: there is no GPU\n")


def test_an_interrupted_tuning_keeps_what_it_measured_and_goes_on_from_there(monkeypatch):
    table, asked = [], []

    class Backend:
        gpu = Gpu("NVIDIA H200", (9, 0))

        def __init__(self, setup, ahead):
            self.left = 2

        def prepare(self, problems):
            assert len(problems) > 2

        def time(self, case, tried, incumbent):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            asked.append(case.name)
            return Timings({incumbent: 1.0}, 2.0, {tried[1]: "wrong: output 0 is off"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "unavailable", lambda device: None)
    monkeypatch.setattr(bench, "setup", lambda dtype, quick: None)
    monkeypatch.setattr(tuning, "CudaBackend", Backend)
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(tiles, "load", lambda: tuple(table))
    monkeypatch.setattr(tiles, "dump", lambda entries: table.__setitem__(slice(None), entries))
    for measured in (2, 4):
        assert invoke("conv_wgrad", "--tune").exit_code == 130
        assert len(table) == measured
    assert len(set(asked)) == 4


def command_run(commands):
    """A `subprocess.run` that notes the commands of the program's own and lets git through."""
    run = subprocess.run

    def noting(command, **how):
        if command[0] != sys.executable:
            return run(command, **how)
        commands.append(command)
        return types.SimpleNamespace(returncode=1)

    return noting


def test_a_tuning_goes_on_in_another_process_when_a_tile_took_the_device_down(monkeypatch):
    asked, commands = [], []

    class Backend:
        gpu = Gpu("NVIDIA H200", (9, 0))

        def __init__(self, setup, ahead):
            pass

        def prepare(self, problems):
            asked.extend(problem.case().shape for problem in problems)

        def time(self, case, tried, incumbent):
            return Timings({}, None, {incumbent: "AcceleratorError: an illegal memory access"}, lost=True)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "unavailable", lambda device: None)
    monkeypatch.setattr(bench, "setup", lambda dtype, quick: None)
    monkeypatch.setattr(tuning, "CudaBackend", Backend)
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(bench_command.subprocess, "run", command_run(commands))
    done = invoke("conv_wgrad", "--tune", "--quick")
    assert done.exit_code == 1, "as the other process"
    assert "1 tiles refused, 0 of them wrong" in done.stdout
    (command,) = commands
    shapes = [f"--shape={shape}" for shape in asked[1:]]
    assert command[1:] == ["-m", "profiling", "bench", "conv_wgrad", *shapes, "--dtype", "float16", "--tune", "--quick"]


def test_a_bench_goes_on_in_another_process_when_a_kernel_took_the_device_down(monkeypatch, tmp_path, no_gpu):
    """Each case's rows are kept before; the case that did it is not run again."""
    measured, commands, out = [], [], tmp_path / "bench.jsonl"
    monkeypatch.setattr(bench, "lost", lambda device: True)
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda case, *more: measured.append(case.shape) or measure(case, *more))
    monkeypatch.setattr(bench_command.subprocess, "run", command_run(commands))
    assert invoke("bn_finalize", "--quick", "--out", out).exit_code == 1, "as the other process"
    (first,) = measured
    (command,) = commands
    shapes = [case.shape for case in cases.cases() if case.op == "bn_finalize"]
    assert first == shapes.pop(0)
    options = ["--dtype", "float16", "--quick", f"--out={out}", "--resume"]
    assert command[3:] == ["bench", "bn_finalize", *(f"--shape={shape}" for shape in shapes), *options]
    assert {row["shape"] for row in read_jsonl(out) if row["kind"] == "timing"} == {first}


def test_on_a_gpu_nothing_is_compiled_for_the_facts_and_they_follow_their_case(monkeypatch, tmp_path):
    """And a case whose facts cannot be had keeps its timings."""
    out, cpu = tmp_path / "bench.jsonl", torch.device("cpu")
    where = bench.Setup(torch.device("cuda"), torch.float16, 512, bench.QUICK, bench.CpuTimer())
    about = environment(cpu, ROOT)

    def loaded(case, setup):
        if case.shape != "256x4x4":
            raise RuntimeError("no disassembler")
        about = (case.name, case.op, "", case.shape, "float16", "bn_finalize_kernel", "NVIDIA H200", 90)
        return [kernel_facts.KernelFacts(*about, "measured", "read", 40)]

    def measure(case, setup, providers):
        samples = bench.Samples(us=[1.0, 2.0, 3.0])
        cost = case.cost(*case.operands(OperandFactory(2, cpu)))
        return [bench._result(case, where, cost, bench.OURS, "hot", samples, {}, {bench.OURS: 0.1})]

    monkeypatch.setattr(bench, "setup", lambda dtype, quick: where)
    monkeypatch.setattr(bench, "lost", lambda device: False)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(kernel_facts, "loaded_facts", loaded)
    monkeypatch.setattr(kernel_facts, "kernel_facts", lambda *arguments: pytest.fail("compiled"))
    monkeypatch.setattr(environments, "environment", lambda device, root: about)
    done = invoke("bn_finalize", "--shape", "256x4x4", "--shape", "512x4x4", "--out", out)
    assert done.exit_code == 0, done.output
    assert [(row["kind"], row["shape"]) for row in read_jsonl(out)] == [
        ("timing", "256x4x4"),
        ("facts", "256x4x4"),
        ("timing", "512x4x4"),
    ]
    assert "warning: bn_finalize 512x4x4: no facts of its kernels: RuntimeError: no disassembler" in done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_the_short_list_is_a_look_at_a_dozen_cases(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda case, setup, providers: asked.append((case.name, providers)) or [])
    assert invoke("--short").exit_code == 0
    assert {name for name, _ in asked} == set(cases.SHORT)
    assert len(asked) == 12
    assert all(bench.MAX_AUTOTUNE not in providers and bench.COMPILED in providers for _, providers in asked)


@pytest.mark.usefixtures("no_gpu")
def test_a_crash_is_not_taken_for_a_wrong_kernel(monkeypatch):
    """Exit code 1 says that all was measured, and something found wrong."""

    def crash(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "measure", crash)
    done = invoke("bn_finalize", "--shape", "256x4x4", "--quick")
    assert done.exit_code == 70
    assert "illegal memory access" in done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_what_was_measured_is_left_out_of_a_resumed_bench(tmp_path):
    out, words = tmp_path / "bench.jsonl", ("bn_finalize", "--quick", "--out", tmp_path / "bench.jsonl")
    first, second = (("--shape", "256x4x4"), ("--shape", "512x4x4"))
    assert invoke(*words, *first).exit_code == 0
    assert invoke(*words, *first, *second, "--resume").exit_code == 0
    timings = [row for row in read_jsonl(out) if row["kind"] == "timing" and row["provider"] == "ours"]
    assert [row["shape"] for row in timings] == ["256x4x4", "512x4x4"]
    of_another_machine = out.read_text().replace('"fingerprint": "', '"fingerprint": "x')
    out.write_text(of_another_machine)
    assert invoke(*words, *first, "--resume").exit_code == 0
    assert sum(row["kind"] == "timing" and row["provider"] == "ours" for row in read_jsonl(out)) == 3
