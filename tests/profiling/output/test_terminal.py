import os
import re
import subprocess
import sys

import pytest

from profiling import ROOT
from profiling.output import terminal as console
from profiling.output.terminal import Terminal


def test_people_move_to_stderr_when_stdout_is_for_a_script(capsys):
    Terminal(json=True).say("hello")
    assert capsys.readouterr() == ("", "hello\n")
    Terminal().say("hello")
    assert capsys.readouterr() == ("hello\n", "")


def test_who_does_not_speak_is_silent_but_for_warnings_and_errors(capsys):
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


def test_a_growing_table_keeps_its_columns(capsys):
    terminal = Terminal()
    terminal.header(["epoch", "a long name"])
    terminal.row(["1", "2.5"])
    head, row = capsys.readouterr().out.splitlines()
    assert len(head) == len(row) == 8 + 2 + len("a long name")


def test_text_is_never_taken_for_markup(capsys):
    terminal = Terminal()
    terminal.say("[red]x[/red] [/]")
    terminal.table("[b]t", ["[i]c", "n"], [["[u]r", "1"]])
    terminal.banner("[b]", "[/b]")
    out, err = capsys.readouterr()
    assert "[red]x[/red] [/]" in out
    assert "[b]t" in out
    assert "[u]r" in out
    assert "[/b]" in err


def test_long_lines_are_not_cut(capsys):
    Terminal().say("x" * 500)
    assert "x" * 500 in capsys.readouterr().out


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_PROGRESS_S", 0.0)
    with Terminal().progress(100, 10, "images") as meter:
        meter.advance(40, "epoch 1")
        meter.advance(50, "epoch 1")
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1  [\d,]+ images/s  50/100, about \d+ s left", line)


def test_the_rate_of_what_takes_seconds_is_not_zero(capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_PROGRESS_S", 0.0)
    with Terminal().progress(10, 0, "epochs") as meter:
        meter.start_s -= 8
        meter.advance(2)
    assert "  0.25 epochs/s  2/10" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("columns", ["100", "80", "40"])
def test_a_bar_on_a_terminal(columns):
    """Of a narrow one the words are cut, and not the numbers."""
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
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux says so when the other end closes
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert child.wait() == 0
    assert b"10240/20000" in seen
    assert b"epoch" in seen
    assert columns == "40" or re.search(rb"epoch 1/2  loss 1.2345  [0-9,]+ images/s", seen)
