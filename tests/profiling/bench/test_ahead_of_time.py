"""Machine code without a GPU: recorded launches, their compilation, and the figures that follow."""

import dataclasses
import json
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
    """Two equal launches of a small kernel."""
    with launches(DEFAULT_GPUS[1]) as builds:
        for _ in range(2):
            bn_stats(activation(2, 64, 4, 4))
    return builds


@pytest.mark.parametrize("gpu", DEFAULT_GPUS, ids=lambda gpu: gpu.name)
def test_launch_is_recorded_as_on_that_gpu(gpu):
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


def test_equal_code_is_compiled_once(statistics):
    assert statistics[0].integers["M"] == 2 * 4 * 4
    again = dataclasses.replace(statistics[0], label="called otherwise", programs=7, integers={})
    assert len(unique([*statistics, again])) == 1
    assert len(unique([*statistics, again.on(80)])) == 2


def tear(cache: Path, suffix: str) -> None:
    """Cut the files in two."""
    torn = list(cache.rglob("*" + suffix))
    assert torn
    for path in torn:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_compilation_gives_facts_or_a_reason_also_with_a_torn_cache(statistics, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one process, which imports Triton once
    own, build = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}, statistics[0]
    good, bad = compile_all([build, dataclasses.replace(build, constexprs=build.constexprs | {"BLOCK_M": 3})], own)
    assert (good.error, good.spill_bytes, good.warps, good.notes) == ("", 0, 4, [])
    assert 0 < good.registers <= 255
    assert good.count("LDG") > 0
    assert good.blocks_per_sm() > 1
    assert good.instructions_per_matrix_step() is None
    assert bad.error
    assert bad.blocks_per_sm() is None
    tear(tmp_path, ".cubin")
    assert compile_all([build], own) == [good]


@pytest.mark.slow
def test_facts_are_equal_out_of_the_cache_and_a_matrix_instruction_has_its_warps_extents(statistics, tmp_path):
    """Eight warps are two groups, which share 128 rows or, where the block has but 64, its columns."""
    with launches(DEFAULT_GPUS[1]) as products, forced(tiles.Tile(64, 128, 64, 8, 3, False)):
        conv_wgrad(activation(2, 64, 8, 8), activation(2, 128, 8, 8), 3)
    own, builds = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}, [statistics[0], products[0]]
    made = compile_all(builds, own)
    assert [facts.error for facts in made] == ["", ""]
    assert made[1].macs_per_matrix_step() == 64 * 64 * 16
    assert compile_all(builds, own) == made
    tear(tmp_path, ".json")
    assert compile_all(builds[:1], own) == made[:1]


# By the rules of the CUDA C++ Programming Guide: 65,536 registers, warps get them in units of 256.
@pytest.mark.parametrize(
    ("arch", "changes", "blocks"),
    [
        (90, {}, 16),
        (90, {"registers": 16, "warps": 1}, 32),
        (90, {"registers": 168}, 3),
        (90, {"registers": 169}, 2),
        (90, {"shared_bytes": 72 * 1024}, 3),
        (80, {"shared_bytes": 72 * 1024}, 2),
        (90, {"shared_bytes": 227 * 1024}, 1),
        (90, {"shared_bytes": 227 * 1024 + 1}, 0),
        (100, {"tensor_columns": 256}, 2),
        (75, {}, None),
        (90, {"error": "no"}, None),
    ],
    ids=str,
)
def test_blocks_per_multiprocessor(arch, changes, blocks):
    assert Facts("", arch, **{"registers": 32, "warps": 4} | changes).blocks_per_sm() == blocks


def test_matrix_steps_are_of_the_innermost_loop_with_one():
    loops = [{"LDG.E": 5, "BRA": 1}, {"HGMMA.64x64x16.F32": 4, "IADD3": 92}, {"HGMMA.64x64x16.F32": 4, "IADD3": 300}]
    hopper, ampere = Facts("", 90, loops=loops), Facts("", 80, loops=loops)
    assert (hopper.instructions_per_matrix_step(), hopper.macs_per_matrix_step()) == (24.0, 64 * 64 * 16)
    assert (ampere.instructions_per_matrix_step(), ampere.macs_per_matrix_step()) == (None, None)


@pytest.mark.slow
def test_compiled_code_has_the_cache_key_of_a_launch():
    """Also where 16 does not divide an argument; else a kernel is compiled twice."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/support/runtime_builds.py", "keys"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"sgd_kernel", "augment_kernel", "conv_fprop_kernel", "bn_stats_kernel"} <= {name for name, _ in found}
    assert {name for name, same in found if not same} == set()


def test_shared_memory_limits_of_a_block():
    """The driver reports these for the architectures."""
    limits = {arch: limits.block_shared_bytes for arch, limits in LIMITS.items()}
    assert limits == {80: 166_912, 90: 232_448, 100: 232_448}
