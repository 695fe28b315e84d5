"""Traces that are cut off, malformed, hostile or very large: named in `lacks`, and nothing raises."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from traces import AUTOGRAD, STEP_NS, HandMadeTrace, training_step

from profiling.account import trace as trace_module
from profiling.account.trace import read


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def one_kernel(made: HandMadeTrace) -> None:
    made.step(0, 0, 1_000)
    made.kernel("k", 10, 100, 10)


def call(name: str, start: int, **more):
    return lambda made: made.call(name, start, **more)


def orphan(start: int, external: int = 0):
    return lambda made: made.on_device("orphan", start, 10, 900, external=external)


def step(made):
    made.step(0, 0, 1_000)


def relu(made):
    made.op("aten::relu", 5, 4)  # its External id is that of the orphan where it is the first event


OF_A_LAUNCH, OF_A_KERNEL = "the kernels of 1 launches are missing", "the launches of 1 kernels are missing"
LACKS = {
    "launch_without_kernel": ((one_kernel, call("cudaLaunchKernel", 50)), OF_A_LAUNCH),
    "graph_without_kernels": ((one_kernel, lambda made: made.graph(50, [])), OF_A_LAUNCH),
    "launches_without_any_kernel": ((step, call("cudaLaunchKernel", 10)), "1 launches, but no kernels"),
    "kernel_without_launch_among_others": ((one_kernel, orphan(130)), OF_A_KERNEL),
    "first_launch_missing_whose_operation_is_there": ((relu, orphan(20, external=1), one_kernel), OF_A_KERNEL),
    "all_launches_missing": ((step, relu, orphan(20)), OF_A_KERNEL),
}


@pytest.mark.parametrize(("build", "lack"), LACKS.values(), ids=LACKS)
def test_missing_events_are_named(path, build, lack):
    made = HandMadeTrace()
    for part in build:
        part(made)
    trace = read(made.write(path))
    assert trace.lacks == [f"trace incomplete: {lack}"]
    assert trace.on_gpu


def leftover_of_before(made):
    """Launched before the profiler began: neither its launch nor its operation is there."""
    made.event("cpu_op", "aten::relu", 5, 4)  # neither has an External id, which makes them no pair
    made.event("kernel", "leftover", 5, 60, 7, stream=7, device=0, correlation=900)


def launches_captured_into_a_graph(made):
    made.call("cudaStreamBeginCapture", 200, 2)
    made.call("cudaLaunchKernel", 210, thread=AUTOGRAD)
    made.call("cudaStreamEndCapture", 220, 2)


WHOLE = {
    "leftover_of_before": leftover_of_before,
    "launch_outside_of_the_steps": call("cudaLaunchKernel", 2_000),
    "launches_captured_into_a_graph": launches_captured_into_a_graph,
    "copy_that_left_no_record": call("cudaMemsetAsync", 200),
    "stub_of_a_step": lambda made: made.step(1, 1_000, 3),  # left by the profiler when it ends behind a step
}


@pytest.mark.parametrize("build", WHOLE.values(), ids=WHOLE)
def test_whole_traces_lack_nothing(path, build):
    made = HandMadeTrace()
    one_kernel(made)
    build(made)
    trace = read(made.write(path))
    assert trace.lacks == []
    assert [step.number for step in trace.steps] == [0]


UNREADABLE = {
    "empty_file": (b"", "trace incomplete: the file is empty"),
    "no_events": (b'{"traceEvents": []}', "the trace holds no work"),
    "garbage": (b"garbage", "trace incomplete: not JSON"),
    "cut_in_an_event": (
        b'[{"ph": "X", "cat": "kernel", "ts": 5',
        "trace incomplete: the file is cut off",
    ),
}


@pytest.mark.parametrize(("content", "lack"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_trace_is_an_empty_one(path, content, lack):
    path.write_bytes(content)
    trace = read(path)
    assert (trace.kernels, trace.steps, trace.syncs, trace.on_gpu, trace.device_name) == ([], [], [], False, None)
    assert any(found.startswith(lack) for found in trace.lacks)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
def test_trace_cut_off_in_an_event_keeps_what_came_before(path, compress):
    made = HandMadeTrace()
    for number in range(200):
        training_step(made, number, number * STEP_NS)
    data = made.text().encode()
    data = gzip.compress(data) if compress else data
    path.write_bytes(data[: len(data) // 2])
    trace = read(path)
    assert 80 <= len(trace.steps) <= 110
    assert any(lack.startswith("trace incomplete") for lack in trace.lacks)


HOSTILE = {
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
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_malformed_kernels_are_left_out_and_counted(path, change):
    made = HandMadeTrace()
    one_kernel(made)
    record = json.loads(made.text())
    kernel = {**record["traceEvents"][-1], **change}
    record["traceEvents"].append(kernel)
    path.write_text(json.dumps(record))
    trace = read(path)
    assert [k.name for k in trace.kernels] == ["k"]
    assert trace.lacks == ["trace incomplete: 1 events were malformed and left out"]


LAUNCH = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 1}
HOST = {
    "category_is_a_list": {"cat": ["kernel"]},
    "args_are_a_list": {"cat": "cpu_op", "ts": 1, "dur": 1, "args": []},
    "pid_is_a_list": {"cat": "cpu_op", "ts": 1, "dur": 1, "pid": [], "args": {}},
    "correlation_is_an_object": {
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": 1,
        "dur": 1,
        "args": {"correlation": {}},
    },
    "step_without_end": {"cat": "user_annotation", "name": "ProfilerStep#3", "ts": 1},
}


@pytest.mark.parametrize("event", HOST.values(), ids=HOST)
def test_malformed_events_of_the_host_are_counted(path, event):
    path.write_text(json.dumps([{"ph": "X", "name": "k"} | event]))
    trace = read(path)
    assert trace.kernels == trace.steps == []
    assert "trace incomplete: 1 events were malformed and left out" in trace.lacks


TIMES = {
    "1414456661859.938": 1_414_456_661_859_938,
    "1414456661859.9": 1_414_456_661_859_900,
    "1414456661859.9384": 1_414_456_661_859_938,
    "1695835572943613": 1_695_835_572_943_613_000,
    "1.5e3": 1_500_000,
    "-2.25": -2_250,
    "0.001": 1,
}


@pytest.mark.parametrize(("written", "ns"), TIMES.items())
def test_times_are_exact(path, written, ns):
    event = '{"ph": "X", "cat": "kernel", "name": "k", "tid": 7, "pid": 0, "dur": 0.003, "args": {}, "ts": '
    path.write_text(f"[{event}{written}}}]")
    (kernel,) = read(path).kernels
    assert (kernel.start_ns, kernel.end_ns) == (ns, ns + 3)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("nul \0 and \x1b[31m", "nul \0 and \x1b[31m"),
        ("x" * 100_000, "x" * trace_module.LONGEST_NAME),
        ("half a pair \ud800", "half a pair ?"),
        ("", ""),
    ],
    ids=["markup", "control_characters", "very_long", "lone_surrogate", "empty"],
)
def test_hostile_names_are_kept_as_they_can_be_written(path, name, kept):
    made = HandMadeTrace()
    made.step(0, 0, 100)
    made.op(name, 0, 50)
    made.kernel(name, 10, 60, 5)
    trace = read(made.write(path))
    assert trace.kernels[0].name == kept
    assert trace.kernels[0].ops == (kept,)
    kept.encode()
    assert trace.lacks == []


def test_dims_too_long_are_left_out(path):
    made = HandMadeTrace()
    made.op("aten::cat", 0, 50, [[[1, 2, 3]] * 20_000])
    made.kernel("k", 10, 60, 5)
    assert read(made.write(path)).kernels[0].dims == ""


A, B = {"id": 0, "name": "A"}, {"id": 5, "name": "B"}
DEVICES = {
    "by_id": ([A, B], "A"),
    "the_only_one": ([B], "B"),
    "not_among_several": ([A | {"id": 4}, B], None),
    "no_name": ([A | {"name": ""}], None),
    "number": ([A | {"name": 7}], None),
    "text": ("A", None),
    "lists": ([["A"]], None),
}


@pytest.mark.parametrize(("properties", "name"), DEVICES.values(), ids=DEVICES)
def test_device_is_named_only_if_it_is_known(path, properties, name):
    made = HandMadeTrace()
    one_kernel(made)
    path.write_text(json.dumps(json.loads(made.text()) | {"deviceProperties": properties}))
    assert read(path).device_name == name


def test_memory_goes_with_what_is_kept_and_not_with_the_file(path):
    """20 MB of Python frames, memory events and arrows around the same step."""
    peaks = []
    for noise in (0, 31_000):
        made = HandMadeTrace()
        training_step(made, 0, 0)
        made.noise(noise)
        training_step(made, 1, STEP_NS)
        made.write(path)
        del made
        tracemalloc.start()
        trace = read(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(trace.kernels) == 20
    assert path.stat().st_size > 20e6
    assert peaks[1] - peaks[0] < 2e6
