"""Each op's check passes for the op and fails for every mutant of it, and the mutants compile."""

import pytest
from kernel_checks import Mutants, assert_caught

pytest.importorskip("triton")

from ahead_of_time import compiling, launches
from checks import augment, blocks, bn_apply, bn_backward, bn_stats, conv_dgrad, conv_fprop, conv_wgrad, prologue, sgd

from kernels import jit
from kernels.tiles import Gpu

FILES = (augment, bn_apply, bn_stats, bn_backward, conv_fprop, conv_dgrad, conv_wgrad, sgd, prologue, blocks)
ROWS: dict[str, Mutants] = {name: row for file in FILES for name, row in file.ROWS.items()}
OPS = [op for op, row in ROWS.items() if op == row.module.__name__.rpartition(".")[2]]
FAST = {"augment", "bn_apply", "bn_stats", "bn_backward", "prologue"}
GPUS = Gpu("", (8, 0)), Gpu("", (9, 0))


def cases() -> list:
    """(row, mutant); a plain run has the first mutant of each module."""
    first = {row.module: (op, next(iter(row.changes))) for op, row in reversed(ROWS.items())}.values()
    return [
        pytest.param(op, name, id=f"{op}-{name}", marks=() if (op, name) in first else pytest.mark.slow)
        for op, row in ROWS.items()
        for name in row.changes
    ]


def need_guard(op: str) -> None:
    if ROWS[op].guarded and not jit.INTERPRETED:
        pytest.skip("needs the interpreter's guard")


@pytest.mark.parametrize(("op", "name"), cases())
def test_mutant_is_caught(device, tmp_path, op, name):
    need_guard(op)
    changed = ROWS[op].make(name, tmp_path)
    assert_caught(lambda: ROWS[op].check(changed, device))


@pytest.mark.parametrize("op", [op if op in FAST else pytest.param(op, marks=pytest.mark.slow) for op in OPS])
def test_the_op_itself_passes(device, op):
    need_guard(op)
    ROWS[op].check(ROWS[op].module, device)


@pytest.mark.slow
@pytest.mark.skipif(not jit.INTERPRETED, reason="on a GPU they are compiled as they run")
@pytest.mark.parametrize("op", [op for op, row in ROWS.items() if row.launch])
def test_mutants_compile(tmp_path, op):
    """A convolution's tiles on an A100 and on an H100: otherwise a mutant might be caught by the compiler alone."""
    row, builds = ROWS[op], []
    for name in row.changes:
        changed = row.make(name, tmp_path)
        for gpu in GPUS if row.module.__name__.startswith("kernels.conv") else (None,):
            with launches(gpu) as some:
                row.launch(changed, *((gpu,) if gpu else ()))
            builds += [(name, build) for build in some]
    good = compiling([build for _, build in builds])
    assert [name for (name, _), compiles in zip(builds, good, strict=True) if not compiles] == []
    assert {name for name, _ in builds} == set(row.changes)
