"""The launch of a kernel where an id has several, and kernels that cannot be."""

import pytest
from traces import BOOT_NS, MAIN, HandMadeTrace

from profiling.account.attribution import idle, per_step
from profiling.account.launches import DeviceWork, Launch, Launches
from profiling.account.trace import Trace

OTHER = 5711  # another process
STEP, KERNEL = ("step", 0, 0, 100_000), ("kernel", "k", 100, 200, 10)


def made_of(launches: list[tuple], kernels: list[tuple]) -> Trace:
    """A trace of launches (start, id, process if another) and kernels (start, id, device if another) of 10 ns."""
    made = HandMadeTrace().apply(STEP)
    for start, number, *process in launches:
        made.event("cuda_runtime", "cudaLaunchKernel", start, 5, correlation=number)
        made.events[-1]["pid"] = process[0] if process else MAIN
    for start, number, *device in kernels:
        made.on_device("k", start, 10, number)
        made.events[-1]["args"]["device"] = made.events[-1]["pid"] = device[0] if device else 0
    return made.read()


def launched(trace: Trace) -> list[int]:
    return [kernel.launch_ns - BOOT_NS for kernel in trace.kernels]


# Two ranks in one file: of launches of one id, the kernel of the one that launched first begins last.
RANKS = [(50_000, 1_000), (50_001, 1_001), (50_000, 1_500, OTHER), (50_001, 1_501, OTHER)]
OF_RANKS = [(70_000, 1_000), (70_001, 1_001), (70_000, 1_500, 1), (70_001, 1_501, 1)]
PAIRS = {
    "id_that_wrapped": ([(100, 5), (900, 5)], [(200, 5), (1_000, 5)], [100, 900]),
    "each_launch_once": ([(100, 5), (150, 5)], [(200, 5), (300, 5)], [150, 100]),
    "clocks_that_disagree": ([(100, 5), (900, 5)], [(50, 5), (1_000, 5)], [100, 900]),
    "two_kernels_of_one_launch": ([(100, 5)], [(200, 5), (300, 5)], [100, 100]),
    "process_of_its_device": (
        [(100, 5), (400, 5, OTHER), *RANKS],
        [(450, 5), (600, 5, 1), *OF_RANKS],
        [100, 400, 50_000, 50_000, 50_001, 50_001],
    ),
}


@pytest.mark.parametrize(("launches", "kernels", "expected"), PAIRS.values(), ids=PAIRS)
def test_kernel_is_of_the_launch_before_it_by_its_devices_process(launches, kernels, expected):
    trace = made_of(launches, kernels)
    assert launched(trace) == expected
    assert trace.lacks == []


def test_id_that_wraps_makes_no_idle_of_the_launch():
    """The second kernel, tied to the first launch, would have been launched and have waited."""
    assert idle(made_of([(100, 5), (700, 5)], [(200, 5), (710, 5)])).queued_ns == 0


def test_launch_of_an_id_that_has_two_is_missed():
    assert made_of([(100, 5), (900, 5)], [(200, 5)]).lacks == [
        "trace incomplete: the kernels of 1 launches are missing"
    ]


def test_graphs_of_one_id_are_two():
    made = HandMadeTrace().apply(STEP)
    for start in (100, 900):
        made.event("cuda_runtime", "cudaGraphLaunch", start, 5, correlation=5)
        made.apply(*(("on_device", f"k{i}", start + 50 + 20 * i, 10, 5) for i in range(2)))
    trace = made.read()
    assert launched(trace) == [100, 100, 900, 900]
    first, second = (kernel.graph for kernel in trace.kernels[::2])
    assert [kernel.graph for kernel in trace.kernels] == [first, first, second, second]
    assert len({first, second, None}) == 3


@pytest.mark.parametrize("within", [0, 2], ids=["the_same_event_twice", "the_driver_within_the_runtime"])
def test_one_launch_in_two_events_is_one(within):
    made = HandMadeTrace().apply(STEP, KERNEL)
    made.event("cuda_driver", "cuLaunchKernel", 100 + within, 2, correlation=made.last_id)
    trace = made.read()
    assert (trace.lacks, launched(trace)) == ([], [100])


def test_same_kernel_twice_is_one_call():
    made = HandMadeTrace().apply(STEP, KERNEL)
    made.events.append(made.events[-1])
    assert list(per_step(made.read()).total.by_kernel.values()) == [(1, 10, 10)]


@pytest.mark.parametrize(
    ("duration", "said"),
    [(10**17, True), (61 * 10**9, True), (59 * 10**9, False)],
    ids=["of_three_years", "of_a_minute", "of_less"],
)
def test_kernel_that_lasts_longer_than_all_the_rest_is_left_out(duration, said):
    trace = HandMadeTrace().apply(STEP, KERNEL, ("kernel", "endless", 300, 400, duration)).read()
    assert [kernel.name for kernel in trace.kernels] == ["k"] + ["endless"] * (not said)
    sentence = "trace incomplete: 1 kernels last longer than the rest of the trace and 60 s; they are left out"
    assert (sentence in trace.lacks) == (idle(trace) is None) == said
    assert per_step(trace).total.busy_ns == 10 + (0 if said else duration)


def test_pairing_very_many_launches_of_one_id_ends():
    """30,000 launches and kernels share an id: a search through all of them for each would not come back."""
    launches, many = Launches(), 30_000
    for i in range(many):
        launches.add(5, Launch(10 * i, 10 * i + 5, 0, MAIN, "kernel"))
    work = [DeviceWork("k", 10 * i + 7, 10 * i + 9, 7, 0, "kernel", 5, 0, None) for i in range(many)]
    assert [launch.start_ns for launch in launches.pair(work)] == [10 * i for i in range(many)]
