"""What several tests of train.py do with a run: start one, stop one, compare two."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist
from runs import final_tensors
from typer.testing import CliRunner

import train
from profiling import ROOT
from profiling.output.files import read_jsonl

needs_gloo = pytest.mark.skipif(
    os.name == "nt" or not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo and POSIX signals"
)


def losses(out: Path) -> list[tuple]:
    names = ("epoch", "step", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return [tuple(row[name] for name in names) for row in read_jsonl(out / "log.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, statistics, momentum, sums, and every figure of the log that is not a time."""
    left, right = final_tensors(a), final_tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert losses(a) == losses(b)


def digest(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("checkpoint-*"))}


def in_a_hurry(session, monkeypatch):
    """SIGTERM, after which nothing may wait: whoever sends it soon sends SIGKILL."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    session.interrupts.handle(signal.SIGTERM)


def stop_at(session, step, stop=lambda session: session.interrupts.handle(signal.SIGTERM)):
    def on_step(number):
        if number == step:
            stop(session)

    return on_step


def invoke(*arguments: str):
    return CliRunner().invoke(train.app, arguments)


def nowhere(how: str):
    """What takes nothing: a "pipe" whose reader has gone, or a "disk" that is full."""
    if how == "disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("needs /dev/full")
        return open("/dev/full", "w")
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


RUN = ("--preset", "laptop", "--epochs", "3", "--out")
"""Arguments of the run that the tests stop and resume, up to its folder."""


def tiny(
    *arguments: object, fault: str = "", env: dict[str, str] | None = None, fresh: bool = False, **options
) -> subprocess.CompletedProcess:
    """The program as users run it, but on the tiny data; in a fork, or in a `fresh` process with its `options`."""
    words, env = [str(word) for word in arguments], {"FAULT": fault, **(env or {})}
    if not fresh and hasattr(os, "fork"):
        return forks.run("runs:main", *words, env=env)[0]
    command, env = [sys.executable, ROOT / "tests" / "support" / "runs.py", *words], {"OMP_NUM_THREADS": "1"} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, env={**os.environ, **env}, timeout=120, **{**pipes, **options})
