"""Facts of kernels, compiled for other GPUs or as the runtime holds them; compiler and runtime are scripts."""

import types

import pytest
import torch
from triton.runtime.jit import JITFunction

from kernels import tiles
from kernels.conv_shape import ConvShape
from kernels.tiles import Gpu
from profiling.bench import kernel_facts, machine_code
from profiling.bench.ahead_of_time import Facts
from profiling.bench.batchnorm_cases import bn_relu_case
from profiling.bench.case import Case
from profiling.bench.conv_cases import conv_fprop_case
from profiling.bench.measure import Setup
from profiling.bench.timing import QUICK, CpuTimer


def test_compiled_facts_name_case_kernel_and_gpu_and_share_compilations():
    seen = []

    def compile_(builds):
        seen.extend(builds)
        errors = ("" if build.arch == 90 else "no\nmore" for build in builds)
        return [Facts("", build.arch, registers=40, warps=4, error=e) for build, e in zip(builds, errors, strict=True)]

    gpus = (Gpu("sm_80", (8, 0)), Gpu("sm_90", (9, 0)))
    cases = [*[bn_relu_case(64, 32, "")] * 2, conv_fprop_case(ConvShape(64, 64, 32, 32), "statistics")]
    facts = kernel_facts.kernel_facts(cases, gpus, torch.float16, compile_)
    assert len(seen) == 2 * 4  # statistics, finalize, apply, convolution: each once for each architecture
    convolutions = [f.kernel for f in facts if f.case.startswith("conv_fprop")]
    assert convolutions == ["conv_fprop_kernel", "conv_fprop_lines_kernel"]
    assert len([f for f in facts if f.kernel == "bn_apply_kernel"]) == 4
    for f in facts:
        compiled = ("measured", "read from the machine code", 40, 12)
        expected = compiled if f.gpu == "sm_90" else ("unavailable", "no", None, None)
        assert (f.status, f.source, f.registers, f.blocks_per_sm) == expected


def test_loaded_facts_name_each_launched_kernel_once_without_compiling(monkeypatch):
    """From the driver, 118 words of local memory, and from the machine code; what was launched is still launched."""
    loop, calls = {"HGMMA.64x128x16.F32": 4, "IADD3": 296}, []
    target = types.SimpleNamespace(arch=90)
    metadata = types.SimpleNamespace(target=target, shared=81_920, num_warps=8, tmem_size=None)
    about = {"asm": {"cubin": b"code"}, "n_regs": 255, "n_spills": 118, "metadata": metadata}

    def run(self, name, *, grid, warmup):
        calls.append(name)
        return types.SimpleNamespace(name=name, hash=name, **about)

    def ours(x):
        for name in names:
            assert JITFunction.run(None, name, grid=(1,), warmup=False).name == name

    monkeypatch.setattr(machine_code, "read", lambda cubin: machine_code.Sass({"LDG.E": 3} | loop, [loop]))
    monkeypatch.setattr(kernel_facts, "compile_all", lambda builds: pytest.fail("compiled"))
    monkeypatch.setattr(tiles, "gpu_of", lambda device: Gpu("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(JITFunction, "run", run)
    names = ["bn_stats_kernel", "bn_apply_kernel", "bn_stats_kernel"]
    case = Case("bn_relu", "", "8x4x4", lambda d: (d.activation(8, 4),), torch.relu, ours, lambda x: None)
    found = kernel_facts.loaded_facts(case, Setup(torch.device("cpu"), torch.float16, 2, QUICK, CpuTimer()))
    assert [(f.kernel, f.gpu, f.arch, f.status) for f in found] == [
        (name, "NVIDIA H200", 90, "measured") for name in names[:2]
    ]
    for f in found:
        assert (f.registers, f.local_bytes, f.spill_bytes, f.shared_bytes) == (255, 472, None, 81_920)
        assert (f.blocks_per_sm, f.instructions_per_matrix_step) == (1, 75.0)
    assert calls == names
    assert JITFunction.run is run
