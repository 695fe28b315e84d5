"""Machine code without a GPU: what is recorded, what is compiled, and what follows from the figures."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from kernels import tiles
from kernels.bn_apply import bn_apply
from kernels.bn_stats import bn_stats
from kernels.conv_fprop import conv_fprop
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad
from kernels.tiles import Gpu
from profiling import ROOT
from profiling.bench.ahead_of_time import LIMITS, Facts, compile_all, launches, unique
from profiling.bench.batchnorm_cases import bn_relu_case
from profiling.bench.conv_cases import conv_fprop_case
from profiling.bench.kernel_facts import DEFAULT_GPUS, kernel_facts
from profiling.bench.tuning import forced

SHAPE = ConvShape(64, 64, 32, 32)


@pytest.fixture
def convolution():
    x, w = (
        torch.empty(extents, dtype=torch.float16, memory_format=torch.channels_last)
        for extents in ((512, 64, 32, 32), (64, 64, 3, 3))
    )
    return lambda: conv_fprop(x, w)


@pytest.mark.parametrize("gpu", DEFAULT_GPUS, ids=lambda gpu: gpu.name)
def test_a_launch_is_recorded_as_it_would_be_on_that_gpu(convolution, gpu):
    gpu_of = tiles.gpu_of
    with launches(gpu) as builds:
        convolution()
    (build,) = builds
    tile = tiles.tile("conv_fprop", SHAPE, torch.float16, gpu)
    assert build.arch == 10 * gpu.capability[0] + gpu.capability[1]
    assert {name: build.constexprs[name] for name in ("BLOCK_M", "BLOCK_N")} == {
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
    }
    assert build.signature["x"].startswith("tensordesc") == (gpu.capability >= (9, 0))
    assert build.options == {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    assert tiles.gpu_of is gpu_of


def test_the_same_code_is_compiled_once():
    x = torch.empty(2, 64, 4, 4, dtype=torch.float16, memory_format=torch.channels_last)
    with launches() as builds:
        bn_stats(x)
        bn_stats(x)
    assert builds[0].integers["M"] == 2 * 4 * 4
    again = dataclasses.replace(builds[0], label="called otherwise", programs=7, integers={})
    assert len(unique([*builds, again])) == 1
    assert len(unique([*builds, again.on(80)])) == 2


def test_compiling_gives_facts_and_a_failure_its_reason():
    x = torch.empty(2, 64, 4, 4, dtype=torch.float16, memory_format=torch.channels_last)
    with launches() as (builds):
        bn_stats(x)
    broken = dataclasses.replace(builds[0], constexprs=builds[0].constexprs | {"BLOCK_M": 3})
    good, bad = compile_all([builds[0].on(90), broken])
    assert not good.error
    assert 0 < good.registers <= 255
    assert (good.spill_bytes, good.warps, good.notes) == (0, 4, [])
    assert good.count("LDG") > 0
    assert good.blocks_per_sm() > 1
    assert good.instructions_per_matrix_step() is None
    assert bad.error
    assert bad.blocks_per_sm() is None


def test_what_comes_out_of_the_cache_is_known_as_well(tmp_path):
    x = torch.empty(2, 64, 4, 4, dtype=torch.float16, memory_format=torch.channels_last)
    with launches() as builds:
        bn_stats(x)
    own = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    made, kept = (compile_all([builds[0].on(90)], own) for _ in range(2))
    assert made == kept
    assert made[0].registers > 0


# By the rules of the CUDA C++ Programming Guide: 65,536 registers, warps get them in units of 256.
@pytest.mark.parametrize(
    ("facts", "blocks"),
    [
        (Facts("", 90, registers=32, warps=4), 16),
        (Facts("", 90, registers=16, warps=1), 32),
        (Facts("", 90, registers=168, warps=4), 3),
        (Facts("", 90, registers=169, warps=4), 2),
        (Facts("", 90, registers=32, warps=4, shared_bytes=72 * 1024), 3),
        (Facts("", 80, registers=32, warps=4, shared_bytes=72 * 1024), 2),
        (Facts("", 90, registers=32, warps=4, shared_bytes=227 * 1024), 1),
        (Facts("", 90, registers=32, warps=4, shared_bytes=227 * 1024 + 1), 0),
        (Facts("", 100, registers=32, warps=4, tensor_columns=256), 2),
        (Facts("", 75, registers=32, warps=4), None),
        (Facts("", 90, error="no"), None),
    ],
    ids=[
        "warps",
        "blocks",
        "registers",
        "registers_rounded_up",
        "shared",
        "less_shared",
        "all_shared",
        "too_much_shared",
        "tensor_memory",
        "unknown_architecture",
        "did_not_compile",
    ],
)
def test_blocks_per_multiprocessor(facts, blocks):
    assert facts.blocks_per_sm() == blocks


def test_instructions_per_matrix_step_are_of_the_innermost_loop_with_one():
    loops = [{"LDG.E": 5, "BRA": 1}, {"HGMMA.64x64x16.F32": 4, "IADD3": 92}, {"HGMMA.64x64x16.F32": 4, "IADD3": 300}]
    assert Facts("", 90, loops=loops).instructions_per_matrix_step() == 24.0
    assert Facts("", 80, loops=loops).instructions_per_matrix_step() is None
    assert Facts("", 90, loops=loops).macs_per_matrix_step() == 64 * 64 * 16
    assert Facts("", 80, loops=loops).macs_per_matrix_step() is None


def test_a_matrix_instruction_has_the_extents_that_the_warps_have_and_not_the_block():
    """Eight warps are two groups, which share 128 rows or, where the block has but 64, its columns."""
    x, dy = (torch.empty(2, k, 8, 8, dtype=torch.float16, memory_format=torch.channels_last) for k in (64, 128))
    tile = tiles.Tile(64, 128, 64, 8, 3, False)
    with launches(Gpu("sm_90", (9, 0))) as builds, forced(tile):
        conv_wgrad(x, dy, 3)
    (facts,) = compile_all(builds[:1])
    assert facts.macs_per_matrix_step() == 64 * 64 * 16


def test_what_was_compiled_ahead_of_time_is_what_a_launch_looks_for():
    """Under the same key of Triton's cache, also where 16 does not divide an argument; else it is compiled twice."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/support/runtime_keys.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = [line.split() for line in done.stdout.splitlines()]
    names = {name for name, _ in found}
    assert {"sgd_kernel", "augment_kernel", "conv_fprop_kernel", "bn_stats_kernel"} <= names, done.stderr
    assert {name for name, same in found if same != "True"} == set()


def test_shared_memory_limits_of_a_block():
    """What one block may use, as the driver reports it for these architectures."""
    assert {arch: limits.block_shared_bytes for arch, limits in LIMITS.items()} == {
        80: 166_912,
        90: 232_448,
        100: 232_448,
    }


def test_facts_of_cases_name_case_kernel_and_gpu():
    seen = []

    def compile_(builds):
        seen.extend(builds)
        return [
            Facts(build.label, build.arch, error="" if build.arch == 90 else "no\nmore", registers=40, warps=4)
            for build in builds
        ]

    gpus = (Gpu("sm_80", (8, 0)), Gpu("sm_90", (9, 0)))
    cases = [bn_relu_case(64, 32, ""), bn_relu_case(64, 32, ""), conv_fprop_case(SHAPE, "statistics")]
    facts = kernel_facts(cases, gpus, torch.float16, compile_)
    assert len(seen) == 2 * 4  # statistics, finalize, apply, convolution: each once for each architecture
    assert [f.kernel for f in facts if f.case.startswith("conv_fprop")] == [
        "conv_fprop_kernel",
        "conv_fprop_lines_kernel",
    ]
    assert len([f for f in facts if f.kernel == "bn_apply_kernel"]) == 4
    for f in facts:
        if f.gpu == "sm_90":
            assert (f.status, f.registers, f.blocks_per_sm) == ("measured", 40, 12)
        else:
            assert (f.status, f.source, f.registers, f.blocks_per_sm) == ("unavailable", "no", None, None)


def test_a_torn_file_in_tritons_cache_is_compiled_again(tmp_path, monkeypatch):
    x = torch.empty(2, 64, 4, 4, dtype=torch.float16, memory_format=torch.channels_last)
    scale = torch.ones(64)
    with launches(DEFAULT_GPUS[1]) as builds:
        bn_apply(x, scale, scale)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    whole = compile_all(builds)
    assert not whole[0].error
    for suffix in (".cubin", ".json"):
        torn = {path: path.read_bytes() for path in tmp_path.rglob("*" + suffix)}
        assert torn
        for path, data in torn.items():
            path.write_bytes(data[: len(data) // 2])
        assert compile_all(builds) == whole, suffix
        for path, data in torn.items():
            path.write_bytes(data)
