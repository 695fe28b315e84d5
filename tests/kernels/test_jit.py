"""Where the kernels run, and what they say where they do not."""

import os
import subprocess
import sys

import pytest
import torch
from triton.runtime.jit import JITFunction

from kernels import jit

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of an absent package finds
import torch
from kernels import augment, batchnorm, bn_apply, bn_backward, bn_relu, bn_stats, jit
assert not jit.INSTALLED
images, index = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([1])
arguments = (images, index, torch.zeros(2, 5, dtype=torch.int32), torch.zeros(3), torch.ones(3), 1, 2, torch.float32)
assert augment.augment_reference(*arguments).shape == (1, 3, 4, 4)
x = torch.zeros(1, 24, 4, 4).contiguous(memory_format=torch.channels_last)
assert bn_stats.bn_stats_cost(x).bytes > 0
calls, words = [(augment.augment, arguments), (bn_stats.bn_stats, (x,))], ["triton is not installed"]
"""
WITHOUT_INTERPRETER = """
import torch
from kernels import bn_stats
calls = [(bn_stats.bn_stats, (torch.zeros(1, 16, 4, 4).contiguous(memory_format=torch.channels_last),))]
words = ["cannot run on x's device cpu", "TRITON_INTERPRET"]
"""
REFUSED = """
for op, arguments in calls:
    try:
        op(*arguments)
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("it ran")
"""


@pytest.mark.parametrize(
    "program", [WITHOUT_TRITON, WITHOUT_INTERPRETER], ids=["without_triton", "without_interpreter"]
)
def test_ops_explain_themselves(program):
    """In a process of its own: where the kernels run is decided when they are imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program + REFUSED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "capability", "pdl", "reason"),
    [
        ("Tesla V100", (7, 0), False, "Tesla V100 has compute capability 7.0 and the kernels need 8.0"),
        ("Tesla T4", (7, 5), False, "Tesla T4 has compute capability 7.5 and the kernels need 8.0"),
        ("NVIDIA A100", (8, 0), False, None),
        ("NVIDIA B200", (10, 0), True, None),
        ("NVIDIA A100", (8, 0), True, "KERNELS_PDL=1 needs compute capability 9.0: unset it"),
    ],
)
def test_gpus_that_are_too_old_are_refused(monkeypatch, name, capability, pdl, reason):
    for switch, value in (("INSTALLED", True), ("INTERPRETED", False), ("PDL", pdl)):
        monkeypatch.setattr(jit, switch, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert jit.unavailable.__wrapped__(torch.device("cuda")) == reason


def test_kernels_are_compiled_and_not_launched(monkeypatch):
    calls = []

    def launch(self, *args, grid, warmup):
        calls.append((args, warmup))
        return "compiled"

    monkeypatch.setattr(JITFunction, "run", launch)
    with jit.nothing_launched() as kernels:
        JITFunction.run(None, 1, 2, grid=(1,), warmup=False)
    JITFunction.run(None, 3, grid=(1,), warmup=False)
    assert kernels == ["compiled"]
    assert calls == [((1, 2), True), ((3,), False)]
    assert JITFunction.run is launch
