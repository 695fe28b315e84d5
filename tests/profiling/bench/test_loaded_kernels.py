"""What the runtime holds of launched kernels; the runtime and the disassembler are scripts."""

import types

import pytest
import torch
from triton.runtime.jit import JITFunction

from kernels import tiles
from profiling.bench import kernel_facts, machine_code
from profiling.bench.case import Case
from profiling.bench.loaded_kernels import facts, launched, local_bytes
from profiling.bench.measure import Setup
from profiling.bench.timing import QUICK, CpuTimer


def kernel(name: str = "conv_fprop_kernel", **changes) -> types.SimpleNamespace:
    """As much of a CompiledKernel as is asked for; 118 words of local memory."""
    target = types.SimpleNamespace(arch=90)
    metadata = types.SimpleNamespace(target=target, shared=81_920, num_warps=8, tmem_size=None)
    about = {"name": name, "hash": name, "asm": {"cubin": b"code"}, "n_regs": 255, "n_spills": 118}
    return types.SimpleNamespace(**about | {"metadata": metadata} | changes)


@pytest.fixture
def disassembled(monkeypatch):
    loop = {"HGMMA.64x128x16.F32": 4, "IADD3": 296}
    monkeypatch.setattr(machine_code, "read", lambda cubin: machine_code.Sass({"LDG.E": 3} | loop, [loop]))


def test_what_is_launched_is_recorded_and_launched(monkeypatch):
    calls = []

    def run(self, *args, grid, warmup):
        calls.append((args, grid))
        return kernel(args[0])

    monkeypatch.setattr(JITFunction, "run", run)
    with launched() as kernels:
        assert JITFunction.run(None, "a", grid=(1,), warmup=False).name == "a"
        JITFunction.run(None, "b", grid=(2,), warmup=False)
    JITFunction.run(None, "c", grid=(3,), warmup=False)
    assert [k.name for k in kernels] == ["a", "b"]
    assert calls == [(("a",), (1,)), (("b",), (2,)), (("c",), (3,))]
    assert JITFunction.run is run


@pytest.mark.usefixtures("disassembled")
def test_facts_come_from_the_driver_and_the_machine_code():
    found = facts(kernel())
    assert local_bytes(kernel()) == found.local_bytes == 472
    assert (found.registers, found.shared_bytes, found.spill_bytes) == (255, 81_920, None)
    assert found.blocks_per_sm() == 1
    assert found.instructions_per_matrix_step() == 75.0


@pytest.mark.usefixtures("disassembled")
def test_a_case_s_kernels_are_named_once_without_a_compilation(monkeypatch):
    monkeypatch.setattr(kernel_facts, "compile_all", lambda builds: pytest.fail("compiled"))
    monkeypatch.setattr(tiles, "gpu_of", lambda device: tiles.Gpu("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(JITFunction, "run", lambda self, name, *, grid, warmup: kernel(name))

    def ours(x):
        for name in ("bn_stats_kernel", "bn_apply_kernel", "bn_stats_kernel"):
            JITFunction.run(None, name, grid=(1,), warmup=False)

    case = Case("bn_relu", "", "8x4x4", lambda d: (d.activation(8, 4),), torch.relu, ours, lambda x: None)
    found = kernel_facts.loaded_facts(case, Setup(torch.device("cpu"), torch.float16, 2, QUICK, CpuTimer()))
    assert [(f.kernel, f.gpu, f.arch, f.status, f.local_bytes) for f in found] == [
        ("bn_stats_kernel", "NVIDIA H200", 90, "measured", 472),
        ("bn_apply_kernel", "NVIDIA H200", 90, "measured", 472),
    ]
