"""Rows of the benchmark on disk and in print."""

import dataclasses
import json

import pytest
import torch

from profiling.bench import table
from profiling.bench.kernel_facts import KernelFacts
from profiling.bench.measure import EAGER, OURS, Number, Result, Setup
from profiling.bench.timing import QUICK, CpuTimer
from profiling.device.ceilings import Ceiling, Ceilings
from profiling.output.files import append_jsonl

GPU = {"name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 150_000_000_000, "multiprocessors": 132}
GPU |= {"driver": "570.1", "sm_clock_mhz": 1980, "memory_clock_mhz": 3201, "power_limit_w": 700.0}
ENVIRONMENT = {
    **{"device": "cuda:0", "gpu": GPU, "cpu": "a processor", "cores": 16, "threads": 16, "cpu_capability": "AVX512"},
    **{"platform": "Linux", "packages": {"torch": "2.13.0", "triton": "3.6.0", "numpy": "2.3"}},
    **{"cuda": "13.0", "cudnn": 91000, "git_sha": "abc", "git_dirty": False},
}
ON_CPU = ENVIRONMENT | {"device": "cpu", "gpu": None, "cuda": None, "cudnn": None}
MACHINE = table.machine(ENVIRONMENT)
SETUP = Setup(torch.device("cpu"), torch.float16, 512, QUICK, CpuTimer())


def result(us: float = 100.0, provider: str = EAGER, **changes) -> Result:
    r = Result(
        **{"case": "bn_stats 64x32x32", "op": "bn_stats", "variant": "", "shape": "64x32x32"},
        **{"dtype": "float16", "batch": 512, "provider": provider, "mode": "cold"},
        us=Number(us, "us", "measured", "script"),
        first_call_s=Number(0.5, "s", "measured", "wall clock"),
        tflops_per_s=Number(1.5, "TFLOP/s", "modelled", "work"),
        gb_per_s=Number(3456.7, "GB/s", "modelled", "work"),
        bound="memory",
        samples_us=tuple(us + i / 10 for i in range(30)),
    )
    return dataclasses.replace(r, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bench.jsonl"


def write(path, results, environment=ENVIRONMENT) -> list[dict]:
    rows = [table.row(r, environment) for r in results]
    for row in rows:
        append_jsonl(path, row)
    return rows


def test_rows_of_this_machine_come_back_from_disk(path):
    write(path, [result(us=50.0)], ON_CPU)
    rows = write(path, [result(), result(provider=OURS)])
    loaded = table.load(path, MACHINE)
    assert loaded == json.loads(json.dumps(rows))
    assert (loaded[0]["schema"], loaded[0]["kind"], loaded[0]["git_sha"]) == (1, "timing", "abc")
    assert loaded[0]["us"] == {"value": 100.0, "unit": "us", "status": "measured", "source": "script"}


OTHERS = {
    "another_gpu": (ENVIRONMENT | {"gpu": GPU | {"name": "NVIDIA H100"}}, "gpu: NVIDIA H100 there, NVIDIA H200 here"),
    "another_driver": (ENVIRONMENT | {"gpu": GPU | {"driver": "560.2"}}, "driver: 560.2 there, 570.1 here"),
    "another_triton": (ENVIRONMENT | {"packages": {"torch": "2.13.0", "triton": "3.9.0"}}, "triton: 3.9.0 there"),
    "a_processor": (ON_CPU, "device: cpu there, cuda here"),
}


@pytest.mark.parametrize(("environment", "difference"), OTHERS.values(), ids=OTHERS)
def test_rows_of_another_machine_are_refused_naming_the_differences(path, environment, difference):
    write(path, [result()], environment)
    with pytest.raises(ValueError, match="from another machine") as error:
        table.load(path, MACHINE)
    assert difference in str(error.value)
    assert str(error.value).count(" there, ") == 1 or environment is ON_CPU


def test_commit_and_clock_are_not_part_of_the_machine():
    later = ENVIRONMENT | {"git_sha": "def", "git_dirty": True, "gpu": GPU | {"sm_clock_mhz": 1200}}
    assert table.machine(later) == MACHINE


@pytest.mark.parametrize(
    "text", ['{"schema": 2, "kind": "timing"}\n', '["a", "list"]\n', ""], ids=["newer", "list", "none"]
)
def test_foreign_files_are_refused(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected rows with schema 1|no timings"):
        table.load(path, MACHINE)
    path.write_text('{"kind": "timing"}\n')
    with pytest.raises(ValueError, match="expected rows as `python -m profiling bench --out` writes them"):
        table.finished(path, ENVIRONMENT, SETUP)


def test_a_case_is_finished_with_our_last_row_of_this_commit_and_batch(path):
    last = result(provider=OURS, mode="hot")
    write(path, [result(mode="hot"), result(provider=OURS, mode="cold"), dataclasses.replace(last, batch=8)])
    write(path, [last], ENVIRONMENT | {"git_sha": "def"})
    assert table.finished(path, ENVIRONMENT, SETUP) == set()
    write(path, [last])
    assert table.finished(path, ENVIRONMENT, SETUP) == {last.case}


def test_changes_compare_equal_keys_that_were_measured():
    nothing = dataclasses.replace(result(mode="hot"), samples_us=(), us=Number(None, "us", "unavailable", "no GPU"))
    then = [result(us=200.0), result(us=100.0), result(us=70.0, provider=OURS), nothing]
    now = [result(us=50.0), result(us=70.0, provider=OURS), result(us=1.0, batch=8), nothing]
    faster, same = table.changes(*([table.row(r, ENVIRONMENT) for r in results] for results in (then, now)))
    assert (faster.then_us, faster.now_us, faster.verdict.word) == (100.0, 50.0, "FAST")
    assert str(faster).split()[2:8] == ["cold", "eager", "channels_last", "100.0", "->", "50.0"]
    assert (same.provider, same.verdict.word) == (OURS, "SAME")


def test_lines_have_the_figures_or_the_reason():
    speedup = Number(1.5, "x", "measured", "script")
    judged = {"speedup": speedup, "speedup_low": 1.4, "speedup_high": 1.6, "verdict": "FAST", "converged": True}
    ours = result(provider=OURS, best_alternative="torch.compile", **judged)
    none = {name: Number(None, "us", "unavailable", "no CUDA GPU") for name in ("us", "tflops_per_s", "gb_per_s")}
    missing = dataclasses.replace(ours, samples_us=(), speedup=None, **none)
    first, second = (line.split()[3:] for line in table.lines([ours, missing]))
    assert first[:5] == [OURS, "100.0", "~1.5", "~3,456.7", "memory"]
    assert " ".join(first[5:]) == "1.50 [1.40, 1.60] FAST vs torch.compile"
    assert " ".join(second) == "ours unavailable: no CUDA GPU"
    (capped,) = table.lines([dataclasses.replace(ours, power_capped_share=0.8)])
    assert capped.endswith("FAST vs torch.compile, power cap in 80% of the samples")
    about = ("conv_fprop x", "conv_fprop", "", "x", "float16", "conv_fprop_kernel", "sm_90", 90)
    good = KernelFacts(*about, "measured", "read", 106, 0, 0, 81_968, 2, 33.2)
    *_, good_line, bad_line = table.fact_lines([good, KernelFacts(*about, "unavailable", "CompilationError: no")])
    assert good_line.split()[2:] == ["conv_fprop_kernel", "sm_90", "106", "0", "81,968", "2", "33.2"]
    assert bad_line.endswith("unavailable: CompilationError: no")
    assert table.row(good, ENVIRONMENT)["kind"] == "facts"


def test_heading_names_machine_and_ceilings():
    copy = Ceiling("copy", "1 GiB", 4.3e12, 4.2e12, "B/s", 8, 2.0)
    product = Ceiling("matrix product", "8192^3", 6.5e14, 6.4e14, "FLOP/s", 8, 2.0, "float16", 0.97)
    held = None, ("hardware thermal slowdown", "power cap"), (), "x"
    ceilings = Ceilings("NVIDIA H200", "float16", [product], [], copy, copy, *held)
    setup = dataclasses.replace(SETUP, ceilings=ceilings)
    text = "\n".join(table.heading(ENVIRONMENT, setup))
    for fact in ("NVIDIA H200", "1980 MHz", "driver 570.1", "torch 2.13.0", "triton 3.6.0", "git abc", "4,300 GB/s"):
        assert fact in text, fact
    assert "650 TFLOP/s (measured, power cap in 97% of the samples, hardware thermal slowdown)" in text
    setup = dataclasses.replace(setup, ceilings="no memory")
    assert table.heading(ENVIRONMENT, setup)[1].endswith("ceilings: unavailable (no memory)")
    cpu = table.heading(ON_CPU | {"git_dirty": True}, setup)
    assert cpu[0].startswith("no CUDA GPU; a processor")
    assert cpu[0].endswith("git abc (dirty)")
    assert "CPU reference timings" in cpu[1]
