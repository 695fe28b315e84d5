"""A person's terminal: lines, a table that grows by a row an epoch, a progress bar, banners.

A closed pipe (`| head`), a full disk, a locale without Unicode, a narrow or absent terminal change the looks, and never
end the run.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import rich.box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

PLAIN_PROGRESS_S = 30.0
"""Seconds between progress lines without a terminal."""


class _Stream:
    """A stream that is silently discarded from the first failed write on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self.stream.flush()

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a pipe that nobody reads, a full disk, a terminal that was closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            with suppress(OSError):  # empties its buffer, of which Python would complain at exit
                self.stream.flush()


def _console(stderr: bool, quiet: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream and _Stream(stream), stderr=stderr, highlight=False, quiet=quiet)


class Terminal:
    """Speaks on stdout, or on stderr if stdout is for a script (`json`); is silent unless `speaks`."""

    def __init__(self, json: bool = False, speaks: bool = True):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self.speaks = speaks
        self.out = _console(stderr=json, quiet=not speaks)
        self.err = _console(stderr=True)
        self._widths: list[int] = []

    def put(self, text: str) -> None:
        """A line for a script on stdout, unchanged."""
        if sys.stdout is not None:  # None: closed from the start
            print(text, file=_Stream(sys.stdout), flush=True)

    def say(self, text: str, style: str = "") -> None:
        """A line for people."""
        self.out.print(Text(text, style), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr that begins with `warning:`."""
        self.err.print(Text(f"warning: {text}", "yellow"), soft_wrap=True)

    def error(self, text: str) -> None:
        """A line on stderr that begins with `error:`."""
        self.err.print(Text(f"error: {text}", "red"), soft_wrap=True)

    def banner(self, title: str, text: str) -> None:
        """A box on stderr."""
        if not self.out.quiet:
            self.err.print(Panel(Text(text), title=Text(title), box=rich.box.HEAVY, style="bold yellow"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others are figures."""
        table = Table(title=Text(title), box=rich.box.SIMPLE, title_justify="left")
        for i, name in enumerate(columns):
            table.add_column(Text(name), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        self.out.print(table)

    def header(self, columns: Sequence[str]) -> None:
        """Begin a growing table; a column is as wide as its name, and at least 8."""
        self._widths = [max(len(name), 8) for name in columns]
        self.row(columns, "bold")

    def row(self, cells: Sequence[str], style: str = "") -> None:
        """Add a row to the growing table."""
        self.say("  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)), style)

    @contextmanager
    def progress(self, total: int, done: int = 0, unit: str = "") -> Iterator["Meter"]:
        """A bar over `total` units on a terminal, a line every half minute elsewhere."""
        if not self.out.is_terminal or self.out.quiet:
            yield Meter(self, total, done, unit, None)
            return
        bar = Progress(  # a narrow terminal cuts the words, not the numbers
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=self.out,
            transient=True,
            expand=True,
        )
        with bar:
            yield Meter(self, total, done, unit, bar)


class Meter:
    """The progress of one thing."""

    def __init__(self, terminal: Terminal, total: int, done: int, unit: str, bar: Progress | None):
        self.terminal, self.total, self.done, self.unit, self.bar = terminal, total, done, unit, bar
        self.task = bar.add_task("", total=total, completed=done) if bar else None
        self.first, self.start_s = done, time.monotonic()
        self.said_s = self.start_s

    def advance(self, units: int, text: str = "") -> None:
        """Count `units` more as done; `text` goes beside the bar."""
        self.done += units
        now_s = time.monotonic()
        rate = (self.done - self.first) / max(now_s - self.start_s, 1e-9)
        text = f"{text}  {f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'} {self.unit}/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
            return
        if now_s - self.said_s < PLAIN_PROGRESS_S or self.done >= self.total:
            return
        self.said_s = now_s
        left_s = (now_s - self.start_s) * (self.total - self.done) / max(self.done - self.first, 1)
        self.terminal.say(f"{text}  {self.done:,}/{self.total:,}, about {left_s:.0f} s left")
