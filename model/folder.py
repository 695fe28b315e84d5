"""A run's folder: a name that no other run has, and one process at a time that writes there."""

import contextlib
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from model.errors import UsageError

LOCK, OWNER = ".lock", ".owner"
PATIENCE_S = 1.0
"""Seconds to wait for a lock: its owner may be about to end, or about to say who it is."""


def make(folder: Path) -> None:
    """Make `folder` with its parents, unless it is there. Raises UsageError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error}; name a folder that can be written to") from None


def make_new(folder: Path) -> Path:
    """Make `folder`, or the first of `folder`-2, `folder`-3, ... that is not there; returns it. Raises UsageError."""
    make(folder.parent)
    for number in itertools.count(1):
        new = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            new.mkdir()
            return new
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{new} cannot be made: {error}; name another folder with --out") from None


def is_empty(folder: Path) -> bool:
    """Whether no run has written to `folder`. Raises OSError."""
    return all(path.name in (LOCK, OWNER) for path in folder.iterdir())


@contextlib.contextmanager
def hold(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep every other process from holding `folder`; this one may hold it several times.

    The lock is the system's and ends with the process, however that ends. Raises UsageError, naming the owner, where
    another process has it. A folder that cannot be locked at all (no space, no locks in its file system) is only
    warned of: what cannot be written there has an answer of its own.
    """
    lock, owner = FileLock(folder / LOCK, timeout=PATIENCE_S, is_singleton=True), folder / OWNER
    outermost = not lock.is_locked
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"{folder} is in use by {_said_by(owner)}: let it finish, end it, or name another folder with --out"
        ) from None
    except (OSError, NotImplementedError) as error:
        warn(f"{folder} cannot be locked: {error}; take care that no other process writes there")
        yield
        return
    try:
        if outermost:
            with contextlib.suppress(OSError):
                owner.unlink(missing_ok=True)  # so that a link is not followed
                with open(owner, "x", encoding="utf-8") as file:
                    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield
    finally:
        if outermost:
            with contextlib.suppress(OSError):
                owner.unlink(missing_ok=True)
        lock.release()


def _said_by(owner: Path) -> str:
    try:  # never waits, should it be a pipe
        descriptor = os.open(owner, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb") as file:
            text = file.read(200).decode("utf-8", errors="replace")
    except OSError:
        text = ""
    return "".join(filter(str.isprintable, text)) or "another process"
