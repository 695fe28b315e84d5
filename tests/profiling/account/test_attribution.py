import copy
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import BUSY, HOST_GAP_NS, LAUNCH_GAP_NS, STEP_GAP_NS, STEP_NS, US, HandMadeTrace, training_step

from profiling.account.attribution import Idle, KernelKey, doubt, idle, per_step, sweep
from profiling.account.categories import CATEGORIES
from profiling.account.trace import Kernel, read


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def kernel(start: int, end: int, category: str = "unknown", stream: int = 7, **fields) -> Kernel:
    """`category` is its name; see `by_name`."""
    return Kernel(category, start, end, stream, 0, "kernel", 1, **fields)


def by_name(kernel: Kernel) -> str:
    return kernel.name


def span_ns(trace) -> int:
    return max(kernel.end_ns for kernel in trace.kernels) - trace.kernels[0].start_ns


def test_training_step_is_recovered(path):
    made = HandMadeTrace()
    for number in range(4):
        training_step(made, number, number * STEP_NS)
    trace = read(made.write(path))
    steps, total = per_step(trace)
    assert steps == 4
    assert {category: ns for category, ns in total.by_category.items() if ns} == {c: 4 * ns for c, ns in BUSY.items()}
    assert total.busy_ns == 4 * sum(BUSY.values())
    gaps = idle(trace)
    assert (gaps.data_ns, gaps.sync_ns, gaps.optimiser_ns) == (3 * 10 * US, 0, 0)  # augmentation of the next step
    assert gaps.data_ns + gaps.launch_ns + gaps.python_ns == 4 * HOST_GAP_NS + 3 * STEP_GAP_NS
    assert gaps.queued_ns == 4 * LAUNCH_GAP_NS
    assert sum(gaps) + total.busy_ns == span_ns(trace)


HOSTILE = [
    None,
    True,
    -1,
    0,
    5,
    10**14,
    10**30,
    1e308,
    "",
    "1e999999999",
    [],
    {"a": [1]},
    "\ud800",
    "ProfilerStep#1",
    2**61,
]


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 25))])
def test_whatever_is_damaged_categories_sum_to_busy_and_nothing_raises(path, seed):
    rng = random.Random(seed)
    made = HandMadeTrace()
    for number in range(3):
        training_step(made, number, number * STEP_NS)
    events = json.loads(made.text())["traceEvents"]
    for event in rng.choices(events, k=rng.choice([1, 4, 16, 64])):
        where = event["args"] if rng.random() < 0.5 and isinstance(event["args"], dict) else event
        where[rng.choice(sorted(where) or ["x"])] = copy.deepcopy(rng.choice(HOSTILE))
    events += rng.choices(events, k=rng.choice([0, 10]))
    rng.shuffle(events)
    path.write_text(json.dumps({"traceEvents": events}))
    trace = read(path)
    step, gaps = per_step(trace), idle(trace)
    assert step is None or sum(step.total.by_category.values()) == step.total.busy_ns
    assert gaps is None or min(gaps) >= 0
    doubt(trace)


def test_kernel_behind_others_costs_nothing_and_keeps_its_own_time(path):
    made = HandMadeTrace()
    training_step(made, 0, 0)
    by_kernel = per_step(read(made.write(path))).total.by_kernel
    ((key, time),) = ((key, time) for key, time in by_kernel.items() if key.op == "aten::copy_")
    assert key.category == "layout and cast"
    assert key.dims == "[[64,32,16,16],[64,32,16,16]]"
    assert time == (1, 0, 60 * US)


KINDS = {"convolution": "sm90_xmma_fprop_implicit_gemm", "batch norm": "bn_apply_kernel", "unknown": "mystery"}
NS = st.integers(1_000, 900_000)
PLAN = st.lists(
    st.tuples(
        st.sampled_from(["none", "host", "sync", "launch"]),
        NS,  # the gap
        st.sampled_from(sorted(KINDS)),
        NS,  # the kernel
        st.none() | st.tuples(st.sampled_from(sorted(KINDS)), st.floats(0, 0.9), NS),  # another behind it
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(plan=PLAN)
def test_planted_idle_overlap_and_kernels_are_recovered(tmp_path_factory, plan):
    """Any sequence of gaps and kernels, some with another behind them: all of it is found, to the nanosecond."""
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
            behind_end = behind_start + behind_ns
            overlap = min(now, behind_end) - behind_start
            winner = min(category, behind, key=CATEGORIES.index)
            busy[category] -= overlap
            busy[winner] += overlap
            busy[behind] += behind_ns - overlap
            now = max(now, behind_end)
    made.step(0, 0, now)
    trace = read(made.write(tmp_path_factory.mktemp("plan") / "trace.json"))
    assert trace.lacks == []
    found = idle(trace)
    assert found == Idle(
        sync_ns=gaps["sync"],
        launch_ns=found.launch_ns,
        python_ns=gaps["host"] - found.launch_ns,
        queued_ns=gaps["launch"],
    )
    total = per_step(trace).total
    assert total.by_category == dict.fromkeys(CATEGORIES, 0) | busy
    counted = Counter()
    for key, time in total.by_kernel.items():
        counted[key.category] += time.calls
    assert counted == calls


INTERVALS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 15), st.sampled_from(CATEGORIES), st.integers(0, 2)), max_size=12
)


@given(INTERVALS)
def test_every_nanosecond_goes_to_one_category_and_one_kernel(intervals):
    """Whatever overlaps, and as painted by hand: the first category in the list, in it the kernel that ran longest."""
    kernels = [kernel(start, start + n, category, stream) for start, n, category, stream in intervals]
    found = sweep(kernels, by_name)
    painted = Counter()
    for time in range(60):
        running = [k for k in kernels if k.start_ns <= time < k.end_ns]
        if running:
            painted[min(running, key=lambda k: (CATEGORIES.index(k.name), k.start_ns)).name] += 1
    assert found.by_category == dict.fromkeys(CATEGORIES, 0) | painted
    assert sum(found.by_category.values()) == found.busy_ns == sum(painted.values())
    assert sum(time.ns for time in found.by_kernel.values()) == found.busy_ns
    assert sum(time.own_ns for time in found.by_kernel.values()) == sum(k.end_ns - k.start_ns for k in kernels)
    assert sum(time.calls for time in found.by_kernel.values()) == len(kernels)
    assert all(0 <= time.ns <= time.own_ns for time in found.by_kernel.values())


def test_the_kernel_of_a_category_that_ran_longer_gets_the_time():
    kernels = [kernel(0, 10, dims="[[1]]"), kernel(4, 14, dims="[[2]]")]
    by_kernel = sweep(kernels, by_name).by_kernel
    assert {key.dims: time.ns for key, time in by_kernel.items()} == {"[[1]]": 10, "[[2]]": 4}


def test_pieces_of_one_operation_are_one_call():
    pieces = [
        Kernel("aten::conv2d", start, start + 5, 0, -1, "cpu", number, ("aten::conv2d",), "")
        for start, number in [(0, 1), (10, 1), (20, 2)]
    ]
    ((key, time),) = sweep(pieces, lambda k: "convolution").by_kernel.items()
    assert key == KernelKey("convolution", "aten::conv2d", "aten::conv2d", "")
    assert time == (2, 15, 15)


def test_sweep_of_nothing_is_nothing():
    found = sweep([])
    assert (found.busy_ns, found.by_kernel) == (0, {})
    assert set(found.by_category.values()) == {0}


def test_sweep_refuses_a_category_of_no_rank():
    with pytest.raises(ValueError, match="not in tuple"):
        sweep([kernel(0, 1)], lambda k: "miscellaneous")


def test_sweep_of_very_many_kernels_inside_of_one_another_ends():
    """40,000 kernels that all run at once: what looked at all of them at each time would not come back."""
    many = 40_000
    found = sweep([kernel(i, 2 * many - i, CATEGORIES[1 - i % 2]) for i in range(many)], by_name)
    assert found.busy_ns == 2 * many
    assert found.by_category["batch norm"] == 2


def test_kernels_of_no_step_are_in_none(path):
    made = HandMadeTrace()
    made.step(0, 1_000, 1_000)
    made.kernel("before", 10, 20, 500)
    made.kernel("inside", 1_500, 2_500, 100)  # runs after the step that launched it
    made.kernel("after", 2_000, 3_000, 100)
    assert [key.name for key in per_step(read(made.write(path))).total.by_kernel] == ["inside"]


def test_a_trace_without_steps_is_one_step(path):
    made = HandMadeTrace()
    made.kernel("k", 0, 10, 10)
    made.kernel("k", 500, 600, 10)
    trace = read(made.write(path))
    assert trace.lacks == []
    assert (per_step(trace).steps, per_step(trace).total.busy_ns) == (1, 20)
    assert idle(trace) == Idle(python_ns=480, launch_ns=100)


def test_a_trace_of_nothing_has_no_step(path):
    trace = read(HandMadeTrace().write(path))
    assert (per_step(trace), idle(trace)) == (None, None)
