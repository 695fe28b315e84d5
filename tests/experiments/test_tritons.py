"""What each Triton makes of the kernels: installed, asked, compiled, interpreted, kept and shown."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments import tritons, tritons_table
from experiments.__main__ import app
from experiments.study.folder import Request
from experiments.tritons import Environment, Named
from kernels.bn_apply import bn_apply
from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS
from model.errors import RunError
from model.interrupts import Interrupted
from profiling.bench import ahead_of_time
from profiling.bench.ahead_of_time import Build, Facts, launches
from profiling.output.files import read_jsonl
from profiling.output.terminal import Terminal

PTXAS = """#!/bin/sh
echo "Cuda compilation tools, release 13.3, V13.3.33"
"""


def fake_triton(folder: Path, init: str = "__version__ = '9.9.9'", ptxas: str = "here / 'ptxas'") -> Path:
    """A package that answers what is asked of a Triton before anything is compiled."""
    nvidia = folder / "triton" / "backends" / "nvidia"
    nvidia.mkdir(parents=True)
    for package in (folder / "triton" / "backends", nvidia):
        (package / "__init__.py").touch()
    (folder / "triton" / "__init__.py").write_text(init)
    (nvidia / "compiler.py").write_text(
        "from pathlib import Path\nfrom types import SimpleNamespace\nhere = Path(__file__).parent\n"
        f"def get_ptxas(arch):\n    return SimpleNamespace(path=str({ptxas}))\n"
    )
    (nvidia / "ptxas").write_text(PTXAS)
    (nvidia / "ptxas").chmod(0o755)
    return folder


@pytest.fixture
def kernels() -> list[Named]:
    """Two small ones."""
    with launches() as builds:
        for dtype in (torch.float16, torch.float32):
            x = torch.empty(2, 16, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
            bn_apply(x, torch.ones(16), torch.ones(16))
    return [Named("bn_apply", "2x16x4x4", build.on(80)) for build in builds]


@pytest.fixture
def quick(monkeypatch, kernels):
    """A command that has two kernels of one architecture, and a compiler that says the same of both; what it got."""
    asked: list[Build] = []

    def compile_all(builds, environment):
        asked.extend(builds)
        assert environment["TRITON_CACHE_DIR"]
        return [Facts(build.label, build.arch, registers=32, warps=4) for build in builds]

    monkeypatch.setattr(tritons, "recorded", lambda arch: kernels if arch == 80 else [])
    monkeypatch.setattr(ahead_of_time, "compile_all", compile_all)
    monkeypatch.setattr(tritons, "interpreted", lambda own: None)
    monkeypatch.setattr(tritons, "fingerprint", lambda: "one")
    return asked


def run(folder: Path, out: Path) -> dict:
    return tritons.run(Request(), Terminal(speaks=False), None, [str(folder)], out=out)


def command(*words: str):
    return CliRunner().invoke(app, ["tritons", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["3.x"], "3.x is neither a version, as 3.6.0, nor a folder"),
        (["."], ". is neither a version"),
        (["3.6.0", "--arch", "86"], "--arch 86 is none of 80, 90, 100"),
        (["3.6.0", "--out", __file__], "is not a folder"),
    ],
    ids=["no_version", "folder_without_triton", "unknown_architecture", "out_is_a_file"],
)
def test_a_slip_of_the_finger_is_a_line_and_exit_code_2(words, said):
    done = command(*words)
    assert done.exit_code == 2
    assert said in done.output
    assert done.output.count("\n") == 1


def test_a_version_that_cannot_be_had_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "constraints.txt").write_text("triton==3.6.0\n")  # of another environment's, as a CI has them
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    with pytest.raises(RunError, match=r"triton 0\.0\.1 cannot be installed: ERROR: No matching distribution .*folder"):
        tritons.install("0.0.1", tmp_path / "triton")


def test_a_folder_is_first_on_the_path_and_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/elsewhere/ptxas")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    place = fake_triton(tmp_path / "a")
    own = tritons.environment(place, tmp_path / "scratch")
    assert own.version == "9.9.9"
    assert own.ptxas == {"80": "13.3.33", "90": "13.3.33", "100": "13.3.33"}
    assert own.variables["PYTHONPATH"] == os.pathsep.join([str(place), "/elsewhere"])
    ours = {name: value for name, value in own.variables.items() if name.startswith("TRITON_")}
    assert ours == {"TRITON_CACHE_DIR": str(tmp_path / "scratch" / "cache")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": "raise ImportError('libtriton.so: wrong Python')"}, "ImportError: libtriton.so: wrong Python"),
        ({"init": ""}, "has no attribute '__version__'"),
        ({"ptxas": "'/bin/echo'"}, "holds no Triton that this Python can run"),
        ({"ptxas": "here.parents[2] / '..' / 'ptxas'"}, "another Triton leaks in"),
    ],
    ids=["cannot_be_imported", "is_something_else", "has_no_ptxas", "has_a_foreign_ptxas"],
)
def test_what_is_no_triton_of_its_own_is_refused(tmp_path, changes, said):
    place = fake_triton(tmp_path / "a", **changes)
    (tmp_path / "ptxas").write_text(PTXAS)
    (tmp_path / "ptxas").chmod(0o755)
    with pytest.raises(RunError, match=said):
        tritons.environment(place, tmp_path)


def test_the_installed_one_compiles_in_an_environment_of_its_own(tmp_path, kernels):
    place = Path(importlib.util.find_spec("triton").origin).resolve().parent.parent
    own = tritons.environment(place, tmp_path)
    (row,) = tritons._compiled(kernels[:1], own)
    assert own.version == __import__("triton").__version__
    assert row["faults"] == []
    assert row["registers"] > 0
    assert (row["op"], row["layer"], row["arch"], row["kernel"]) == (*("bn_apply", "2x16x4x4", 80, "bn_apply_kernel"),)
    assert "4 warps" in row["tile"]
    assert any((tmp_path / "cache").iterdir())


def test_every_layer_of_both_networks_is_compiled():
    found = {(one.op, one.layer) for one in tritons.recorded(90)}
    for shape in RESNET_LAYERS + RESNET9_LAYERS:
        assert {("fprop", str(shape)), ("wgrad", str(shape))} <= found
        assert ("dgrad", str(shape.of_dgrad if shape.R == 1 else shape)) in found
    assert {"augment", "optimiser", "bn_stats", "bn_finalize", "bn_coefficients"} <= {op for op, _ in found}


SOURCE = '''"""Words."""
LIMIT = 1
"""Of something."""

def f(x):
    """Does it."""
    return x + LIMIT  # why
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Words.", "Other words.", True),
        ('    """Does it."""\n', "", True),
        ("  # why", "", True),
        ("return x + LIMIT", "return (x +\n            LIMIT)", True),
        ("LIMIT = 1", "LIMIT = 2", False),
        ("x + LIMIT", "x - LIMIT", False),
        ("def f(x)", "def f(x=0)", False),
    ],
)
def test_words_do_not_change_the_fingerprint(tmp_path, monkeypatch, old, new, same):
    """Of the kernels' files and of those that read their machine code; names of files count."""
    monkeypatch.setattr(tritons, "ROOT", tmp_path)
    for name in ("kernels/k", "profiling/bench/ahead_of_time", "profiling/bench/machine_code"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SOURCE)
    (tmp_path / "profiling" / "device").mkdir()
    (tmp_path / "profiling" / "device" / "specifications.py").write_text(SOURCE)
    for path in tmp_path.rglob("*.py"):
        before = tritons.fingerprint()
        path.write_text(SOURCE.replace(old, new))
        assert (tritons.fingerprint() == before) == same, path
    before = tritons.fingerprint()
    (tmp_path / "kernels" / "k.py").rename(tmp_path / "kernels" / "renamed.py")
    assert tritons.fingerprint() != before


CONVOLUTION = Build("", "k", {}, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "DESCRIPTORS": True})
GOOD = {"sass": {"HGMMA.64x64x16.F32": 4, "UTMALDG.4D": 2}, "warps": 4}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, []),
        ({"error": "no"}, ["error"]),
        ({"spill_bytes": 8}, ["spills"]),
        ({"local_bytes": 8}, ["local"]),
        ({"notes": ["C7514: serialised"]}, ["remarks"]),
        ({"shared_bytes": 227 * 1024 + 1}, ["shared"]),
        ({"sass": {"HMMA": 4, "UTMALDG.4D": 2}}, ["matrix"]),
        ({"sass": {"HGMMA.64x64x16.F32": 4, "LDGSTS": 2}}, ["TMA"]),
        ({"overwritten": 1}, ["overwritten"]),
    ],
    ids=lambda value: str(value[0] if value else "none") if isinstance(value, list) else None,
)
def test_faults_of_machine_code(changes, fault):
    assert tritons.faults(CONVOLUTION, Facts("", 90, **(GOOD | changes))) == fault
    assert {*fault} <= tritons_table.FAULTS.keys()


def test_a_kernel_that_multiplies_nothing_needs_no_matrix_instruction():
    assert tritons.faults(Build("", "k", {}, {"C": 64}), Facts("", 90, warps=4)) == []


def test_rows_are_kept_and_only_what_is_missing_is_compiled(tmp_path, quick, monkeypatch):
    place, out = fake_triton(tmp_path / "a"), tmp_path / "out"
    result = run(place, out)["9.9.9"]
    assert result["architectures"]["80"]["kernels"] == len(quick) == 2
    assert result["interpreter"] == "right"
    assert not result["passed"]  # the other architectures were not compiled
    kinds = [row["kind"] for row in read_jsonl(out / "9.9.9.jsonl")]
    assert kinds == ["triton", "kernel", "kernel", "interpreter"]
    assert run(place, out)["9.9.9"] == result
    assert len(quick) == 2
    monkeypatch.setattr(tritons, "fingerprint", lambda: "another")
    assert run(place, out)["9.9.9"] == result
    assert len(quick) == 4


def test_the_row_of_a_kernel_that_is_launched_no_more_goes(tmp_path, quick, monkeypatch, kernels):
    place, out = fake_triton(tmp_path / "a"), tmp_path / "out"
    run(place, out)
    monkeypatch.setattr(tritons, "recorded", lambda arch: kernels[1:] if arch == 80 else [])
    assert run(place, out)["9.9.9"]["architectures"]["80"]["kernels"] == 1
    assert len(quick) == 2
    assert [row["kind"] for row in read_jsonl(out / "9.9.9.jsonl")] == ["triton", "kernel", "interpreter"]


@pytest.mark.parametrize("damage", ["{", "[]\n", '{"kind": "triton"}\n'], ids=["torn", "no_record", "no_header"])
def test_a_damaged_file_is_made_anew(tmp_path, quick, damage):
    place, out = fake_triton(tmp_path / "a"), tmp_path / "out"
    result = run(place, out)
    (out / "9.9.9.jsonl").write_text(damage)
    assert run(place, out) == result
    assert len(quick) == 4


def test_what_was_compiled_before_an_interruption_is_kept(tmp_path, quick, monkeypatch):
    place, out, compile_all = fake_triton(tmp_path / "a"), tmp_path / "out", ahead_of_time.compile_all
    monkeypatch.setattr(tritons, "TOGETHER", 1)

    def interrupted(builds, environment):
        if quick:
            raise Interrupted(2)
        return compile_all(builds, environment)

    monkeypatch.setattr(ahead_of_time, "compile_all", interrupted)
    with pytest.raises(Interrupted):
        run(place, out)
    monkeypatch.setattr(ahead_of_time, "compile_all", compile_all)
    assert run(place, out)["9.9.9"]["architectures"]["80"]["kernels"] == 2
    assert len(quick) == 2


def test_a_process_that_fails_is_a_line(tmp_path, quick, monkeypatch):
    def fails(builds, environment):
        raise RuntimeError("the compiling process ended with 1: Traceback\n  somewhere\nOSError: no space left")

    monkeypatch.setattr(ahead_of_time, "compile_all", fails)
    with pytest.raises(RunError, match=r"^triton 9\.9\.9: OSError: no space left$"):
        run(fake_triton(tmp_path / "a"), tmp_path / "out")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"reason": null, "unchecked": []}', None),
        ('{"reason": "augment is off", "unchecked": []}', "augment is off"),
        ('{"reason": null, "unchecked": ["sgd"]}', "sgd"),
        ("", "its process ended with 3"),
        ("[]", "its process ended with 3"),
    ],
    ids=["right", "wrong", "unchecked", "died", "damaged"],
)
def test_what_the_interpreter_says(tmp_path, monkeypatch, answer, said):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    Path(sys.executable).write_text(f"#!/bin/sh\ncat > {tmp_path}/asked\necho '{answer}'\nexit 3\n")
    Path(sys.executable).chmod(0o755)
    assert tritons.interpreted(Environment("9.9.9", {}, dict(os.environ))) == said
    assert json.loads((tmp_path / "asked").read_text())["ops"] == "fused"


def test_the_table_names_what_is_wrong(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(ahead_of_time, "compile_all", lambda builds, environment: [
        Facts("", 80, registers=255, spill_bytes=16, warps=4, notes=["C7510: wait"]),
        Facts("", 80, error="Traceback\nCompilationError: at 3:1"),
    ])  # fmt: skip
    run(fake_triton(tmp_path / "a", init="__version__ = '3.6.0'"), tmp_path / "out")
    text = (tmp_path / "out" / "tritons.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| 3.6.0 | 2.11.0 | 80 |"))
    assert [cell.strip() for cell in line.split("|")[4:-1]] == [
        *("13.3.33", "2", "1", "1", "0", "1", "0", "0", "0", "0", "right", "no")
    ]
    assert "sm_80, bn_apply_kernel: spills, remarks of ptxas; 1 of them, as bn_apply 2x16x4x4" in text
    assert "CompilationError: at 3:1" in text


def test_children_of_an_interrupted_compilation_are_ended(monkeypatch, kernels):
    children = []

    def communicate(child):
        children.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(KeyboardInterrupt):
        ahead_of_time.compile_all([one.build for one in kernels])
    assert children[0].wait(timeout=60) == -9
