"""Functions of device memory that are run as they are, or recorded once and replayed: a training epoch on a GPU.

A recording (a CUDA graph) repeats the launches that it saw, with the addresses and the Python numbers that it saw.
Whatever changes from one call to the next must therefore be read from tensors that stay where they are.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

REHEARSALS = 3
"""Runs before a recording. They compile, choose algorithms and take workspaces, which a capture must not."""


class Recorder(Protocol):
    """Turns a function into its replay.

    held_bytes  the most bytes that one recording allocated for itself, and needs again at each replay
    """

    held_bytes: int

    def rehearse(self, run: Callable[[], None]) -> None:
        """Run it as often as a recording needs it to have run."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return the replay. The recorder may or may not execute `run` while it records."""


class CudaGraphs:
    """Records CUDA graphs. They share one pool of memory, since none runs beside another or keeps a result in it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.held_bytes = 0

    def rehearse(self, run: Callable[[], None]) -> None:
        """Run it on the stream that will be recorded, so that its workspaces are there."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(REHEARSALS):
                run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of one CUDA graph; nothing is executed. Raises what the function or the driver raises.

        Only this thread's forbidden calls end the recording: a loader's thread may pin memory, and NCCL's may ask for
        its events.
        """
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        # The outer context puts the stream back even where the end of a failed recording raises. Collecting garbage
        # can unload a kernel or free a graph, which would end the recording too.
        with _without_garbage_collection(), torch.cuda.stream(self.stream):
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    run()
            except BaseException:
                self._end_allocation()
                raise
        self.held_bytes = max(self.held_bytes, torch.cuda.max_memory_allocated(self.device) - before)
        return graph.replay

    def _end_allocation(self) -> None:
        """End the allocator's recording: before 2.12 torch leaves it on after a recording that failed."""
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def recorder(device: torch.device) -> Recorder:
    """The recorder for `device`. Raises RuntimeError where there is none."""
    if device.type != "cuda":
        raise RuntimeError(f"a CUDA graph needs a CUDA GPU, and this run is on {device.type}")
    return CudaGraphs(device)


class Program:
    """`run(*batch)`, called as it is, or recorded for each kind of batch and replayed.

    A batch is tensors, and values that can be hashed. Batches whose tensors have the same shapes and whose values are
    equal are of one kind: the values are what a recording may keep, and new tensors are copied into its own.

    state     every tensor, and nothing else, that `run` changes; it is put back after rehearsals and recordings
    recorder  None to run it as it is
    rehearsal run before a recording, and to prepare where nothing is recorded; by default `run`
    """

    def __init__(
        self,
        run: Callable[..., None],
        state: Callable[[], list[Tensor]],
        recorder: Recorder | None = None,
        rehearsal: Callable[..., None] | None = None,
    ):
        self.run, self.state, self.recorder, self.rehearsal = run, state, recorder, rehearsal or run
        self.recordings: dict[tuple, tuple[tuple, Callable[[], None]]] = {}

    def __call__(self, *batch: Any) -> None:
        """Run on `batch`, after preparing for its kind if it is new."""
        if self.recorder is None:
            self.run(*batch)
            return
        kind = _kind(batch)
        if kind not in self.recordings:
            self.prepare(*batch)
        inputs, replay = self.recordings[kind]
        for into, x in zip(inputs, batch, strict=True):
            if isinstance(x, Tensor):
                into.copy_(x, non_blocking=True)
        replay()

    def prepare(self, *batch: Any) -> None:
        """Rehearse on `batch`, and record where that is asked for; every tensor of the state is then as before.

        Raises whatever the function, a compiler or the driver raises.
        """
        gc.collect()  # an earlier run's recordings are in reference cycles, and hold its memory
        state = self.state()
        kept = [t.clone() for t in state]

        def put_back() -> None:
            for t, before in zip(state, kept, strict=True):
                t.copy_(before)

        inputs = tuple(x.clone() if isinstance(x, Tensor) else x for x in batch)

        def rehearsal() -> None:  # from the same state every time: a counter must not run past its tensor's end
            put_back()
            self.rehearsal(*inputs)

        try:
            if self.recorder is None:
                rehearsal()
            else:
                self.recorder.rehearse(rehearsal)
                put_back()
                self.recordings[_kind(batch)] = inputs, self.recorder.record(lambda: self.run(*inputs))
        finally:
            put_back()

    def disable_capture(self) -> None:
        """Forget the recordings, and record no more."""
        self.recorder = None
        self.recordings.clear()


def _kind(batch: tuple) -> tuple:
    return tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in batch)
