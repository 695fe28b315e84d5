from dataclasses import replace
from pathlib import Path

import pytest
from traces import BUSY, STEP_NS, US, HandMadeTrace, training_step

from profiling.account.attribution import EagerKernel, attribute_replays, idle, learn, per_step
from profiling.account.categories import categorise
from profiling.account.trace import read


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def eager_kernels(path) -> list:
    made = HandMadeTrace()
    training_step(made, 0, 0)
    return read(made.write(path)).kernels


def replays(path, count: int = 3):
    """A trace of `count` replays of the training step, and what is learned from it."""
    eager = eager_kernels(path)
    first = eager[0].start_ns
    made = HandMadeTrace()
    for number in range(count):
        start = number * STEP_NS
        made.step(number, start, STEP_NS)
        kernels = [(k.name, start + 50 * US + k.start_ns - first, k.end_ns - k.start_ns) for k in eager]
        made.graph(start + 10 * US, kernels)
    return read(made.write(path)), learn(eager)


def test_replays_are_given_the_operations_of_the_eager_step(path):
    trace, learned = replays(path)
    assert {key.op for key in per_step(trace).total.by_kernel} == {""}
    kernels = attribute_replays(trace.kernels, learned)
    filled = replace(trace, kernels=kernels)
    found = per_step(filled).total.by_category
    assert {category: ns for category, ns in found.items() if ns} == {c: 3 * ns for c, ns in BUSY.items()}
    wgrad = next(kernel for kernel in kernels if "wgrad" in kernel.name)
    assert wgrad.ops[-1] == "aten::convolution_backward"
    assert wgrad.dims == "[[64,32,16,16],[64,32,16,16],[32,32,3,3]]"
    assert [k._replace(ops=(), dims="") for k in kernels] == trace.kernels


def test_gaps_inside_of_a_replay_are_not_the_hosts(path):
    trace, learned = replays(path)
    kernels = attribute_replays(trace.kernels, learned)
    gaps = idle(replace(trace, kernels=kernels))
    assert gaps.queued_ns == 3 * 70 * US
    assert gaps.data_ns + gaps.python_ns + gaps.launch_ns == 2 * (STEP_NS - 470 * US)


def test_trace_without_replays_is_as_it_was(path):
    made = HandMadeTrace()
    training_step(made, 0, 0)
    trace = read(made.write(path))
    assert attribute_replays(trace.kernels, [CONV]) == trace.kernels


ADD, RELU = EagerKernel("elementwise", ("aten::add",), "[[1]]"), EagerKernel("elementwise", ("aten::relu",), "[[2]]")
CONV = EagerKernel("implicit_gemm", ("aten::conv2d",), "[[3]]")


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
    kernels = attribute_replays(read(made.write(path)).kernels, [ADD, CONV, RELU])
    assert [kernel.ops[-1] if kernel.ops else None for kernel in kernels] == ops
    assert [categorise(kernel) for kernel in kernels].count("convolution") == 1


def test_a_node_of_a_graph_is_what_most_replays_say(path):
    """Two branches run kernels of one name, and once in the other order."""
    made = HandMadeTrace()
    for number, (first, second) in enumerate([(71, 72), (71, 72), (72, 71)]):
        made.step(number, number * 1_000, 1_000)
        start = number * 1_000 + 100
        made.graph(start, [("elementwise", start + 50, 10, first), ("elementwise", start + 100, 10, second)])
    kernels = attribute_replays(read(made.write(path)).kernels, [ADD, RELU])
    ops = {node: {kernel.ops[-1] for kernel in kernels if kernel.node == node} for node in (71, 72)}
    assert ops == {71: {"aten::add"}, 72: {"aten::relu"}}


def test_only_eager_kernels_are_learned_from(path):
    made = HandMadeTrace()
    made.step(0, 0, 1_000)
    made.op("aten::relu", 0, 50, [[2]])
    made.kernel("second", 20, 300, 10)
    made.kernel("first", 25, 200, 10, stream=20)
    made.graph(100, [("third", 400, 10)])
    assert learn(read(made.write(path)).kernels) == [
        EagerKernel("first", ("aten::relu",), "[[2]]"),
        EagerKernel("second", ("aten::relu",), "[[2]]"),
    ]
