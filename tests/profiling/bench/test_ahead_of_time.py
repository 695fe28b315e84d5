"""Machine code without a GPU: what is recorded, what is compiled, and what follows from the figures."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import tiles
from kernels.bn_stats import bn_stats
from kernels.conv_fprop import conv_fprop
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad
from profiling import ROOT
from profiling.bench.ahead_of_time import LIMITS, Build, Facts, compile_all, launches, unique
from profiling.bench.kernel_facts import DEFAULT_GPUS
from profiling.bench.tuning import forced


def activation(*extents: int) -> torch.Tensor:
    return torch.empty(extents, dtype=torch.float16, memory_format=torch.channels_last)


@pytest.fixture
def statistics() -> list[Build]:
    """Of two equal launches of a small kernel."""
    with launches(DEFAULT_GPUS[1]) as builds:
        for _ in range(2):
            bn_stats(activation(2, 64, 4, 4))
    return builds


@pytest.mark.parametrize("gpu", DEFAULT_GPUS, ids=lambda gpu: gpu.name)
def test_a_launch_is_recorded_as_it_would_be_on_that_gpu(gpu):
    gpu_of = tiles.gpu_of
    with launches(gpu) as builds:
        conv_fprop(activation(4, 64, 32, 32), activation(64, 64, 3, 3))
    (build,) = builds
    tile = tiles.tile("conv_fprop", ConvShape(64, 64, 32, 32), torch.float16, gpu)
    assert build.arch == 10 * gpu.capability[0] + gpu.capability[1]
    assert (build.constexprs["BLOCK_M"], build.constexprs["BLOCK_N"]) == (tile.BLOCK_M, tile.BLOCK_N)
    assert build.signature["x"].startswith("tensordesc") == (gpu.capability >= (9, 0))
    assert build.options == {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    assert tiles.gpu_of is gpu_of


def test_the_same_code_is_compiled_once(statistics):
    assert statistics[0].integers["M"] == 2 * 4 * 4
    again = dataclasses.replace(statistics[0], label="called otherwise", programs=7, integers={})
    assert len(unique([*statistics, again])) == 1
    assert len(unique([*statistics, again.on(80)])) == 2


def test_compiling_gives_facts_also_from_a_torn_cache_and_a_failure_its_reason(statistics, tmp_path):
    """A matrix instruction has the extents of the warps, not of the block: eight are two groups, which share 128 rows
    or, where the block has but 64, its columns."""
    with launches(DEFAULT_GPUS[1]) as builds, forced(tiles.Tile(64, 128, 64, 8, 3, False)):
        conv_wgrad(activation(2, 64, 8, 8), activation(2, 128, 8, 8), 3)
    own, build = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}, statistics[0]
    broken = dataclasses.replace(build, constexprs=build.constexprs | {"BLOCK_M": 3})
    good, product, bad = compile_all([build, builds[0], broken], own)
    assert not good.error
    assert 0 < good.registers <= 255
    assert (good.spill_bytes, good.warps, good.notes) == (0, 4, [])
    assert good.count("LDG") > 0
    assert good.blocks_per_sm() > 1
    assert good.instructions_per_matrix_step() is None
    assert product.macs_per_matrix_step() == 64 * 64 * 16
    assert bad.error
    assert bad.blocks_per_sm() is None
    tear(tmp_path, ".cubin")
    assert compile_all([build], own) == [good]


def tear(cache: Path, suffix: str) -> None:
    """Cut the files in two."""
    torn = list(cache.rglob("*" + suffix))
    assert torn
    for path in torn:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
def test_facts_are_the_same_out_of_the_cache_and_of_a_torn_one(statistics, tmp_path):
    own = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    made = compile_all(statistics[:1], own)
    assert not made[0].error
    assert compile_all(statistics[:1], own) == made
    tear(tmp_path, ".json")
    assert compile_all(statistics[:1], own) == made


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
        *("warps", "blocks", "registers", "registers_rounded_up", "shared", "less_shared", "all_shared"),
        *("too_much_shared", "tensor_memory", "unknown_architecture", "did_not_compile"),
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


@pytest.mark.slow
def test_compiled_code_has_the_key_that_a_launch_looks_for():
    """In Triton's cache, also where 16 does not divide an argument; else it is compiled twice."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/support/runtime_keys.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = [line.split() for line in done.stdout.splitlines()]
    names = {name for name, _ in found}
    assert {"sgd_kernel", "augment_kernel", "conv_fprop_kernel", "bn_stats_kernel"} <= names, done.stderr
    assert {name for name, same in found if same != "True"} == set()


def test_shared_memory_limits_of_a_block():
    """As the driver reports them for these architectures."""
    limits = {arch: limits.block_shared_bytes for arch, limits in LIMITS.items()}
    assert limits == {80: 166_912, 90: 232_448, 100: 232_448}
