"""Signals that ask a run to end: at once while nothing could be lost, after the present step while training."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

BURST_S = 0.3
"""Signals that follow one within this time are the same request: a terminal, a launcher and `timeout` each send one."""
PARENT_S = 1.0
"""Seconds between two looks of `follow` for the parent."""
END_S = 30.0
"""Seconds for a process without its parent to finish its step and to save: torchrun's for SIGTERM."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP ended the run, and what it had done is saved.

    No Exception, as KeyboardInterrupt is none: code that survives any failure must not survive this.
    """

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Interrupts:
    """While `deferred`, a first signal only sets `requested`, to be looked at between steps. A second never waits.

    `say` is then told what is going on, from within a signal handler: it must not use what the run may be using.
    """

    def __init__(self, say: Callable[[str], Any] = lambda text: None) -> None:
        self.requested = 0
        self.deferred = False
        self.say = say
        self._last_s = 0.0

    def install(self) -> None:
        """Take over the signals; Python lets only the main thread."""
        _handle_all(self.handle)

    def handle(self, signum: int, _: Any = None) -> None:
        """Do what a signal asks for: raises Interrupted unless it is to wait."""
        now_s = time.monotonic()
        if self.requested and now_s - self._last_s < BURST_S:
            return
        again, self.requested, self._last_s = self.requested, signum, now_s
        if again or not self.deferred:
            raise Interrupted(signum)
        self.say(f"{signal.Signals(signum).name}: finishing this step, then saving; once more stops at once, unsaved")


def end_at_once() -> None:
    """Until `Interrupts` are installed a signal ends the process without a word: there is nothing to lose yet."""
    _handle_all(lambda signum, _: os._exit(128 + signum))


def follow(parent: int) -> None:
    """Do as at SIGTERM as soon as `parent` is no longer this process's parent, and END_S later end whatever goes on.

    For a process that has no purpose without the one that started it, which SIGKILL may have ended.
    """

    def watch() -> None:
        never = threading.Event()
        while os.getppid() == parent:
            never.wait(PARENT_S)
        os.kill(os.getpid(), signal.SIGTERM)
        never.wait(END_S)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _handle_all(handler: Callable[[int, Any], Any]) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        # nohup has SIGHUP ignored, so that a run survives its terminal
        if signum and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):
            signal.signal(signum, handler)
