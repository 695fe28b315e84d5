import os
from dataclasses import replace
from pathlib import Path

import pytest
from traces import BUSY, STEP_NS, US, HandMadeTrace, training_step

from profiling.attribution import idle, per_step, sweep
from profiling.categories import categorise
from profiling.replay import Learned, attribute_replays, learn
from profiling.trace import read


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def eager_kernels(path) -> list:
    made = HandMadeTrace()
    training_step(made, 0, 0)
    return read(made.write(path)).kernels


def replays(path, count: int = 3, change=lambda number, kernels: kernels):
    """A trace of `count` replays of the training step, each changed by `change(number, kernels)`."""
    eager = eager_kernels(path)
    first = eager[0].start_ns
    made = HandMadeTrace()
    for number in range(count):
        start = number * STEP_NS
        made.step(number, start, STEP_NS)
        kernels = [(k.name, start + 50 * US + k.start_ns - first, k.end_ns - k.start_ns) for k in eager]
        made.graph(start + 10 * US, change(number, kernels))
    return read(made.write(path)), learn(eager)


def without_one(number, kernels):
    return kernels[:4] + kernels[5:] if number == 1 else kernels


def with_one_more(number, kernels):
    return [*kernels, ("mystery", kernels[-1][1] + STEP_NS // 4, US)] if number == 1 else kernels


def test_replays_are_given_the_operations_of_the_eager_step(path):
    trace, learned = replays(path)
    assert {key.op for key in per_step(trace).by_kernel} == {""}
    kernels, lacks = attribute_replays(trace, learned)
    assert lacks == []
    filled = replace(trace, kernels=kernels)
    assert {category: ns for category, ns in per_step(filled).by_category.items() if ns} == BUSY
    wgrad = next(kernel for kernel in kernels if "wgrad" in kernel.name)
    assert wgrad.ops[-1] == "aten::convolution_backward"
    assert wgrad.dims == "[[64,32,16,16],[64,32,16,16],[32,32,3,3]]"
    assert [k._replace(ops=(), dims="") for k in kernels] == trace.kernels


def test_gaps_inside_of_a_replay_are_not_the_hosts(path):
    trace, learned = replays(path)
    kernels, _ = attribute_replays(trace, learned)
    gaps = idle(replace(trace, kernels=kernels))
    assert gaps.launch_gap_ns == 3 * 70 * US
    assert gaps.host_ns == 2 * (STEP_NS - 470 * US)


@pytest.mark.parametrize(
    ("change", "length"), [(without_one, 9), (with_one_more, 11)], ids=["kernel_missing", "kernel_too_many"]
)
def test_incomplete_replay_is_said_and_has_no_idle(path, change, length):
    trace, learned = replays(path, change=change)
    kernels, lacks = attribute_replays(trace, learned)
    assert lacks == [f"trace incomplete: 1 of 3 graph replays have {length} kernels, not 10"]
    spoiled = replace(trace, kernels=kernels, lacks=trace.lacks + lacks)
    assert idle(spoiled) is None
    of_step = {number: {categorise(k) for k in kernels if trace.step_of(k) == number} for number in range(3)}
    assert of_step[1] == {"unknown"}
    assert of_step[0] == of_step[2] == set(BUSY)
    assert all(k.dims == "" for k in kernels if trace.step_of(k) == 1)


def test_replay_of_another_length_than_the_eager_step_is_incomplete(path):
    trace, learned = replays(path, change=lambda number, kernels: kernels[:-1])
    kernels, lacks = attribute_replays(trace, learned)
    assert lacks == ["trace incomplete: 3 of 3 graph replays have 9 kernels, not 10"]
    assert sweep(kernels).by_category["unknown"] == sweep(kernels).busy_ns


def test_nothing_learned_leaves_names_and_says_so(path):
    trace, _ = replays(path)
    kernels, lacks = attribute_replays(trace, [])
    assert kernels == trace.kernels
    assert len(lacks) == 1
    assert lacks[0].startswith("trace incomplete: how many kernels")
    assert sweep(kernels).by_category["convolution"] == 3 * BUSY["convolution"]


def test_short_replay_is_found_even_if_nothing_was_learned(path):
    trace, _ = replays(path, change=without_one)
    kernels, lacks = attribute_replays(trace, [])
    assert lacks[0] == "trace incomplete: 1 of 3 graph replays have 9 kernels, not 10"
    assert {categorise(k) for k in kernels if trace.step_of(k) == 1} == {"unknown"}


def test_trace_without_replays_is_as_it_was(path):
    made = HandMadeTrace()
    training_step(made, 0, 0)
    trace = read(made.write(path))
    assert attribute_replays(trace, []) == (trace.kernels, [])


ADD, RELU = Learned("elementwise", ("aten::add",), "[[1]]"), Learned("elementwise", ("aten::relu",), "[[2]]")
CONV = Learned("implicit_gemm", ("aten::conv2d",), "[[3]]")


@pytest.mark.parametrize(
    ("names", "ops"),
    [
        (["elementwise", "implicit_gemm", "elementwise"], ["aten::add", "aten::conv2d", "aten::relu"]),
        (["implicit_gemm", "elementwise", "elementwise"], ["aten::conv2d", "aten::add", "aten::relu"]),
        (["elementwise", "winograd", "elementwise"], ["aten::add", None, "aten::relu"]),
    ],
    ids=["of_one_name_by_order", "branches_in_another_order", "name_that_the_eager_step_did_not_have"],
)
def test_kernels_are_matched_by_name_and_order(path, names, ops):
    made = HandMadeTrace()
    made.step(0, 0, 1_000)
    made.graph(10, [(name, 100 * (i + 1), 10) for i, name in enumerate(names)])
    kernels, lacks = attribute_replays(read(made.write(path)), [ADD, CONV, RELU])
    assert lacks == []
    assert [kernel.ops[-1] if kernel.ops else None for kernel in kernels] == ops
    assert [categorise(kernel) for kernel in kernels].count("convolution") == 1


def test_only_eager_kernels_are_learned_from(path):
    made = HandMadeTrace()
    made.step(0, 0, 1_000)
    made.op("aten::relu", 0, 50, [[2]])
    made.kernel("second", 20, 300, 10)
    made.kernel("first", 25, 200, 10, stream=20)
    made.graph(100, [("third", 400, 10)])
    assert learn(read(made.write(path)).kernels) == [
        Learned("first", ("aten::relu",), "[[2]]"),
        Learned("second", ("aten::relu",), "[[2]]"),
    ]


def test_recorded_replay_has_no_idle_of_the_hosts():
    folder = os.environ.get("GPU_TRACES_DIR")
    if not folder:
        pytest.skip("needs GPU_TRACES_DIR, a folder of recorded traces")
    trace = read(Path(folder) / "graph_replay.json.gz")
    learned = [Learned(k.name, ("aten::mm",), "") for k in trace.kernels if k.graph is not None]
    assert len(learned) == 421
    kernels, lacks = attribute_replays(trace, learned)
    assert lacks == []
    assert sum(categorise(k) == "convolution" for k in kernels) >= 421
    kernels, lacks = attribute_replays(trace, learned[1:])
    assert lacks == ["trace incomplete: 1 of 1 graph replays have 421 kernels, not 420"]
