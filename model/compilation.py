"""Compile kernels in parallel, before the first step needs them."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from kernels.jit import nothing_launched


def compile_kernels(run: Callable[[], Any], device: torch.device) -> None:
    """Compile the kernels that `run` would launch on `device`, on all cores, and load them; none is launched.

    The results of `run` are therefore meaningless. Kernels are not specialised on the size of a batch, so any size
    stands for all. Triton compiles outside of Python's lock and assembles in another process, so threads suffice. A
    kernel that fails is left for the step that needs it, which says so; an error of `run` itself is passed on.
    """
    from triton import AsyncCompileMode

    def on_device() -> contextlib.AbstractContextManager:
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def load(kernel: Any) -> None:
        with contextlib.suppress(Exception), on_device():
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            kernel.run  # noqa: B018  # makes the launcher with a C compiler, and loads the module onto the GPU

    with ThreadPoolExecutor() as threads:
        # Backward too in this thread: in the engine's own, the launches would wait for the compiler one after another.
        with (
            on_device(),
            torch.autograd.set_multithreading_enabled(False),
            nothing_launched() as kernels,
            AsyncCompileMode(threads, ignore_errors=True),
        ):
            run()
        list(threads.map(load, {id(kernel): kernel for kernel in kernels}.values()))
