import os
import signal

import pytest

from model.interrupts import Interrupted, Interrupts


def test_at_once_while_nothing_could_be_lost():
    interrupts = Interrupts()
    with pytest.raises(Interrupted) as error:
        interrupts.handle(signal.SIGTERM)
    assert error.value.exit_code == 143


def test_deferred_once_and_never_twice():
    interrupts = Interrupts()
    interrupts.deferred = True
    interrupts.handle(signal.SIGINT)
    assert interrupts.requested == signal.SIGINT
    with pytest.raises(Interrupted) as error:
        interrupts.handle(signal.SIGINT)
    assert error.value.exit_code == 130


def test_it_takes_over_both_signals():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    interrupts = Interrupts()
    try:
        interrupts.install()
        interrupts.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested == signal.SIGTERM
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
