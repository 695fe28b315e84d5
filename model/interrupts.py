"""Signals that ask a run to end: at once while nothing could be lost, after the present step while training."""

import signal
from typing import Any


class Interrupted(BaseException):
    """SIGINT or SIGTERM ended the run, and what it had done is saved.

    No Exception, as KeyboardInterrupt is none: code that survives any failure must not survive this.
    """

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Interrupts:
    """While `deferred`, a first signal only sets `requested`, to be looked at between steps. A second never waits."""

    def __init__(self) -> None:
        self.requested = 0
        self.deferred = False

    def install(self) -> None:
        """Take over SIGINT and SIGTERM; Python lets only the main thread."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum: int, _: Any = None) -> None:
        """What a signal does; raises Interrupted unless it is to wait."""
        again, self.requested = self.requested, signum
        if again or not self.deferred:
            raise Interrupted(signum)
