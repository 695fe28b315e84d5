import contextlib
import itertools
import sys

import pytest
import torch

from profiling.account.trace import read
from profiling.output.files import read_json
from profiling.run import collect
from profiling.run.clock import Clock
from profiling.run.collect import CPU_WARM_UP_STEPS, WAIT_STEPS, Collection, record_failure, record_trace, run_pass


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
    assert entered == ([0, before + 2] if captured else [])  # once before the session, for one-time work


def test_steps_may_end_early(tmp_path):
    """The eager steps lose none."""
    assert list(collect._with_eager(iter(range(6)), {0, 2}, contextlib.nullcontext)) == list(range(6))


PASSES = {
    "fails": ([sys.executable, "-c", "import sys; sys.exit('error: no luck')"], "exit code 1: error: no luck"),
    "is_killed": ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "exit code -9: no word"),
    "is_not_there": (["/no/such/program"], "No such file"),
    "hangs": ([sys.executable, "-c", "import time; time.sleep(30)"], "it was not done after 1 s"),
}


@pytest.mark.parametrize(("command", "why"), PASSES.values(), ids=PASSES)
def test_a_pass_that_fails_is_a_warning(tmp_path, monkeypatch, command, why):
    monkeypatch.setattr(collect, "PATIENCE_S", 1 if "after 1 s" in why else 60)
    warnings = []
    assert why in run_pass("the pass", command, tmp_path, warnings.append)
    assert why in warnings[0]
    assert "report will lack" in warnings[0]


def test_a_pass_that_succeeds_says_nothing(tmp_path):
    assert run_pass("the pass", [sys.executable, "-c", "print(1)"], tmp_path, pytest.fail) is None


def test_failures_are_recorded_as_far_as_the_disk_takes_them(tmp_path):
    """A failed record is a warning and never ends a run."""
    record_failure(tmp_path, "out of luck")
    assert read_json(tmp_path / "profile.json")["error"] == "out of luck"
    record_failure(tmp_path / "absent", "out of luck")
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
