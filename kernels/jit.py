"""Triton where it is installed, and an explanation where it is not (it has wheels for Linux only).

A kernel file begins with `from kernels.jit import tl, triton`. Without Triton it still imports, so that its reference
and its cost work on a Mac or on Windows; its op then raises from `kernels.contract.check_device`, before any launch.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

try:
    import triton
    import triton.language as tl
except ImportError:

    class _NoTriton:
        """Stands in for Triton where a kernel file is only imported and its cost computed."""

        constexpr = None

        @staticmethod
        def jit(fn=None, **options):
            return fn if fn else lambda fn: fn

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length()

    triton = tl = _NoTriton()
    INSTALLED = INTERPRETED = False
else:
    INSTALLED = True
    # Decided when a kernel is decorated, by TRITON_INTERPRET in the environment; setting it later changes nothing.
    INTERPRETED = triton.knobs.runtime.interpret

# Programmatic dependent launch: a kernel's blocks move in while the last of the one before it finish, and wait there.
# Chosen by KERNELS_PDL=1 in the environment, until a GPU has shown that it is right, and faster.
PDL = INSTALLED and not INTERPRETED and os.environ.get("KERNELS_PDL") == "1"
LAUNCH = {"launch_pdl": True} if PDL else {}
"""Options of every launch."""

# Two functions, and not one that asks a global: of a global that only a callee reads, Triton's key of a kernel depends
# on which kernel was compiled first, so that the next process would compile it again.
if PDL:

    @triton.jit
    def wait_for_the_kernel_before():
        """Every kernel's first line: before it, nothing that another kernel writes or reads may be touched."""
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # which wait in turn until this kernel has ended

else:

    @triton.jit
    def wait_for_the_kernel_before():
        """Every kernel's first line: nothing to wait for, kernels begin when the one before has ended."""


MIN_CAPABILITY = (8, 0)  # Triton has compiled matrix products for older GPUs to plain FMAs since 3.3


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, as one clause; None if they can."""
    if not INSTALLED:
        return "triton is not installed (it has wheels for Linux only)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY and not INTERPRETED:
            have, need = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
            return f"{torch.cuda.get_device_name(device)} has compute capability {have} and the kernels need {need}"
        if PDL and capability < (9, 0):
            return "KERNELS_PDL=1 needs compute capability 9.0: unset it"
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"they run on a CUDA GPU, not on {device.type} (on a CPU only in Triton's interpreter, TRITON_INTERPRET=1)"


@contextlib.contextmanager
def nothing_launched() -> Iterator[list]:
    """Kernels are compiled instead of launched; yields the list of what they were, or will be, compiled to.

    The results of ops within are memory as it came.
    """
    from triton.runtime.jit import JITFunction

    launch, kernels = JITFunction.run, []

    def run(self, *args, grid, warmup, **kwargs):
        kernels.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run = launch
