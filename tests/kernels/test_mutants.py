"""Each op's check passes for the op and fails for every mutant of it, and the mutants compile."""

from pathlib import Path

import pytest
from kernel_checks import Mutants, assert_caught

pytest.importorskip("triton")

from ahead_of_time import compiling, launches
from checks import augment, blocks, bn_apply, bn_backward, bn_stats, conv_dgrad, conv_fprop, conv_wgrad, prologue, sgd

from kernels import jit
from kernels.tiles import Gpu

FILES = (augment, bn_apply, bn_stats, bn_backward, conv_fprop, conv_dgrad, conv_wgrad, sgd, prologue, blocks)
ROWS: dict[str, Mutants] = {name: row for file in FILES for name, row in file.ROWS.items()}
GPUS = Gpu("", (8, 0)), Gpu("", (9, 0))


def cases() -> list:
    """(row, mutant); a plain run has the first mutant of each module."""
    first = {row.module: (op, next(iter(row.changes))) for op, row in reversed(ROWS.items())}.values()
    return [
        pytest.param(op, name, id=f"{op}-{name}", marks=() if (op, name) in first else pytest.mark.slow)
        for op, row in ROWS.items()
        for name in row.changes
    ]


def recorded(row: Mutants, changed) -> list:
    """The builds that a mutant launches."""
    if not row.module.__name__.startswith("kernels.conv"):
        with launches() as builds:
            row.launch(changed)
        return builds
    builds = []
    for gpu in GPUS:
        with launches(gpu) as some:
            row.launch(changed, gpu)
        builds += some
    return builds


@pytest.fixture(scope="module")
def mutants(request, tmp_path_factory) -> dict[tuple[str, str], tuple]:
    """The mutants of the tests that were selected, each with whether it compiles; compiled all together."""
    folder: Path = tmp_path_factory.mktemp("mutants")
    found = [item.callspec.params for item in request.session.items if item.originalname == "test_mutant_is_caught"]
    keys = [(one["op"], one["name"]) for one in found if jit.INTERPRETED or not ROWS[one["op"]].guarded]
    made = {(op, name): ROWS[op].make(name, folder) for op, name in keys}
    launched = {
        key: recorded(ROWS[key[0]], changed) if ROWS[key[0]].launch and jit.INTERPRETED else []
        for key, changed in made.items()
    }
    results = iter(compiling([build for builds in launched.values() for build in builds]))
    good = {key: [next(results) for _ in builds] for key, builds in launched.items()}
    return {key: (made[key], all(good[key])) for key in made}


@pytest.mark.parametrize(("op", "name"), cases())
def test_mutant_is_caught(device, mutants, op, name):
    if ROWS[op].guarded and not jit.INTERPRETED:
        pytest.skip("needs the interpreter's guard")
    changed, compiles = mutants[op, name]
    assert compiles
    assert_caught(lambda: ROWS[op].check(changed, device))


@pytest.mark.parametrize("op", [op for op, row in ROWS.items() if op == row.module.__name__.rpartition(".")[2]])
def test_the_op_itself_passes(device, op):
    if ROWS[op].guarded and not jit.INTERPRETED:
        pytest.skip("needs the interpreter's guard")
    ROWS[op].check(ROWS[op].module, device)
