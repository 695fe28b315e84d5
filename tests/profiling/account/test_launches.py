"""Which launch a kernel is given where an id has several, and what a trace says of kernels that cannot be."""

from pathlib import Path

import pytest
from traces import BOOT_NS, MAIN, HandMadeTrace

from profiling.account.attribution import idle, per_step
from profiling.account.launches import DeviceWork, Launch, Launches
from profiling.account.trace import Trace, read

OTHER = 5711  # another process


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def made_of(path: Path, launches: list[tuple], kernels: list[tuple], other_ids: int = 0) -> Trace:
    """Of launches (start, process, id) and kernels (start, device, id), each of 10 ns.

    `other_ids` more pairs of each process have ids of their own, process MAIN on device 0 and OTHER on device 1.
    """
    made = HandMadeTrace()
    made.step(0, 0, 100_000)
    own = [(50_000 + i, process, 1_000 + i) for i in range(other_ids) for process in (MAIN, OTHER)]
    own = [(start, process, number + (process == OTHER) * 500) for start, process, number in own]
    for start, process, number in launches + own:
        made.event("cuda_runtime", "cudaLaunchKernel", start, 5, correlation=number)
        made.events[-1]["pid"] = process
    for start, device, number in kernels + [(start + 20_000, process == OTHER, n) for start, process, n in own]:
        made.on_device("k", start, 10, number)
        made.events[-1]["args"]["device"] = made.events[-1]["pid"] = int(device)
    return read(made.write(path))


@pytest.mark.parametrize(
    ("launches", "kernels", "expected"),
    [
        pytest.param([(100, 0, 5), (900, 0, 5)], [(200, 0, 5), (1_000, 0, 5)], [100, 900], id="the_id_wrapped"),
        pytest.param([(100, 0, 5), (150, 0, 5)], [(200, 0, 5), (300, 0, 5)], [150, 100], id="each_launch_once"),
        pytest.param([(100, 0, 5), (900, 0, 5)], [(50, 0, 5), (1_000, 0, 5)], [100, 900], id="clocks_that_disagree"),
        pytest.param([(100, 0, 5)], [(200, 0, 5), (300, 0, 5)], [100, 100], id="two_kernels_of_one_launch"),
    ],
)
def test_a_kernel_is_of_the_launch_before_it(path, launches, kernels, expected):
    trace = made_of(path, [(start, MAIN, number) for start, _, number in launches], kernels)
    assert [kernel.launch_ns - BOOT_NS for kernel in trace.kernels] == expected
    assert trace.lacks == []


def test_a_kernel_is_of_the_process_that_launches_on_its_device(path):
    """Two ranks in one file: the kernel of the one that launched first begins last."""
    launches = [(100, MAIN, 5), (400, OTHER, 5)]
    trace = made_of(path, launches, [(450, 0, 5), (600, 1, 5)], other_ids=3)
    assert [kernel.launch_ns - BOOT_NS for kernel in trace.kernels[:2]] == [100, 400]
    assert trace.lacks == []


def test_an_id_that_wraps_makes_no_idle_of_the_launch(path):
    """The second kernel, tied to the first launch, would have been launched and have waited."""
    trace = made_of(path, [(100, MAIN, 5), (700, MAIN, 5)], [(200, 0, 5), (710, 0, 5)])
    assert idle(trace).queued_ns == 0


def test_a_launch_of_an_id_that_has_two_is_missed(path):
    trace = made_of(path, [(100, MAIN, 5), (900, MAIN, 5)], [(200, 0, 5)])
    assert trace.lacks == ["trace incomplete: the kernels of 1 launches are missing"]


def test_graphs_of_one_id_are_two(path):
    made = HandMadeTrace()
    made.step(0, 0, 100_000)
    for start in (100, 900):
        made.event("cuda_runtime", "cudaGraphLaunch", start, 5, correlation=5)
        for i in range(2):
            made.on_device(f"k{i}", start + 50 + 20 * i, 10, 5)
    trace = read(made.write(path))
    assert [kernel.launch_ns - BOOT_NS for kernel in trace.kernels] == [100, 100, 900, 900]
    first, _, second, _ = (kernel.graph for kernel in trace.kernels)
    assert [kernel.graph for kernel in trace.kernels] == [first, first, second, second]
    assert None not in (first, second)
    assert first != second


@pytest.mark.parametrize("within", [0, 2], ids=["the_same_event_twice", "the_driver_within_the_runtime"])
def test_one_launch_in_two_events_is_one(path, within):
    made = HandMadeTrace()
    made.step(0, 0, 100_000)
    correlation = made.kernel("k", 100, 200, 10)
    made.event("cuda_driver", "cuLaunchKernel", 100 + within, 2, correlation=correlation)
    trace = read(made.write(path))
    assert trace.lacks == []
    assert [kernel.launch_ns - BOOT_NS for kernel in trace.kernels] == [100]


def test_the_same_kernel_twice_is_one_call(path):
    made = HandMadeTrace()
    made.step(0, 0, 100_000)
    made.kernel("k", 100, 200, 10)
    made.events.append(made.events[-1])
    ((_, time),) = per_step(read(made.write(path))).total.by_kernel.items()
    assert time == (1, 10, 10)


@pytest.mark.parametrize(
    ("duration", "said"),
    [(10**17, True), (61 * 10**9, True), (59 * 10**9, False)],
    ids=["of_three_years", "of_a_minute", "of_less"],
)
def test_a_kernel_that_lasts_longer_than_all_the_rest_is_left_out(path, duration, said):
    made = HandMadeTrace()
    made.step(0, 0, 100_000)
    made.kernel("k", 100, 200, 10)
    made.kernel("endless", 300, 400, duration)
    trace = read(made.write(path))
    assert [kernel.name for kernel in trace.kernels] == ["k"] + ["endless"] * (not said)
    sentence = "trace incomplete: 1 kernels last longer than the rest of the trace and 60 s; they are left out"
    assert (sentence in trace.lacks) == said
    assert per_step(trace).total.busy_ns == 10 + (0 if said else duration)
    assert (idle(trace) is None) == said


def test_launches_of_one_id_without_end_come_to_one():
    """100,000 launches and kernels that share an id: what looked at all of them for each would not come back."""
    launches, many = Launches(), 100_000
    for i in range(many):
        launches.add(5, Launch(10 * i, 10 * i + 5, 0, MAIN, "kernel"))
    work = [DeviceWork("k", 10 * i + 7, 10 * i + 9, 7, 0, "kernel", 5, 0, None) for i in range(many)]
    assert [launch.start_ns for launch in launches.pair(work)] == [10 * i for i in range(many)]
