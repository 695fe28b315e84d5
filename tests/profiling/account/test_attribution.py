import copy
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import (
    BUSY,
    HOST_GAP_NS,
    LAUNCH_GAP_NS,
    STEP_GAP_NS,
    STEP_NS,
    US,
    HandMadeTrace,
    training_step,
)

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


def test_training_step_is_recovered(path):
    made = HandMadeTrace()
    for number in range(4):
        training_step(made, number, number * STEP_NS)
    trace = read(made.write(path))
    step = per_step(trace)
    assert step.steps == 4
    assert {category: ns for category, ns in step.by_category.items() if ns} == BUSY
    assert step.busy_ns == sum(BUSY.values())
    gaps = idle(trace)
    assert (gaps.data_ns, gaps.sync_ns, gaps.optimiser_ns) == (3 * 10 * US, 0, 0)  # augmentation of the next step
    assert gaps.data_ns + gaps.launch_ns + gaps.python_ns == 4 * HOST_GAP_NS + 3 * STEP_GAP_NS
    assert gaps.queued_ns == 4 * LAUNCH_GAP_NS
    assert sum(idle(trace)) + step.total.busy_ns == step.total.span_ns


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


@pytest.mark.parametrize("seed", range(25))
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
    assert step is None or sum(step.by_category.values()) == step.busy_ns
    assert step is None or sum(step.total.by_category.values()) == step.total.busy_ns
    assert gaps is None or min(gaps) >= 0
    doubt(trace)


def test_kernel_behind_others_costs_nothing_and_keeps_its_own_time(path):
    made = HandMadeTrace()
    training_step(made, 0, 0)
    hidden = {key: time for key, time in per_step(read(made.write(path))).by_kernel.items() if key.op == "aten::copy_"}
    ((key, time),) = hidden.items()
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
    step = per_step(trace)
    assert step.by_category == dict.fromkeys(CATEGORIES, 0) | busy
    counted = Counter()
    for key, time in step.by_kernel.items():
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


def test_of_two_kernels_of_a_category_the_one_that_ran_longer_gets_the_time():
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
    assert (found.busy_ns, found.span_ns, found.by_kernel) == (0, 0, {})
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


def test_nanoseconds_of_a_step_sum_to_its_busy_time(path):
    made = HandMadeTrace()
    for number in range(3):
        made.step(number, number * 1_000, 1_000)
    for number, name in enumerate(["gemm", "bn_apply_kernel", "mystery", "max_pool", "direct_copy"]):
        made.kernel(name, 600 * number, 600 * number + 50, 10)
    step = per_step(read(made.write(path)))
    assert step.total.busy_ns == 50
    assert step.busy_ns == 17
    assert sum(step.by_category.values()) == 17
    assert all(abs(ns - step.total.by_category[c] / 3) < 1 for c, ns in step.by_category.items())
    assert sum(time.ns for time in step.by_kernel.values()) == pytest.approx(50 / 3)


def test_kernels_of_no_step_are_in_none(path):
    made = HandMadeTrace()
    made.step(0, 1_000, 1_000)
    made.kernel("before", 10, 20, 500)
    made.kernel("inside", 1_500, 2_500, 100)  # runs after the step that launched it
    made.kernel("after", 2_000, 3_000, 100)
    assert [key.name for key in per_step(read(made.write(path))).by_kernel] == ["inside"]


def test_a_trace_without_steps_is_one_step(path):
    made = HandMadeTrace()
    made.kernel("k", 0, 10, 10)
    made.kernel("k", 500, 600, 10)
    trace = read(made.write(path))
    assert trace.lacks == []
    assert (per_step(trace).steps, per_step(trace).busy_ns) == (1, 20)
    assert idle(trace) == Idle(python_ns=480, launch_ns=100)


def test_a_trace_of_nothing_has_no_step(path):
    trace = read(HandMadeTrace().write(path))
    assert (per_step(trace), idle(trace)) == (None, None)


def gaps_of(path, *kernels: tuple[int, int, int], syncs=(), step=(0, 10_000)) -> Idle | None:
    """Of kernels (launch, start, duration)."""
    made = HandMadeTrace()
    made.step(0, *step)
    for launch, start, duration in kernels:
        made.kernel("k", launch, start, duration)
    for start, duration in syncs:
        made.call("cudaStreamSynchronize", start, duration)
    return idle(read(made.write(path)))


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        pytest.param([(10, 500, 100)], Idle(), id="nothing_before_the_first_and_after_the_last"),
        pytest.param([(10, 100, 200), (20, 250, 100)], Idle(), id="negative_gap"),
        pytest.param([(10, 100, 200), (20, 300, 100)], Idle(), id="no_gap"),
        pytest.param([(10, 100, 900), (20, 200, 10), (30, 400, 10)], Idle(), id="behind_a_long_kernel"),
        pytest.param([(10, 100, 0), (20, 100, 50)], Idle(), id="no_duration"),
        pytest.param([(10, 100, 100), (20, 260, 40)], Idle(queued_ns=60), id="queued"),
        pytest.param([(10, 100, 100), (200, 260, 40)], Idle(queued_ns=60), id="launched_as_the_gap_began"),
        pytest.param([(10, 100, 100), (210, 260, 40)], Idle(python_ns=10, launch_ns=50), id="launched_too_late"),
        pytest.param([(10, 100, 100), (270, 260, 40)], Idle(python_ns=60), id="clocks_that_disagree"),
    ],
)
def test_gaps_are_told_apart(path, kernels, expected):
    assert gaps_of(path, *kernels) == expected


@pytest.mark.parametrize(
    ("sync", "expected"),
    [
        pytest.param((150, 60), Idle(sync_ns=60), id="waited_as_the_device_ran_dry"),
        pytest.param((150, 20), Idle(python_ns=30, launch_ns=30), id="over_before"),
        pytest.param((205, 3), Idle(sync_ns=3, python_ns=27, launch_ns=30), id="began_on_an_idle_device"),
        pytest.param((400, 50), Idle(python_ns=30, launch_ns=30), id="later"),
    ],
)
def test_gap_is_the_waits_only_if_the_host_was_waiting(path, sync, expected):
    assert gaps_of(path, (10, 100, 100), (230, 260, 40), syncs=[sync]) == expected


def test_wait_within_a_longer_one_does_not_hide_it(path):
    assert gaps_of(path, (10, 100, 100), (230, 260, 40), syncs=[(50, 200), (60, 20)]) == Idle(sync_ns=60)


LOADER = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        pytest.param([], {"python_ns": 800}, id="nothing"),
        pytest.param([("op", "aten::conv2d", 250, 700)], {"python_ns": 100, "launch_ns": 760}, id="operation"),
        pytest.param([("annotation", LOADER, 100, 750)], {"data_ns": 650, "python_ns": 150}, id="data_loader"),
        pytest.param([("annotation", "augmentation", 200, 800)], {"data_ns": 800}, id="making_of_a_batch"),
        pytest.param([("op", "aten::item", 300, 500)], {"python_ns": 300, "sync_ns": 500}, id="item"),
        pytest.param(
            [("annotation", "Optimizer.step#SGD.step", 150, 800), ("op", "aten::add_", 300, 200)],
            {"optimiser_ns": 750, "python_ns": 50},
            id="operation_within_the_optimiser",
        ),
        pytest.param(
            [("annotation", LOADER, 150, 800), ("op", "aten::to", 300, 200), ("op", "aten::item", 350, 100)],
            {"data_ns": 750, "python_ns": 50},
            id="operations_within_the_loader",
        ),
        pytest.param([("annotation", "epoch 3", 0, 5_000)], {"python_ns": 800}, id="an_annotation_is_python"),
        pytest.param([("op", "aten::item", 100, 950)], {"sync_ns": 800}, id="an_item_when_the_device_ran_dry"),
        pytest.param(
            [("call", "cudaStreamSynchronize", 150, 70), ("annotation", LOADER, 300, 600), ("op", "aten::to", 920, 90)],
            {"sync_ns": 260, "data_ns": 600, "launch_ns": 0},
            id="a_batch_after_a_wait",
        ),
    ],
)
def test_a_gap_is_of_what_the_host_did_until_the_next_launch(path, host, expected):
    """The device runs until 200, the next kernel is launched at 1,000 and begins at 1,060."""
    made = HandMadeTrace()
    made.step(0, 0, 10_000)
    made.kernel("k", 10, 100, 100)
    for how, *operation in host:
        getattr(made, how)(*operation)
    made.kernel("k", 1_000, 1_060, 100)
    assert idle(read(made.write(path))) == Idle(**{"launch_ns": 60, **expected})


@pytest.mark.parametrize(("gap_ns", "doubted"), [(999_000, False), (1_001_000, True)])
def test_a_launched_kernel_that_leaves_the_device_empty_for_long_is_doubted(path, gap_ns, doubted):
    made = HandMadeTrace()
    made.step(0, 0, 10_000)
    for number in range(3):
        made.kernel("k", 10 + number, 100 + number * (200 + gap_ns), 200)
    trace = read(made.write(path))
    assert idle(trace).queued_ns == 2 * gap_ns
    said = doubt(trace)
    assert (said is not None) == doubted
    assert not doubted or said.startswith("2 kernels that had been launched took more than 1 ms to begin on an empty")


def test_two_devices_are_not_merged(path):
    """Each is busy for 100 and idle for 50, side by side: what one does hides nothing of the other."""
    made = HandMadeTrace()
    made.step(0, 0, 10_000)
    for device in (0, 1):
        for start, name in ((100, "gemm"), (200, "mystery")):
            made.kernel(name, 10, start + 50 * device, 50)
            made.events[-1]["args"]["device"] = made.events[-1]["pid"] = device
    trace = read(made.write(path))
    step = per_step(trace)
    assert (step.busy_ns, step.total.span_ns) == (100, 150)
    assert {c: ns for c, ns in step.by_category.items() if ns} == {"convolution": 50, "unknown": 50}
    assert {key.name: time for key, time in step.by_kernel.items()} == {"gemm": (1, 50, 50), "mystery": (1, 50, 50)}
    assert idle(trace) == Idle(queued_ns=50)


def test_gap_beside_a_kernel_of_no_step_is_of_no_step(path):
    kernels = [(10, 100, 100), (1_100, 1_200, 100), (2_100, 2_200, 100)]
    assert gaps_of(path, *kernels, step=(1_000, 500)) == Idle()


def test_a_step_that_is_missing_is_no_gap(path):
    made = HandMadeTrace()
    for number in (4, 5, 7):
        made.step(number, number * 1_000, 1_000)
        made.kernel("k", number * 1_000 + 10, number * 1_000 + 100, 200)
    assert idle(read(made.write(path))) == Idle(python_ns=710, launch_ns=90)  # between 4 and 5, and not from 5 to 7


def test_kernel_of_no_step_is_no_gap(path):
    kernels = [(1_050, 1_100, 100), (900, 1_200, 300), (1_060, 1_500, 100)]
    assert gaps_of(path, *kernels, step=(1_000, 500)) == Idle()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda made: made.call("cudaLaunchKernel", 500), id="kernel_missing"),
        pytest.param(lambda made: made.on_device("k", 600, 10, 999), id="launch_missing"),
        pytest.param(lambda made: made.event("kernel", "k", 600, -10), id="negative_duration"),
        pytest.param(lambda made: made.events.__delitem__(slice(2, None, 2)), id="no_kernels"),
    ],
)
def test_incomplete_trace_has_no_idle(path, spoil):
    made = HandMadeTrace()
    made.step(0, 0, 10_000)
    made.kernel("k", 10, 100, 100)
    made.kernel("k", 300, 400, 100)
    assert sum(idle(read(made.write(path)))) == 200
    spoil(made)
    trace = read(made.write(path))
    assert trace.lacks
    assert idle(trace) is None


def test_idle_of_a_recorded_run_is_its_span_less_its_busy_time():
    folder = os.environ.get("GPU_TRACES_DIR")
    if not folder:
        pytest.skip("needs GPU_TRACES_DIR, a folder of recorded traces")
    trace = read(Path(folder) / "h100_vit_inference.json.gz")
    total = per_step(trace).total
    gaps = idle(trace)
    assert sum(gaps) == total.span_ns - total.busy_ns
    assert gaps.launch_ns + gaps.python_ns > 0.99 * sum(gaps)  # a host-bound run
