"""The terminal of a person: silent, plain, or redrawn."""

import contextlib
import os
import re
import subprocess
import sys

import pytest

from profiling import ROOT
from profiling.output import terminal as console
from profiling.output.terminal import Terminal


def test_lines_go_to_stderr_beside_a_script_and_nowhere_from_a_silent_terminal(capsys):
    """But for warnings and errors."""
    terminal = Terminal(json=True)
    terminal.say("hello")
    terminal.put("{}")
    assert capsys.readouterr() == ("{}\n", "hello\n")
    terminal = Terminal(speaks=False)
    terminal.say("a")
    terminal.banner("b", "c")
    terminal.header(["d"])
    with terminal.progress(10) as meter:
        meter.advance(5)
    assert capsys.readouterr() == ("", "")
    terminal.warn("w")
    terminal.error("e")
    assert capsys.readouterr().err == "warning: w\nerror: e\n"


def test_text_is_never_cut_or_taken_for_markup_and_a_growing_table_keeps_its_columns(capsys):
    terminal = Terminal()
    terminal.header(["epoch", "a long name"])
    terminal.row(["1", "2.5"])
    head, row = capsys.readouterr().out.splitlines()
    assert len(head) == len(row) == 8 + 2 + len("a long name")
    terminal.say("[red]x[/red] [/]" + "x" * 500)
    terminal.table("[b]t", ["[i]c", "n"], [["[u]r", "1"]])
    terminal.banner("[b]", "[/b]")
    out, err = capsys.readouterr()
    for text in ("[red]x[/red] [/]" + "x" * 500, "[b]t", "[i]c", "[u]r"):
        assert text in out
    assert "[/b]" in err


@pytest.mark.parametrize(
    ("total", "done", "unit", "units", "line"),
    [
        (100, 10, "images", (40, 50), r"epoch 1  [\d,]+ images/s  50/100, about \d+ s left"),
        (10, 0, "epochs", (2,), r"epoch 1  0\.25 epochs/s  2/10, about 32 s left"),
    ],
    ids=["fast", "slow"],
)
def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch, total, done, unit, units, line):
    """The last one is left out."""
    monkeypatch.setattr(console, "PLAIN_PROGRESS_S", 0.0)
    with Terminal().progress(total, done, unit) as meter:
        meter.start_s -= 8
        for more in units:
            meter.advance(more, "epoch 1")
    (said,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(line, said)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("columns", ["100", "80", "40"])
def test_a_bar_on_a_terminal(columns):
    """A narrow table cuts its words, not its numbers."""
    import pty

    code = """
from profiling.output.terminal import Terminal
with Terminal().progress(20000, 0, "images") as meter:
    meter.advance(10240, "epoch 1/2  loss 1.2345")
    meter.bar.refresh()
"""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": columns}
    child = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment, cwd=ROOT)
    os.close(follower)
    seen = b""
    with contextlib.suppress(OSError):  # Linux says so when the other end closes
        while part := os.read(leader, 65536):
            seen += part
    os.close(leader)
    assert child.wait() == 0
    assert b"10240/20000" in seen
    assert b"epoch" in seen
    assert columns == "40" or re.search(rb"epoch 1/2  loss 1.2345  [0-9,]+ images/s", seen)
