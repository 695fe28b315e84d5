"""Traces that are cut off, malformed, hostile or very large: named in `lacks`, and nothing raises."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from traces import AUTOGRAD, HandMadeTrace

from profiling.account.trace import LONGEST_NAME, read

STEP, KERNEL, RELU = ("step", 0, 0, 1_000), ("kernel", "k", 10, 100, 10), ("op", "aten::relu", 5, 4)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def orphan(start: int, external: int = 0) -> tuple:
    """A kernel without a launch."""
    return ("on_device", "orphan", start, 10, 900, {"External id": external})


def call(name: str, start: int) -> tuple:
    return ("call", name, start, 2, AUTOGRAD)


CAPTURE = (call("cudaStreamBeginCapture", 200), call("cudaLaunchKernel", 210), call("cudaStreamEndCapture", 220))
# Of before the profiler began, so that launch and operation are not there. Without External ids these are no pair.
LEFTOVER = (
    ("event", "cpu_op", "aten::relu", 5, 4),
    ("event", "kernel", "leftover", 5, 60, 7, {"stream": 7, "device": 0, "correlation": 900}),
)
OF_A_LAUNCH = "trace incomplete: the kernels of 1 launches are missing"
OF_A_KERNEL = "trace incomplete: the launches of 1 kernels are missing"
LACKS = {
    "launch_without_kernel": ((STEP, KERNEL, call("cudaLaunchKernel", 50)), OF_A_LAUNCH),
    "graph_without_kernels": ((STEP, KERNEL, ("graph", 50, [])), OF_A_LAUNCH),
    "launches_without_any_kernel": (
        (STEP, call("cudaLaunchKernel", 10)),
        "trace incomplete: 1 launches, but no kernels",
    ),
    "kernel_without_launch_among_others": ((STEP, KERNEL, orphan(130)), OF_A_KERNEL),
    # Its External id is that of the operation, the first event.
    "first_launch_missing_whose_operation_is_there": ((RELU, orphan(20, 1), STEP, KERNEL), OF_A_KERNEL),
    "all_launches_missing": ((STEP, RELU, orphan(20)), OF_A_KERNEL),
    "leftover_of_before": ((STEP, KERNEL, *LEFTOVER), None),
    "launch_outside_of_the_steps": ((STEP, KERNEL, call("cudaLaunchKernel", 2_000)), None),
    "launches_captured_into_a_graph": ((STEP, KERNEL, *CAPTURE), None),
    "copy_that_left_no_record": ((STEP, KERNEL, call("cudaMemsetAsync", 200)), None),
    "stub_of_a_step": ((STEP, KERNEL, ("step", 1, 1_000, 3)), None),  # left by the profiler when it ends behind a step
}


@pytest.mark.parametrize(("events", "lack"), LACKS.values(), ids=LACKS)
def test_missing_events_are_named_and_nothing_else_is(events, lack):
    trace = HandMadeTrace().apply(*events).read()
    assert trace.lacks == ([lack] if lack else [])
    assert trace.on_gpu
    assert [step.number for step in trace.steps] == [0]


UNREADABLE = {
    "empty_file": (b"", "trace incomplete: the file is empty"),
    "no_events": (b'{"traceEvents": []}', "the trace holds no work"),
    "garbage": (b"garbage", "trace incomplete: not JSON"),
    "cut_in_an_event": (b'[{"ph": "X", "cat": "kernel", "ts": 5', "trace incomplete: the file is cut off"),
}


@pytest.mark.parametrize(("content", "lack"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_trace_is_an_empty_one(path, content, lack):
    path.write_bytes(content)
    trace = read(path)
    assert (trace.kernels, trace.steps, trace.syncs, trace.on_gpu) == ([], [], [], False)
    assert any(found.startswith(lack) for found in trace.lacks)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
def test_trace_cut_off_in_an_event_keeps_the_events_before(path, compress):
    data = HandMadeTrace().training(*range(100)).text().encode()
    data = gzip.compress(data) if compress else data
    path.write_bytes(data[: len(data) // 2])
    trace = read(path)
    assert 40 <= len(trace.steps) <= 55
    assert any(lack.startswith("trace incomplete") for lack in trace.lacks)


MALFORMED = {
    "no_name": {"name": None},
    "name_is_a_number": {"name": 5},
    "no_args": {"args": None},
    "args_are_text": {"args": "stream 7"},
    "no_start": {"ts": None},
    "start_is_text": {"ts": "noon"},
    "start_is_a_list": {"ts": [1]},
    "start_is_true": {"ts": True},
    "device_is_true": {"args": {"stream": 7, "device": True, "correlation": 1}},
    "endless": {"dur": "1e999999999"},
    "not_a_number": {"dur": "NaN"},
    "ends_before_it_begins": {"dur": -5},
    "beyond_64_bits": {"ts": 10**30},
    "beyond_64_bits_with_an_exponent": {"ts": "1e18"},
    "stream_is_a_list": {"args": {"stream": [7], "correlation": 1}},
    "correlation_is_text": {"args": {"stream": 7, "correlation": "one"}},
    "correlation_beyond_64_bits": {"args": {"stream": 7, "correlation": 10**40}},
    "category_is_a_list": {"cat": ["kernel"]},
    "args_of_an_operation_are_a_list": {"cat": "cpu_op", "args": []},
    "pid_of_an_operation_is_a_list": {"cat": "cpu_op", "pid": []},
    "correlation_of_a_call_is_an_object": {
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "args": {"correlation": {}},
    },
    "step_without_end": {"cat": "user_annotation", "name": "ProfilerStep#3", "dur": None},
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_events_are_left_out_and_counted(path, change):
    record = json.loads(HandMadeTrace().apply(STEP, KERNEL).text())
    record["traceEvents"].append(record["traceEvents"][-1] | change)
    path.write_text(json.dumps(record))
    trace = read(path)
    assert ([k.name for k in trace.kernels], [step.number for step in trace.steps]) == (["k"], [0])
    assert trace.lacks == ["trace incomplete: 1 events were malformed and left out"]


NAMES = {
    "markup": ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    "control_characters": ("nul \0 and \x1b[31m", "nul \0 and \x1b[31m"),
    "very_long": ("x" * 100_000, "x" * LONGEST_NAME),
    "lone_surrogate": ("half a pair \ud800", "half a pair ?"),
    "empty": ("", ""),
}


@pytest.mark.parametrize(("name", "kept"), NAMES.values(), ids=NAMES)
def test_hostile_names_are_kept_as_they_can_be_written(name, kept):
    trace = HandMadeTrace().apply(("step", 0, 0, 100), ("op", name, 0, 50), ("kernel", name, 10, 60, 5)).read()
    assert (trace.kernels[0].name, trace.kernels[0].ops, trace.lacks) == (kept, (kept,), [])
    kept.encode()


def test_memory_grows_with_kept_events_not_with_the_file(path):
    """20 MB of Python frames, memory events and arrows between two steps."""
    peaks = []
    for noise in (0, 7_000):
        made = HandMadeTrace().training(0)
        made.noise(noise, text=2_500)
        made.training(1).write(path)
        del made
        tracemalloc.start()
        trace = read(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(trace.kernels) == 20
    assert path.stat().st_size > 20e6
    assert peaks[1] - peaks[0] < 2e6
