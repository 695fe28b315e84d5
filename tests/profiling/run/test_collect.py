import contextlib
import itertools
import sys

import pytest
import torch

from profiling.account.trace import read
from profiling.output.files import read_json
from profiling.run.clock import Clock
from profiling.run.collect import (
    CPU_WARM_UP_STEPS,
    WAIT_STEPS,
    Collection,
    _with_eager,
    record_failure,
    record_trace,
    run_pass,
)


def test_eager_steps_lose_no_step():
    assert list(_with_eager(iter(range(6)), {0, 2}, contextlib.nullcontext)) == list(range(6))


@pytest.mark.parametrize("captured", [True, False])
def test_the_eager_step_is_one_of_the_recorded_and_not_the_first(tmp_path, captured):
    """A session of the profiler loses kernels where it begins, and all steps are held against the eager one."""
    before, inside, entered = WAIT_STEPS + CPU_WARM_UP_STEPS, [False], []

    @contextlib.contextmanager
    def eagerly():
        inside[0] = True
        yield
        inside[0] = False

    def steps():
        for number in itertools.count():
            entered.extend([number] * inside[0])
            with torch.profiler.record_function("eager" if inside[0] else "replay"):
                torch.zeros(8).add_(1)
            yield 100 + number

    record_trace(steps(), torch.device("cpu"), tmp_path, {}, eagerly if captured else None, active=5)
    profile, trace = read_json(tmp_path / "profile.json"), read(tmp_path / "trace.json.gz")
    how = {trace.step_of(kernel): kernel.ops[0] for kernel in trace.kernels if kernel.ops[0] in ("eager", "replay")}
    expected = ["replay", "replay", "eager", "replay", "replay", "replay"] if captured else ["replay"] * 5
    assert [how[i] for i in range(len(trace.steps))] == expected
    assert profile["eager_step"] == (2 if captured else None)
    assert profile["step_images"] == [100 + before + i for i in range(len(expected))]
    assert len(profile["step_ns"]) == len(expected)
    assert entered == ([0, before + 2] if captured else [])  # once before the session, for what is only done once


PASSES = {
    "fails": ([sys.executable, "-c", "import sys; sys.exit('error: no luck')"], "exit code 1: error: no luck"),
    "is_killed": ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "exit code -9: no word"),
    "is_not_there": (["/no/such/program"], "No such file"),
}


@pytest.mark.parametrize(("command", "why"), PASSES.values(), ids=PASSES)
def test_a_pass_that_fails_is_a_warning(tmp_path, command, why):
    warnings = []
    assert why in run_pass("the pass", command, tmp_path, warnings.append)
    assert why in warnings[0]
    assert "report will lack" in warnings[0]
    assert run_pass("the pass", [sys.executable, "-c", "print(1)"], tmp_path, pytest.fail) is None


def test_a_failure_is_recorded_where_the_disk_takes_it(tmp_path):
    record_failure(tmp_path, "out of luck")
    assert read_json(tmp_path / "profile.json")["error"] == "out of luck"
    record_failure(tmp_path / "absent", "out of luck")


def test_a_failed_record_is_a_warning_and_never_ends_a_run(tmp_path):
    (tmp_path / "records").write_text("in the way")
    warnings = []
    collection = Collection(tmp_path, torch.device("cpu"), warnings.append)
    clock = Clock("training")
    clock.stop()

    def failed():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    collection.steps.to_json = failed
    collection.finish(clock)
    assert ["phases" in warnings[0], "illegal memory access" in warnings[1]] == [True, True]
