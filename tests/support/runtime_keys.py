"""What the runtime itself would compile for launches on an H100, and what `ahead_of_time` makes of the same.

A process of its own, since one that interprets kernels cannot ask: python tests/support/runtime_keys.py. It prints
the kernel and both keys of each launch, a line each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver

from kernels import contract, tiles
from kernels.jit import nothing_launched
from kernels.sgd import sgd
from profiling.bench.ahead_of_time import launches, source
from profiling.bench.case import OperandFactory
from profiling.bench.cases import cases

GPU, TARGET = tiles.Gpu("NVIDIA H100 80GB HBM3", (9, 0)), GPUTarget("cuda", 90, 32)


class Driver:
    """As much of a driver as a launch asks for its key."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def key(src, options: dict) -> str:
    """The part of the cache's key that differs between kernels."""
    return f"{src.hash()}-{make_backend(TARGET).parse_options(options).hash()}"


def run_all() -> None:
    """Launch every kernel of the benchmark and the optimiser's, with sizes that 16 does and does not divide."""
    cpu = torch.device("cpu")
    with torch.no_grad():
        for n, s in ((4096, 320), (4099, 3431)):
            w, dw, v, rates = torch.zeros(n), torch.zeros(n), torch.zeros(n), torch.zeros(s)
            step, bad = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            sgd(w, dw, v, w.half(), rates, step, bad, 0.9, 5e-4)
        for batch in (2, 3):
            for case in cases():
                case.ours(*case.operands(OperandFactory(batch, cpu, torch.float16, untouched=True)))


def main() -> None:
    asked: list[tuple[str, str]] = []

    def compile_(src, target, options, **more):
        asked.append((src.fn.__name__, key(src, options)))

    driver.set_active(Driver())
    triton.compiler.compile = compile_  # where a kernel's first launch takes it from
    contract.unavailable, tiles.gpu_of = lambda device: None, lambda device: GPU
    with nothing_launched():
        run_all()
    with launches(GPU) as builds:
        run_all()
    ours = {key(source(build), build.options): build.kernel for build in builds}
    for name, theirs in asked:
        print(name, theirs in ours)


if __name__ == "__main__":
    main()
