from pathlib import Path

import pytest
from traces import HandMadeTrace

from profiling.account.attribution import Idle, doubt, idle, per_step
from profiling.account.trace import read


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


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
    ("syncs", "expected"),
    [
        pytest.param([(150, 60)], Idle(sync_ns=60), id="waited_as_the_device_ran_dry"),
        pytest.param([(150, 20)], Idle(python_ns=30, launch_ns=30), id="over_before"),
        pytest.param([(205, 3)], Idle(sync_ns=3, python_ns=27, launch_ns=30), id="began_on_an_idle_device"),
        pytest.param([(400, 50)], Idle(python_ns=30, launch_ns=30), id="later"),
        pytest.param([(50, 200), (60, 20)], Idle(sync_ns=60), id="within_a_longer_one"),
    ],
)
def test_a_gap_is_a_wait_only_if_the_host_was_waiting(path, syncs, expected):
    assert gaps_of(path, (10, 100, 100), (230, 260, 40), syncs=syncs) == expected


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
    total = per_step(trace).total
    assert total.busy_ns == 100
    assert {c: ns for c, ns in total.by_category.items() if ns} == {"convolution": 50, "unknown": 50}
    assert {key.name: time for key, time in total.by_kernel.items()} == {"gemm": (1, 50, 50), "mystery": (1, 50, 50)}
    assert idle(trace) == Idle(queued_ns=50)


@pytest.mark.parametrize(
    "kernels",
    [
        [(10, 100, 100), (1_100, 1_200, 100), (2_100, 2_200, 100)],
        [(1_050, 1_100, 100), (900, 1_200, 300), (1_060, 1_500, 100)],
    ],
    ids=["beside_it", "around_it"],
)
def test_a_kernel_of_no_step_makes_no_gap(path, kernels):
    assert gaps_of(path, *kernels, step=(1_000, 500)) == Idle()


def test_a_step_that_is_missing_is_no_gap(path):
    made = HandMadeTrace()
    for number in (4, 5, 7):
        made.step(number, number * 1_000, 1_000)
        made.kernel("k", number * 1_000 + 10, number * 1_000 + 100, 200)
    assert idle(read(made.write(path))) == Idle(python_ns=710, launch_ns=90)  # between 4 and 5, and not from 5 to 7


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
