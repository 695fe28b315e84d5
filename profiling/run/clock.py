"""The two clocks of a run: `Clock` of its phases and `StepClock` of its steps, both on `time.monotonic_ns`."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Phase(NamedTuple):
    """The run did `name` from `start_ns` to `end_ns`."""

    name: str
    start_ns: int
    end_ns: int


class Clock:
    """Phases, exclusive and contiguous, so that they sum to the wall clock by construction.

    Starts in phase `first`; `switch` ends a phase and begins the next in the same nanosecond. `synchronize` is called
    before the time is taken: work queued on a device counts in the phase that queued it. `start_ns` may lie before the
    construction: the process was running already.
    """

    def __init__(self, first: str, start_ns: int | None = None, now: Callable[[], int] = time.monotonic_ns):
        self.now = now
        self.start_ns = now() if start_ns is None else start_ns
        self.synchronize: Callable[[], None] = lambda: None
        self.phases: list[Phase] = []
        self._name, self._since_ns = first, self.start_ns

    def switch(self, name: str) -> None:
        """Begin phase `name`."""
        self.synchronize()
        now_ns = self.now()
        self.phases.append(Phase(self._name, self._since_ns, now_ns))
        self._name, self._since_ns = name, now_ns

    def stop(self) -> None:
        """End the last phase: from now on the phases sum to `wall_ns`, which stands still."""
        self.switch(self._name)
        self.now = lambda: self._since_ns

    def seconds(self, name: str) -> float:
        """Time spent in `name` so far, in seconds, the present phase included."""
        ns = sum(p.end_ns - p.start_ns for p in self.phases if p.name == name)
        return (ns + (self.now() - self._since_ns if name == self._name else 0)) / 1e9

    def wall_ns(self) -> int:
        """Nanoseconds since the start."""
        return self.now() - self.start_ns

    def wall_s(self) -> float:
        """Seconds since the start."""
        return self.wall_ns() / 1e9


class StepClock:
    """Starts of steps in nanoseconds, epoch by epoch, without a synchronisation, an allocation or a profiler.

    On a CPU a step is done when it returns, so the host's clock is read. On CUDA the host runs ahead: an event is
    recorded into the stream at the start of each step, and read once the device has passed the last one.

    tick()   at the start of each step, between `start_epoch()` and `end_epoch()`; on CUDA in one and the same stream
    missed   steps that were not recorded: an epoch of more than `steps` steps gets a larger pool of events only when
             the next begins
    """

    def __init__(self, device: torch.device, steps: int = 1024):
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
        """After the last step of an epoch; a second call does nothing. Reads nothing: the device may still work."""
        if self._open:
            self._marks.tick()
            self._open, self._unread = False, True

    def each(self, steps: Iterable[T]) -> Iterator[T]:
        """Yield an epoch of `steps`, each begun when the item is asked for; the epoch ends with the last one.

        A caller that leaves early keeps the epoch by calling `end_epoch`; without, it is dropped.
        """
        self.start_epoch()
        self._marks.tick()
        for step in steps:
            yield step
            self._marks.tick()
        self._open, self._unread = False, True

    def durations_ns(self) -> list[int]:
        """Nanoseconds of each step of the epochs that ended, in order."""
        self._collect()
        return [end - start for epoch in self._epochs for start, end in itertools.pairwise(epoch)]

    def to_json(self) -> dict[str, Any]:
        """records/steps.json: for each epoch that ended, the start of each of its steps and the end of the last."""
        self._collect()
        return {"version": 1, "epochs": self._epochs, "missed_steps": self.missed, "source": self._marks.source}

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

    def __init__(self, device: torch.device, steps: int):
        self.device, self.stream = device, torch.cuda.current_stream(device)
        self.anchor, self.anchor_ns = self._event(), 0
        self.events = [self._event() for _ in range(steps + 1)]
        self.ticks = 0

    def _event(self) -> "torch.cuda.Event":
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)  # the driver allocates an event when it is first recorded
        return event

    def start(self) -> None:
        self.stream = torch.cuda.current_stream(self.device)
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
