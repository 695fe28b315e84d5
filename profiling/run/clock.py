"""Phases of a run on one monotonic clock: exclusive and contiguous, so they sum to the wall clock by construction."""

import time
from collections.abc import Callable
from typing import NamedTuple


class Phase(NamedTuple):
    """From `start_ns` to `end_ns` on `time.monotonic_ns`, the run did `name`."""

    name: str
    start_ns: int
    end_ns: int


class Clock:
    """Starts in phase `first`; `switch` ends a phase and begins the next in the same nanosecond.

    `synchronize` is called before the time is taken: work queued on a device counts in the phase that queued it.
    `start_ns` may lie before the construction: the process was running already.
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
