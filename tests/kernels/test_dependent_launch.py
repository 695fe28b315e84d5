"""Programmatic dependent launch behind its switch: every kernel waits before it touches memory, every launch asks."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels import jit
from profiling import ROOT

FILES = sorted((ROOT / "kernels").glob("*.py"))


def kernels_and_launches(path: Path) -> tuple[list[ast.FunctionDef], list[ast.Call]]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    kernels = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return kernels, [call for call in calls if ast.unparse(call.func.value).endswith("kernel")]


def waits_first(kernel: ast.FunctionDef) -> bool:
    first = kernel.body[1 if ast.get_docstring(kernel) else 0]
    return ast.unparse(first) == "wait_for_the_kernel_before()"


def test_every_kernel_waits_first_and_every_launch_has_the_option():
    found = [kernels_and_launches(path) for path in FILES]
    kernels, launches = ([one for of_file in part for one in of_file] for part in zip(*found, strict=True))
    assert len(kernels) >= 13
    assert [kernel.name for kernel in kernels if not waits_first(kernel)] == []
    assert len(launches) >= 12
    asks = [any(k.arg is None and ast.unparse(k.value) == "LAUNCH" for k in launch.keywords) for launch in launches]
    assert all(asks), [ast.unparse(launch.func) for launch, has in zip(launches, asks, strict=True) if not has]


PROGRAM = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from kernels.bn_stats import bn_stats
from kernels.conv_fprop import conv_fprop
from kernels.tiles import Gpu
from profiling.bench.ahead_of_time import launches, source

x = torch.empty(2, 64, 32, 32, dtype=torch.float16).to(memory_format=torch.channels_last)
w = torch.empty(64, 64, 3, 3, dtype=torch.float16).to(memory_format=torch.channels_last)
with launches(Gpu("NVIDIA H100 80GB HBM3", (9, 0))) as builds:
    bn_stats(x)
    conv_fprop(x, w, 1, torch.empty(64), torch.empty(64))
compiled = [triton.compile(source(b), target=GPUTarget("cuda", 90, 32), options=dict(b.options)) for b in builds]
print(json.dumps([(one.asm["ptx"], one.metadata.launch_pdl) for one in compiled]))
"""
ACCESS = re.compile(r"^\s*(?:@\S+ )?(?:ld\.global|st\.global|cp\.async|cp\.reduce|atom\.|red\.)")


@pytest.mark.parametrize("switch", ["0", "1"])
def test_the_wait_is_before_the_first_access(switch):
    """In a process of its own: the switch is read when the kernels are imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"KERNELS_PDL": switch, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert len(both) == 2
    for ptx, option in both:
        assert option == (switch == "1")
        lines = ptx.splitlines()
        first = next(i for i, line in enumerate(lines) if ACCESS.match(line))
        waits = [i for i, line in enumerate(lines) if "griddepcontrol.wait" in line]
        lets_go = [i for i, line in enumerate(lines) if "griddepcontrol.launch_dependents" in line]
        assert len(waits) == len(lets_go) == int(switch)
        assert all(wait < let < first for wait, let in zip(waits, lets_go, strict=True))


def test_a_gpu_without_it_is_named(monkeypatch):
    jit.unavailable.cache_clear()
    for name, value in (("INSTALLED", True), ("INTERPRETED", False), ("PDL", True)):
        monkeypatch.setattr(jit, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    try:
        assert jit.unavailable(torch.device("cuda")) == "KERNELS_PDL=1 needs compute capability 9.0: unset it"
    finally:
        jit.unavailable.cache_clear()
