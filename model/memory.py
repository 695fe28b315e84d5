"""Memory of the process: how to keep what is freed, how much was needed at most, and how much can be shared."""

import ctypes
import os
import sys
from typing import NamedTuple

import torch

from model.errors import OutOfMemoryError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc's allocator to reuse freed memory, not to return it to the system. False where there is no such switch.

    By default each activation above 32 MB is mapped afresh in every step, and the kernel zeroes all its pages again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def preallocate(nbytes: int) -> None:
    """Touch `nbytes` of memory, or a quarter of what is free, and free them: `keep_freed_memory` then keeps them.

    A profiler's own records come to lie between a step's activations, which then need new memory in every step: without
    this the kernel zeroes its pages within the steps that are profiled.
    """
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        torch.empty(min(nbytes, free // 4), dtype=torch.uint8).fill_(0)
    except (AttributeError, ValueError, OSError, MemoryError, RuntimeError):
        return


class Peak(NamedTuple):
    """The most bytes held at once, None where unknown.

    allocated  on a GPU in tensors; on a CPU by the whole process since it began, for it keeps what it has freed
    reserved   on a GPU by torch's allocator, which keeps more than it has given out; None on a CPU
    """

    allocated: int | None
    reserved: int | None


def forget_peak(device: torch.device) -> None:
    """Let `peak` on a GPU be of what follows: not of a search for algorithms, of rehearsals or of an earlier run."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device, recorded: int = 0) -> Peak:
    """Since `forget_peak`; `recorded` bytes of it are allocated in recordings, where torch does not see them again."""
    if device.type == "cuda":
        return Peak(torch.cuda.max_memory_allocated(device) + recorded, torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:  # Windows
        return Peak(None, None)
    unit = 1 if sys.platform == "darwin" else 1024
    return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, None)


def free_shared_bytes() -> int | None:
    """Free bytes of /dev/shm, by which processes hand each other tensors; a process that needs more dies of SIGBUS.

    None where there is no such place. Containers have 64 MB there if nobody asks for more.
    """
    try:
        found = os.statvfs("/dev/shm")
    except (AttributeError, OSError):
        return None
    return found.f_bavail * found.f_frsize


def out_of_memory(error: BaseException, device: torch.device, batch_size: int) -> OutOfMemoryError | None:
    """`error` in our words, with a batch size to try, if it means that memory ran out; else None."""
    # The CPU's allocator has no exception class of its own.
    on_host = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if not on_host and not isinstance(error, torch.OutOfMemoryError):
        return None
    held = ""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        held = f" ({allocated / 1e6:,.0f} MB allocated, {reserved / 1e6:,.0f} MB reserved)"
    return OutOfMemoryError(
        f"{device} ran out of memory at batch_size={batch_size}{held}; try --set batch_size={max(batch_size // 2, 1)}"
    )
