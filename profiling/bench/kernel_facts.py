"""Facts of a case's kernels from their machine code: compiled for any architecture, or as the runtime here holds it."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels import tiles
from kernels.contract import dtype_name
from kernels.tiles import Gpu
from profiling.bench import machine_code
from profiling.bench.ahead_of_time import Build, Facts, compile_all, launches, replaced, unique
from profiling.bench.case import Case, OperandFactory
from profiling.bench.measure import BATCH, Setup
from profiling.device.specifications import CAPABILITY
from profiling.output.numbers import MEASURED, UNAVAILABLE

DEFAULT_GPUS = (Gpu("sm_80", (8, 0)), Gpu("sm_90", (9, 0)), Gpu("sm_100", (10, 0)))
"""Architectures without a name in the table of tiles, which therefore take the default."""


@dataclass(frozen=True)
class KernelFacts:
    """One kernel that a case launches at batch 512, compiled for one architecture.

    `local_bytes` is a thread's local memory; `spill_bytes` of it are written and read, None where only the driver was
    asked. `blocks_per_sm` follows from the architecture's limits; `instructions_per_matrix_step` is a warp's
    instructions in the main loop for each matrix instruction, None without such a loop. Where the kernel did not
    compile, `status` is "unavailable" with the reason, and the figures are None; `notes` are ptxas's warnings.
    """

    case: str
    op: str
    variant: str
    shape: str
    dtype: str
    kernel: str
    gpu: str
    arch: int
    status: str
    source: str
    registers: int | None = None
    spill_bytes: int | None = None
    local_bytes: int | None = None
    shared_bytes: int | None = None
    blocks_per_sm: int | None = None
    instructions_per_matrix_step: float | None = None
    notes: tuple[str, ...] = ()


def kernel_facts(
    cases: Sequence[Case],
    gpus: Sequence[Gpu],
    dtype: torch.dtype,
    compile_: Callable[[list[Build]], list[Facts]] = compile_all,
) -> list[KernelFacts]:
    """The facts of every kernel of every case on every GPU; a kernel that several cases launch is compiled once."""
    draw, launched = OperandFactory(BATCH, torch.device("cpu"), dtype, untouched=True), []
    for case, gpu in itertools.product(cases, gpus):
        with torch.no_grad(), launches(gpu) as recorded:
            case.ours(*case.operands(draw))
        launched += [(case, gpu, build) for build in unique(recorded)]
    builds = unique([build for _, _, build in launched])
    facts = dict(zip((build.key() for build in builds), compile_(builds), strict=True))
    return [_row(case, gpu, dtype, build.kernel, facts[build.key()]) for case, gpu, build in launched]


def loaded_facts(case: Case, setup: Setup) -> list[KernelFacts]:
    """The facts of the kernels that `case` launches on the GPU of `setup`: launched again, not compiled."""
    gpu = tiles.gpu_of(setup.device)
    with torch.no_grad(), launched() as kernels:
        case.ours(*case.operands(OperandFactory(setup.batch, setup.device, setup.dtype)))
    different = {kernel.hash: kernel for kernel in kernels}.values()
    return [_row(case, gpu, setup.dtype, kernel.name, loaded(kernel)) for kernel in different]


def table_gpus() -> tuple[Gpu, ...]:
    """The GPUs in the table of tiles whose architecture is known by name."""
    names = dict.fromkeys(entry.gpu for entry in tiles.load())
    return tuple(Gpu(name, c) for name in names for known, c in CAPABILITY.items() if name.startswith(known))


def _row(case: Case, gpu: Gpu, dtype: torch.dtype, kernel: str, facts: Facts) -> KernelFacts:
    about = (case.name, case.op, case.variant, case.shape, dtype_name(dtype), kernel, gpu.name, facts.arch)
    if facts.error:
        return KernelFacts(*about, UNAVAILABLE, facts.error.splitlines()[0][:200])
    counts = facts.registers, facts.spill_bytes, facts.local_bytes, facts.shared_bytes, facts.blocks_per_sm()
    steps, notes = facts.instructions_per_matrix_step(), tuple(facts.notes)
    return KernelFacts(*about, MEASURED, "read from the machine code", *counts, steps, notes)


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """The kernels launched in the context, as `triton.compiler.CompiledKernel`; none under the interpreter."""
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, []

    def record(self, *args, **kwargs):
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    with replaced(JITFunction, "run", record):
        yield kernels


def local_bytes(kernel: Any) -> int:
    """Bytes of local memory, where registers spill to, of each thread; Triton counts words."""
    return 4 * kernel.n_spills


def loaded(kernel: Any) -> Facts:
    """The facts of a launched kernel from the driver and its machine code; spills and ptxas's remarks stay unknown."""
    sass = machine_code.read(kernel.asm["cubin"])
    return Facts(
        label=kernel.name,
        arch=kernel.metadata.target.arch,
        registers=kernel.n_regs,
        spill_bytes=None,
        local_bytes=local_bytes(kernel),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        tensor_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        sass=sass.counts,
        loops=sass.loops,
    )
