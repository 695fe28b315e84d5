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
for op, arguments in ((augment.augment, arguments), (bn_stats.bn_stats, (x,))):
    try:
        op(*arguments)
    except ValueError as error:
        assert "triton is not installed" in str(error), error
    else:
        raise AssertionError("it ran")
"""

WITHOUT_INTERPRETER = """
import torch
from kernels import bn_stats
try:
    bn_stats.bn_stats(torch.zeros(1, 16, 4, 4).contiguous(memory_format=torch.channels_last))
except ValueError as error:
    assert "cannot run on x's device cpu" in str(error) and "TRITON_INTERPRET" in str(error), error
else:
    raise AssertionError("it ran")
"""


@pytest.mark.parametrize(
    "program", [WITHOUT_TRITON, WITHOUT_INTERPRETER], ids=["without_triton", "without_interpreter"]
)
def test_ops_explain_themselves(program):
    """In a process of its own: where the kernels run is decided when they are imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    }
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(jit, "INSTALLED", True)
    monkeypatch.setattr(jit, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for capability, usable in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        reason = jit.unavailable.__wrapped__(torch.device("cuda"))
        assert (reason is None) == usable
        assert usable or "Tesla V100 has compute capability 7." in reason


def test_kernels_are_compiled_and_not_launched(monkeypatch):
    calls = []

    def launch(self, *args, grid, warmup):
        calls.append((args, warmup))
        return "compiled"

    monkeypatch.setattr(JITFunction, "run", launch)
    original = JITFunction.run
    with jit.nothing_launched() as kernels:
        JITFunction.run(None, 1, 2, grid=(1,), warmup=False)
    JITFunction.run(None, 3, grid=(1,), warmup=False)
    assert kernels == ["compiled"]
    assert calls == [((1, 2), True), ((3,), False)]
    assert JITFunction.run is original
