import subprocess
import sys

import pytest

from profiling import ROOT


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("collection_overhead --pairs 1", "argument --pairs: 1 is too small; it must be at least"),
    ],
)
def test_a_slip_of_the_finger_is_a_line_and_exit_code_2_before_torch_is_loaded(words, expected):
    """torch takes a second to load, and cannot here."""
    module, *rest = words.split()
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, f"experiments.{module}", *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
