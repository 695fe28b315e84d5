import os
import signal
import subprocess
import sys

import pytest

from model import interrupts as module
from model.interrupts import BURST_S, Interrupted, Interrupts
from profiling import ROOT

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture
def clock(monkeypatch):
    """`clock.s` is what the module takes for the time."""

    class Clock:
        s = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.s)
    return Clock


def test_at_once_while_nothing_could_be_lost():
    interrupts = Interrupts(pytest.fail)
    with pytest.raises(Interrupted) as error:
        interrupts.handle(signal.SIGTERM)
    assert error.value.exit_code == 143


def test_deferred_once_with_a_word_and_never_twice(clock):
    said = []
    interrupts = Interrupts(said.append)
    interrupts.deferred = True
    interrupts.handle(signal.SIGINT)
    assert interrupts.requested == signal.SIGINT
    assert said == ["SIGINT: finishing this step, then saving; once more stops at once, unsaved"]
    clock.s += 2 * BURST_S
    with pytest.raises(Interrupted) as error:
        interrupts.handle(signal.SIGINT)
    assert error.value.exit_code == 130
    assert len(said) == 1


@pytest.mark.parametrize("deferred", [True, False])
def test_signals_of_one_moment_are_one(clock, deferred):
    """Neither the saving nor the summary after it is cut short by what a terminal and a launcher send together."""
    interrupts = Interrupts()
    interrupts.deferred = deferred
    if deferred:
        interrupts.handle(signal.SIGTERM)
    else:
        with pytest.raises(Interrupted):
            interrupts.handle(signal.SIGTERM)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        clock.s += BURST_S / 4
        interrupts.handle(signum)
    assert interrupts.requested == signal.SIGTERM


SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.fixture
def handlers():
    """The earlier handlers come back."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


@posix
@pytest.mark.parametrize("signum", SIGNALS)
def test_it_takes_over_the_signals(handlers, not_under_nohup, signum):
    interrupts = Interrupts()
    interrupts.install()
    interrupts.deferred = True
    os.kill(os.getpid(), signum)
    assert interrupts.requested == signum


@posix
def test_under_nohup_a_run_outlives_its_terminal(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Interrupts().install()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


ORPHAN = """
import os, signal, sys, time
from model import interrupts
interrupts.PARENT_S, interrupts.END_S = 0.05, float(sys.argv[1])
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    interrupts.Interrupts().install()
interrupts.follow(os.getppid())
print("here", flush=True)
try:
    time.sleep(600)
except interrupts.Interrupted as error:
    print(error, flush=True)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@posix
@pytest.mark.parametrize(("end_s", "hears", "said"), [("600", "", "interrupted by SIGTERM\n"), ("0.05", "deaf", "")])
def test_a_process_ends_when_its_parent_is_killed(end_s, hears, said):
    command = [sys.executable, "-c", PARENT, ORPHAN, end_s, hears]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "here\n"
    parent.kill()
    assert parent.stdout.read() == said  # to its end, where the orphan has ended
    parent.wait()
