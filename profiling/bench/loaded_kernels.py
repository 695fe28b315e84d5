"""What the runtime holds of the kernels that were launched: nothing is compiled again to know it."""

import contextlib
from collections.abc import Iterator
from typing import Any

from profiling.bench import machine_code
from profiling.bench.ahead_of_time import Facts


@contextlib.contextmanager
def launched() -> Iterator[list[Any]]:
    """The kernels launched in the context, as `triton.compiler.CompiledKernel`; none under the interpreter."""
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, []

    def record(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        kernels.append(kernel)
        return kernel

    JITFunction.run = record
    try:
        yield kernels
    finally:
        JITFunction.run = run


def local_bytes(kernel: Any) -> int:
    """Bytes of local memory of each thread, which is where the compiler spills registers; Triton counts words."""
    return 4 * kernel.n_spills


def facts(kernel: Any) -> Facts:
    """The facts of a launched kernel, from the driver and its machine code. How much of the local memory is spills, and
    what ptxas remarked, only a compilation would tell."""
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
