"""Programmatic dependent launch behind its switch: every kernel waits before it touches memory, every launch asks."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from profiling import ROOT

NODES = [node for path in sorted((ROOT / "kernels").glob("*.py")) for node in ast.walk(ast.parse(path.read_text()))]


def test_every_kernel_waits_first():
    kernels = [node for node in NODES if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    assert len(kernels) >= 13
    firsts = {kernel.name: kernel.body[1 if ast.get_docstring(kernel) else 0] for kernel in kernels}
    assert [name for name, line in firsts.items() if ast.unparse(line) != "wait_for_the_kernel_before()"] == []


def test_every_launch_has_the_option():
    calls = [node for node in NODES if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    launches = [call for call in calls if ast.unparse(call.func.value).endswith("kernel")]
    assert len(launches) >= 12
    for launch in launches:
        assert "LAUNCH" in [ast.unparse(k.value) for k in launch.keywords if k.arg is None], ast.unparse(launch.func)


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


@pytest.mark.parametrize("switch", [pytest.param(0, marks=pytest.mark.slow), 1], ids=["off", "on"])
def test_the_wait_is_before_the_first_access(switch):
    """In a process of its own: the switch is read when the kernels are imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"KERNELS_PDL": str(switch), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert [option for _, option in both] == [bool(switch)] * 2
    for ptx, _ in both:
        places = {"wait": [], "launch_dependents": [], "access": []}
        for place, line in enumerate(ptx.splitlines()):
            command = re.search(r"griddepcontrol\.(\w+)", line)
            if command or ACCESS.match(line):
                places[command[1] if command else "access"].append(place)
        assert len(places["wait"]) == len(places["launch_dependents"]) == switch
        order = [*places["wait"], *places["launch_dependents"], places["access"][0]]
        assert order == sorted(order)
