"""Candidates of a tuning compiled in other processes: on a cold cache, compiling takes most of its time.

What they compile lies in Triton's cache on the disk, where the process that times finds it. They launch nothing, and so
do not disturb what is timed. A candidate that does not compile is found again, and named, by the process that times.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable
from concurrent.futures.process import BrokenProcessPool

MOST = 8
"""Processes: each holds a CUDA context."""


class Precompiler:
    """A pool of processes, as many as half of the cores; without a second one all is left to the caller."""

    def __init__(self, processes: int | None = None):
        processes = min(MOST, (os.cpu_count() or 1) // 2) if processes is None else processes
        self._pool = None
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self._pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, _leave_interrupts_to_the_caller)
        self._futures: dict[Hashable, list[concurrent.futures.Future]] = {}

    def submit(self, key: Hashable, function: Callable[..., None], *arguments: object) -> None:
        """Let a process call `function`, which it imports by its name; in the order of submission."""
        if self._pool is not None:
            with contextlib.suppress(BrokenProcessPool, RuntimeError):
                self._futures.setdefault(key, []).append(self._pool.submit(function, *arguments))

    def wait(self, key: Hashable) -> None:
        """Until all that was submitted under `key` has ended, well or badly."""
        concurrent.futures.wait(self._futures.pop(key, ()))

    def close(self) -> None:
        """Begin nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts_to_the_caller() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
