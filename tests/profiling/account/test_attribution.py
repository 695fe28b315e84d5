import copy
import json
import random
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traces import BUSY, HOST_GAP_NS, LAUNCH_GAP_NS, STEP_GAP_NS, US, HandMadeTrace

from profiling.account.attribution import Idle, KernelKey, doubt, idle, per_step, sweep
from profiling.account.categories import CATEGORIES
from profiling.account.trace import Kernel, read


def kernel(start: int, end: int, category: str = "unknown", stream: int = 7, dims: str = "") -> Kernel:
    """`category` is its name; see `by_name`."""
    return Kernel(category, start, end, stream, 0, "kernel", 1, dims=dims)


def by_name(kernel: Kernel) -> str:
    return kernel.name


def test_training_step_is_recovered():
    trace = HandMadeTrace().training(*range(4)).read()
    steps, total = per_step(trace)
    assert steps == 4
    assert total.by_category == dict.fromkeys(CATEGORIES, 0) | {c: 4 * ns for c, ns in BUSY.items()}
    assert total.busy_ns == 4 * sum(BUSY.values())
    gaps = idle(trace)
    assert (gaps.data_ns, gaps.sync_ns, gaps.optimiser_ns) == (3 * 10 * US, 0, 0)  # augmentation of the next step
    assert gaps.data_ns + gaps.launch_ns + gaps.python_ns == 4 * HOST_GAP_NS + 3 * STEP_GAP_NS
    assert gaps.queued_ns == 4 * LAUNCH_GAP_NS
    assert sum(gaps) + total.busy_ns == max(k.end_ns for k in trace.kernels) - trace.kernels[0].start_ns
    dims = "[[64,32,16,16],[64,32,16,16]]"
    hidden = KernelKey(
        "layout and cast", "void at::native::unrolled_elementwise_kernel<direct_copy>", "aten::copy_", dims
    )
    assert total.by_kernel[hidden] == (4, 0, 4 * 60 * US)  # behind others it costs nothing, and keeps its own time


HOSTILE = [None, True, -1, 0, 5, 10**14, 10**30, 1e308, "", "1e999999999", [], {"a": [1]}, "\ud800"]
HOSTILE += ["ProfilerStep#1", 2**61]


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 25))])
def test_damaged_trace_keeps_its_sums_and_raises_nothing(tmp_path, seed):
    rng = random.Random(seed)
    events = json.loads(HandMadeTrace().training(*range(3)).text())["traceEvents"]
    for event in rng.choices(events, k=rng.choice([1, 4, 16, 64])):
        where = event["args"] if rng.random() < 0.5 and isinstance(event["args"], dict) else event
        where[rng.choice(sorted(where) or ["x"])] = copy.deepcopy(rng.choice(HOSTILE))
    events += rng.choices(events, k=rng.choice([0, 10]))
    rng.shuffle(events)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    trace = read(path)
    step, gaps = per_step(trace), idle(trace)
    assert step is None or sum(step.total.by_category.values()) == step.total.busy_ns
    assert gaps is None or min(gaps) >= 0
    doubt(trace)


KINDS = {"convolution": "sm90_xmma_fprop_implicit_gemm", "batch norm": "bn_apply_kernel", "unknown": "mystery"}
NS = st.integers(1_000, 900_000)
PLANNED = st.tuples(
    st.sampled_from(["none", "host", "sync", "launch"]),
    NS,  # the gap
    st.sampled_from(sorted(KINDS)),
    NS,  # the kernel
    st.none() | st.tuples(st.sampled_from(sorted(KINDS)), st.floats(0, 0.9), NS),  # another behind it
)


@settings(max_examples=40, deadline=None)
@given(plan=st.lists(PLANNED, min_size=2, max_size=12))
def test_planted_idle_overlap_and_kernels_are_recovered(plan):
    """Any sequence of gaps and kernels, some with another behind them, is found to the nanosecond."""
    made, gaps, busy, calls = HandMadeTrace(), Counter(), Counter(), Counter()
    now = 10_000
    for number, (gap, gap_ns, category, duration, other) in enumerate(plan):
        start, launch = now, now - 300
        if gap != "none" and number:
            gaps[gap] += gap_ns
            start, launch = now + gap_ns, now - 300 if gap == "launch" else now + gap_ns // 2
            if gap == "sync":
                made.call("cudaDeviceSynchronize", now - 200, 200 + gap_ns // 3)
        made.kernel(KINDS[category], launch, start, duration)
        calls[category] += 1
        now = start + duration
        busy[category] += duration
        if other is not None:
            behind, share, behind_ns = other
            behind_start = start + int(share * duration)
            made.kernel(KINDS[behind], launch, behind_start, behind_ns, stream=20)
            calls[behind] += 1
            overlap = min(now, behind_start + behind_ns) - behind_start
            busy[category] -= overlap
            busy[min(category, behind, key=CATEGORIES.index)] += overlap
            busy[behind] += behind_ns - overlap
            now = max(now, behind_start + behind_ns)
    made.step(0, 0, now)
    trace = made.read()
    assert trace.lacks == []
    found = idle(trace)
    assert (found.sync_ns, found.queued_ns) == (gaps["sync"], gaps["launch"])
    assert (found.python_ns + found.launch_ns, found.data_ns, found.optimiser_ns) == (gaps["host"], 0, 0)
    total = per_step(trace).total
    assert total.by_category == dict.fromkeys(CATEGORIES, 0) | busy
    counted = Counter()
    for key, time in total.by_kernel.items():
        counted[key.category] += time.calls
    assert counted == calls


INTERVAL = st.tuples(st.integers(0, 40), st.integers(0, 15), st.sampled_from(CATEGORIES), st.integers(0, 2))


@given(st.lists(INTERVAL, max_size=12))
@example([])
@example([(0, 10, "unknown", 0), (4, 10, "unknown", 0)])
def test_every_nanosecond_goes_to_one_category_and_one_kernel(intervals):
    """The same as painted by hand: to the first category in the list, in it to the kernel that has run longest."""
    kernels = [
        kernel(start, start + n, category, stream, str(i)) for i, (start, n, category, stream) in enumerate(intervals)
    ]
    found = sweep(kernels, by_name)
    painted, of_kernels = Counter(), dict.fromkeys(map(str, range(len(kernels))), 0)
    for time in range(60):
        if running := [k for k in kernels if k.start_ns <= time < k.end_ns]:
            winner = min(running, key=lambda k: (CATEGORIES.index(k.name), k.start_ns))
            painted[winner.name] += 1
            of_kernels[winner.dims] += 1
    assert found.by_category == dict.fromkeys(CATEGORIES, 0) | painted
    assert found.busy_ns == sum(painted.values())
    assert {key.dims: time.ns for key, time in found.by_kernel.items()} == of_kernels
    own = {key.dims: (time.calls, time.own_ns) for key, time in found.by_kernel.items()}
    assert own == {k.dims: (1, k.end_ns - k.start_ns) for k in kernels}


def test_pieces_of_one_operation_are_one_call():
    pieces = [
        Kernel("aten::conv2d", start, start + 5, 0, -1, "cpu", number, ("aten::conv2d",))
        for start, number in [(0, 1), (10, 1), (20, 2)]
    ]
    found = sweep(pieces, lambda k: "convolution").by_kernel
    assert found == {KernelKey("convolution", "aten::conv2d", "aten::conv2d", ""): (2, 15, 15)}


def test_sweep_refuses_a_category_without_a_rank():
    with pytest.raises(ValueError, match="not in tuple"):
        sweep([kernel(0, 1)], lambda k: "miscellaneous")


def test_sweep_of_very_many_nested_kernels_ends():
    """40,000 kernels at once: a sweep that looked at all of them at each time would not come back."""
    many = 40_000
    found = sweep([kernel(i, 2 * many - i, CATEGORIES[1 - i % 2]) for i in range(many)], by_name)
    assert found.busy_ns == 2 * many
    assert found.by_category["batch norm"] == 2


def test_attribution_stays_within_the_steps():
    made = HandMadeTrace()
    assert (per_step(made.read()), idle(made.read())) == (None, None)
    made.apply(("kernel", "k", 0, 10, 10), ("kernel", "k", 500, 600, 10))
    trace = made.read()
    assert trace.lacks == []
    assert (per_step(trace).steps, per_step(trace).total.busy_ns) == (1, 20)  # without steps, all of it is one
    assert idle(trace) == Idle(python_ns=480, launch_ns=100)
    # The kernel in the middle runs after the step that launched it.
    made.apply(
        ("step", 0, 1_000, 1_000), ("kernel", "inside", 1_500, 2_500, 100), ("kernel", "after", 2_000, 3_000, 100)
    )
    assert [key.name for key in per_step(made.read()).total.by_kernel] == ["inside"]
