import subprocess
import sys

import pytest

from profiling import ROOT


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("throughput --steps 0", "argument --steps: 0 is too small; it must be at least 2"),
        ("throughput --steps 1", "argument --steps: 1 is too small; it must be at least 2"),
        ("throughput --steps x", "argument --steps: 'x' is not a whole number"),
        ("throughput --batch 8", "unrecognized arguments: --batch 8"),
        ("collection_overhead --pairs 1", "argument --pairs: 1 is too small; it must be at least"),
        ("step_modes --batch 128 0", "argument --batch: 0 is too small; it must be at least 1"),
        ("step_modes --batch 99999999999999999999", "batch_size=99999999999999999999 is too large"),
        ("step_modes --steps 0", "argument --steps: 0 is too small; it must be at least 1"),
        ("step_modes --step 3", "unrecognized arguments: --step 3"),
        ("step_modes --modes slow", "argument --modes: invalid choice: 'slow'"),
        ("step_modes --preset lapto", "did you mean 'laptop'?"),
        ("step_modes --set widhts=8,8,8,8", "did you mean 'widths'?"),
        ("step_modes --set batch-size=8", "--set batch_size is what this measures several of; give --batch instead"),
        ("step_modes --out README.md", "README.md is not a folder"),
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
