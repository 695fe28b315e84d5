"""When each step of the timed run began, without disturbing it: no synchronisation, no allocation, no profiler.

On a CPU a step is done when it returns, so the host's clock tells. On CUDA the host runs ahead: an event is recorded
into the stream at the start of each step, and read once the device has passed the last one.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class StepClock:
    """Starts of steps in nanoseconds on the monotonic clock, epoch by epoch.

    tick()   at the start of each step, between `start_epoch()` and `end_epoch()`; on CUDA in one and the same stream
    missed   steps that could not be recorded: an epoch of more than `steps` steps gets a larger pool of events only
             when the next begins
    """

    def __init__(self, device: "torch.device", steps: int = 1024):
        self._marks = _DeviceEvents(device, steps) if device.type == "cuda" else _HostTimes()
        self.tick = self._marks.tick
        self.missed = 0
        self._epochs: list[list[int]] = []
        self._open = self._unread = False

    def start_epoch(self) -> None:
        """Begin an epoch; on CUDA it waits for the device, which the run has just done."""
        self._collect()
        self._marks.start()
        self._open = True

    def end_epoch(self) -> None:
        """After the last step of an epoch; again is nothing. Reads nothing: the device may still be at work."""
        if self._open:
            self._marks.tick()
            self._close()

    def each(self, steps: Iterable[T]) -> Iterator[T]:
        """An epoch of `steps`, of which each is taken when the next item is asked for; it ends with the last one.

        Where the caller leaves before, `end_epoch` makes it an epoch; without, it is none.
        """
        self.start_epoch()
        self._marks.tick()
        for step in steps:
            yield step
            self._marks.tick()
        self._close()

    def durations_ns(self) -> list[int]:
        """How long each step of the epochs that ended took, in order."""
        self._collect()
        return [end - start for epoch in self._epochs for start, end in itertools.pairwise(epoch)]

    def to_json(self) -> dict[str, Any]:
        """records/steps.json: for each epoch that ended, the start of each of its steps and the end of the last."""
        self._collect()
        return {"version": 1, "epochs": self._epochs, "missed_steps": self.missed, "source": self._marks.source}

    def _close(self) -> None:
        self._open, self._unread = False, True

    def _collect(self) -> None:
        if self._unread:
            times, missed = self._marks.read()
            self._epochs.append(times)
            self.missed += missed
            self._unread = False


class _HostTimes:
    source = "monotonic clock of the host at the start of each step"

    def start(self) -> None:
        self.times: list[int] = []

    def tick(self) -> None:
        self.times.append(time.monotonic_ns())

    def read(self) -> tuple[list[int], int]:
        return self.times, 0


class _DeviceEvents:
    """The start of a step is the end of the one before, so `ticks` events bound `ticks - 1` steps, however many fit."""

    source = "CUDA events at the start of each step, from a host time taken when the device was idle before the epoch"

    def __init__(self, device: "torch.device", steps: int):
        import torch

        self.cuda, self.device = torch.cuda, device
        self.stream = self.cuda.current_stream(device)
        self.anchor, self.anchor_ns = self._event(), 0
        self.events = [self._event() for _ in range(steps + 1)]
        self.ticks = 0

    def _event(self) -> "torch.cuda.Event":
        event = self.cuda.Event(enable_timing=True)
        event.record(self.stream)  # the driver allocates an event when it is first recorded
        return event

    def start(self) -> None:
        self.stream = self.cuda.current_stream(self.device)
        self.events += [self._event() for _ in range(self.ticks - len(self.events))]
        self.ticks = 0
        self.anchor.record(self.stream)
        self.anchor.synchronize()
        self.anchor_ns = time.monotonic_ns()

    def tick(self) -> None:
        if self.ticks < len(self.events):
            self.events[self.ticks].record(self.stream)
        self.ticks += 1

    def read(self) -> tuple[list[int], int]:
        """Times, and how many ticks had no event. An elapsed time is fp32 milliseconds: 1 us of rounding at 16 s."""
        recorded = self.events[: self.ticks]
        recorded[-1].synchronize()
        times = [self.anchor_ns + round(self.anchor.elapsed_time(event) * 1e6) for event in recorded]
        return times, self.ticks - len(recorded)
