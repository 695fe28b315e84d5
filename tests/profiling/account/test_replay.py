from dataclasses import replace

import pytest
from traces import BUSY, STEP_NS, US, HandMadeTrace

from profiling.account.attribution import attribute_replays, idle, per_step
from profiling.account.categories import CATEGORIES, categorise
from profiling.account.trace import Kernel


def test_replays_are_given_the_operations_of_the_eager_step():
    eager = HandMadeTrace().training(0).read().kernels
    made = HandMadeTrace()
    for start in (0, STEP_NS, 2 * STEP_NS):
        made.step(start // STEP_NS, start, STEP_NS)
        begun = start + 50 * US - eager[0].start_ns
        made.graph(start + 10 * US, [(k.name, begun + k.start_ns, k.end_ns - k.start_ns) for k in eager])
    trace = made.read()
    assert {key.op for key in per_step(trace).total.by_kernel} == {""}
    kernels = attribute_replays(trace.kernels, eager)
    assert [k._replace(ops=(), dims="") for k in kernels] == trace.kernels
    wgrad = next(kernel for kernel in kernels if "wgrad" in kernel.name)
    assert (wgrad.ops[-1], wgrad.dims) == ("aten::convolution_backward", "[[64,32,16,16],[64,32,16,16],[32,32,3,3]]")
    filled = replace(trace, kernels=kernels)
    assert per_step(filled).total.by_category == dict.fromkeys(CATEGORIES, 0) | {c: 3 * ns for c, ns in BUSY.items()}
    gaps = idle(filled)
    assert gaps.queued_ns == 3 * 70 * US  # gaps inside of a replay are not the host's
    assert gaps.data_ns + gaps.python_ns + gaps.launch_ns == 2 * (STEP_NS - 470 * US)
    assert attribute_replays(eager, [CONV]) == eager


def ran(name: str, op: str, start: int, graph: int | None = None) -> Kernel:
    return Kernel(name, start, start + 5, 7, 0, "kernel", 1, (op,), "[[1]]", graph=graph)


ADD, RELU, CONV = (
    ran("elementwise", "aten::add", 0),
    ran("elementwise", "aten::relu", 20),
    ran("gemm", "aten::conv2d", 10),
)


@pytest.mark.parametrize(
    ("names", "ops"),
    [
        (["elementwise", "gemm", "elementwise"], ["aten::add", "aten::conv2d", "aten::relu"]),
        (["gemm", "elementwise", "elementwise"], ["aten::conv2d", "aten::add", "aten::relu"]),
        (["elementwise", "winograd", "elementwise"], ["aten::add", None, "aten::relu"]),
    ],
    ids=["of_one_name_by_order", "branches_in_another_order", "name_that_the_eager_step_did_not_have"],
)
def test_kernels_are_matched_by_name_and_order(names, ops):
    graph = ("graph", 10, [(name, 100 * (i + 1), 10) for i, name in enumerate(names)])
    kernels = attribute_replays(HandMadeTrace().apply(("step", 0, 0, 1_000), graph).read().kernels, [RELU, CONV, ADD])
    assert [kernel.ops[-1] if kernel.ops else None for kernel in kernels] == ops
    assert [categorise(kernel) for kernel in kernels].count("convolution") == 1


def test_node_of_a_graph_is_decided_by_most_replays():
    """Two branches run kernels of one name, and once in the other order."""
    made = HandMadeTrace()
    for number, (first, second) in enumerate([(71, 72), (71, 72), (72, 71)]):
        made.step(number, number * 1_000, 1_000)
        start = number * 1_000 + 100
        made.graph(start, [("elementwise", start + 50, 10, first), ("elementwise", start + 100, 10, second)])
    kernels = attribute_replays(made.read().kernels, [ADD, RELU])
    assert {kernel.dims for kernel in kernels} == {"[[1]]"}
    ops = {node: {kernel.ops[-1] for kernel in kernels if kernel.node == node} for node in (71, 72)}
    assert ops == {71: {"aten::add"}, 72: {"aten::relu"}}


def test_only_eager_kernels_are_learned_from():
    kernels = HandMadeTrace().apply(("step", 0, 0, 1_000), ("graph", 10, [("elementwise", 100, 10)])).read().kernels
    assert attribute_replays(kernels, [ran("elementwise", "aten::add", 0, graph=3), RELU])[0].ops == ("aten::relu",)
