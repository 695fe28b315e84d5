"""Each Triton's machine code of the kernels: installed, asked, compiled, interpreted, kept and shown."""

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


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def fake_triton(folder: Path, init: str = "__version__ = '9.9.9'", ptxas: str = "here / 'ptxas'") -> Path:
    """A package that answers what is asked of a Triton before anything is compiled."""
    nvidia = folder / "triton" / "backends" / "nvidia"
    nvidia.mkdir(parents=True)
    for package in (nvidia.parent, nvidia):
        (package / "__init__.py").touch()
    (folder / "triton" / "__init__.py").write_text(init)
    (nvidia / "compiler.py").write_text(
        "from pathlib import Path\nfrom types import SimpleNamespace\nhere = Path(__file__).parent\n"
        f"def get_ptxas(arch):\n    return SimpleNamespace(path=str({ptxas}))\n"
    )
    program(nvidia / "ptxas", PTXAS)
    return folder


@pytest.fixture
def kernels() -> list[Named]:
    """Two small ones."""
    with launches() as builds:
        for dtype in (torch.float16, torch.float32):
            x = torch.empty(2, 16, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
            bn_apply(x, torch.ones(16), torch.ones(16))
    return [Named("bn_apply", "2x16x4x4", build.on(80)) for build in builds]


class Command:
    """The command on a Triton that has two kernels of one architecture, and a compiler that says the same of both."""

    def __init__(self, folder: Path, kernels: list[Named]):
        self.folder, self.out, self.kernels, self.compiled = fake_triton(folder / "a"), folder / "out", kernels, []
        self.own = Environment("9.9.9", {"80": "13.3.33"}, {"TRITON_CACHE_DIR": "x"})

    def compile_all(self, builds, environment):
        assert environment["TRITON_CACHE_DIR"]
        self.compiled.extend(builds)
        loops = [{"IADD": 9}, {"HMMA.16816": 2, "IADD": 5}]
        return [Facts(build.label, build.arch, registers=32, warps=4, loops=loops) for build in builds]

    def run(self) -> dict:
        return tritons.run(Request(), Terminal(speaks=False), None, [str(self.folder)], out=self.out)["9.9.9"]

    def kinds(self) -> list[str]:
        return [row["kind"] for row in read_jsonl(self.out / "9.9.9.jsonl")]


@pytest.fixture
def command(tmp_path, monkeypatch, kernels) -> Command:
    made = Command(tmp_path, kernels)
    monkeypatch.setattr(tritons, "recorded", lambda arch: made.kernels if arch == 80 else [])
    monkeypatch.setattr(tritons, "environment", lambda place, scratch: made.own)
    monkeypatch.setattr(tritons, "interpreted", lambda own: None)
    monkeypatch.setattr(tritons, "fingerprint", lambda: "one")
    monkeypatch.setattr(ahead_of_time, "compile_all", made.compile_all)
    return made


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
def test_wrong_word_is_a_line_and_exit_code_2(words, said):
    done = CliRunner().invoke(app, ["tritons", *words])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert said in done.output


def test_version_that_cannot_be_had_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "constraints.txt").write_text("triton==3.6.0\n")  # of another environment's, as a CI has them
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    with pytest.raises(RunError, match=r"triton 0\.0\.1 cannot be installed: ERROR: No matching distribution .*folder"):
        tritons.install("0.0.1", tmp_path / "triton")


def test_folder_is_first_on_the_path_and_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/elsewhere/ptxas")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    place = fake_triton(tmp_path / "a")
    own = tritons.environment(place, tmp_path / "scratch")
    assert (own.version, own.ptxas) == ("9.9.9", dict.fromkeys(("80", "90", "100"), "13.3.33"))
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
def test_folder_without_a_triton_of_its_own_is_refused(tmp_path, changes, said):
    program(tmp_path / "ptxas", PTXAS)
    with pytest.raises(RunError, match=said):
        tritons.environment(fake_triton(tmp_path / "a", **changes), tmp_path)


@pytest.mark.slow
def test_installed_triton_compiles_in_an_environment_of_its_own(tmp_path, kernels):
    place = Path(importlib.util.find_spec("triton").origin).resolve().parent.parent
    own = tritons.environment(place, tmp_path)
    (row,) = tritons.compiled(kernels[:1], own)
    assert own.version == __import__("triton").__version__
    assert (row["faults"], row["registers"] > 0, "4 warps" in row["tile"]) == ([], True, True)
    assert (row["op"], row["layer"], row["arch"], row["kernel"]) == ("bn_apply", "2x16x4x4", 80, "bn_apply_kernel")
    assert any((tmp_path / "cache").iterdir())


def test_every_layer_of_both_networks_is_compiled():
    """Each kernel is its op's own."""
    kernels = tritons.recorded(90)
    found = {(one.op, one.layer) for one in kernels}
    for shape in RESNET_LAYERS + RESNET9_LAYERS:
        assert {("fprop", str(shape)), ("wgrad", str(shape))} <= found
        assert ("dgrad", str(shape.of_dgrad if shape.R == 1 else shape)) in found
    assert {"augment", "optimiser", "bn_stats", "bn_finalize", "bn_coefficients"} <= {op for op, _ in found}
    prefixes = {"fprop": "conv_fprop", "dgrad": "conv_dgrad", "wgrad": "conv_wgrad", "optimiser": "sgd"}
    for one in kernels:
        if not one.op.startswith("evaluation"):
            assert one.build.kernel.startswith(prefixes.get(one.op, one.op).removesuffix("_add")), one


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
def test_words_do_not_change_the_code(old, new, same):
    assert (tritons.code(SOURCE) == tritons.code(SOURCE.replace(old, new))) == same


def test_fingerprint_is_of_the_kernels_and_of_what_reads_their_machine_code(tmp_path, monkeypatch):
    monkeypatch.setattr(tritons, "ROOT", tmp_path)
    names = ("kernels/k", "profiling/bench/ahead_of_time", "profiling/bench/machine_code")
    for name in (*names, "profiling/device/specifications"):
        (tmp_path / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(SOURCE)
    found = [tritons.fingerprint()]
    for path in tmp_path.rglob("*.py"):
        path.write_text(SOURCE.replace("LIMIT = 1", "LIMIT = 2"))
        found.append(tritons.fingerprint())
    (tmp_path / "kernels" / "k.py").rename(tmp_path / "kernels" / "renamed.py")
    found.append(tritons.fingerprint())
    assert len(set(found)) == len(found) == 6


CONVOLUTION = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "DESCRIPTORS": True}
GOOD = {"sass": {"HGMMA.64x64x16.F32": 4, "UTMALDG.4D": 2}, "warps": 4}


@pytest.mark.parametrize(
    ("constexprs", "changes", "fault"),
    [
        (CONVOLUTION, {}, []),
        (CONVOLUTION, {"error": "no"}, ["error"]),
        (CONVOLUTION, {"spill_bytes": 8}, ["spills"]),
        (CONVOLUTION, {"local_bytes": 8}, ["local"]),
        (CONVOLUTION, {"notes": ["C7514: serialised"]}, ["remarks"]),
        (CONVOLUTION, {"shared_bytes": 227 * 1024 + 1}, ["shared"]),
        (CONVOLUTION, {"sass": {"HMMA": 4, "UTMALDG.4D": 2}}, ["matrix"]),
        (CONVOLUTION, {"sass": {"HGMMA.64x64x16.F32": 4, "LDGSTS": 2}}, ["TMA"]),
        (CONVOLUTION, {"overwritten": 1}, ["overwritten"]),
        ({"C": 64}, {"sass": {}}, []),  # it multiplies nothing, and needs no matrix instruction
    ],
)
def test_faults_of_machine_code(constexprs, changes, fault):
    assert tritons.faults(Build("", "k", {}, constexprs), Facts("", 90, **(GOOD | changes))) == fault
    assert {*fault} <= tritons_table.FAULTS.keys()


def test_rows_are_kept_and_only_what_is_missing_is_compiled(command, monkeypatch):
    result = command.run()
    assert result["architectures"]["80"]["kernels"] == len(command.compiled) == 2
    assert result["interpreter"] == "right"
    assert not result["passed"], "the other architectures were not compiled"
    assert command.kinds() == ["triton", "kernel", "kernel", "interpreter"]
    row = read_jsonl(command.out / "9.9.9.jsonl")[1]
    assert (row["loop"], row["matrix"], row["registers"]) == (7, 2, 32)
    assert (command.run(), len(command.compiled)) == (result, 2)
    monkeypatch.setattr(tritons, "fingerprint", lambda: "another")
    assert (command.run(), len(command.compiled)) == (result, 4)
    del command.kernels[0]  # one that is launched no more
    assert command.run()["architectures"]["80"]["kernels"] == 1
    assert (command.kinds(), len(command.compiled)) == (["triton", "kernel", "interpreter"], 4)


@pytest.mark.parametrize("damage", ["{", "[]\n", '{"kind": "triton"}\n'], ids=["torn", "no_record", "no_header"])
def test_damaged_file_is_made_anew(command, damage):
    result = command.run()
    (command.out / "9.9.9.jsonl").write_text(damage)
    assert (command.run(), len(command.compiled)) == (result, 4)


def test_rows_from_before_an_interruption_are_kept(command, monkeypatch):
    def interrupted(builds, environment):
        if command.compiled:
            raise Interrupted(2)
        return command.compile_all(builds, environment)

    monkeypatch.setattr(tritons, "TOGETHER", 1)
    monkeypatch.setattr(ahead_of_time, "compile_all", interrupted)
    with pytest.raises(Interrupted):
        command.run()
    monkeypatch.setattr(ahead_of_time, "compile_all", command.compile_all)
    assert (command.run()["architectures"]["80"]["kernels"], len(command.compiled)) == (2, 2)


def test_process_that_fails_is_a_line(command, monkeypatch):
    def fails(builds, environment):
        raise RuntimeError("the compiling process ended with 1: Traceback\n  somewhere\nOSError: no space left")

    monkeypatch.setattr(ahead_of_time, "compile_all", fails)
    with pytest.raises(RunError, match=r"^triton 9\.9\.9: OSError: no space left$"):
        command.run()


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
def test_interpreter_s_answer(tmp_path, monkeypatch, answer, said):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    program(tmp_path / "python", f"#!/bin/sh\ncat > {tmp_path}/asked\necho '{answer}'\nexit 3\n")
    assert tritons.interpreted(Environment("9.9.9", {}, dict(os.environ))) == said
    assert json.loads((tmp_path / "asked").read_text())["ops"] == "fused"


def test_table_names_what_is_wrong(command, monkeypatch):
    command.own = command.own._replace(version="3.6.0")
    monkeypatch.setattr(ahead_of_time, "compile_all", lambda builds, environment: [
        Facts("", 80, registers=255, spill_bytes=16, warps=4, notes=["C7510: wait"]),
        Facts("", 80, error="Traceback\nCompilationError: at 3:1"),
    ])  # fmt: skip
    tritons.run(Request(), Terminal(speaks=False), None, [str(command.folder)], out=command.out)
    text = (command.out / "tritons.md").read_text()
    assert "\n| 3.6.0 | 2.11.0 | 80 | 13.3.33 | 2 | 1 | 1 | 0 | 1 | 0 | 0 | 0 | 0 | right | no |\n" in text
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
