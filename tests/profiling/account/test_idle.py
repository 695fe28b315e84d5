import pytest
from traces import HandMadeTrace

from profiling.account.attribution import Idle, doubt, idle, per_step
from profiling.account.trace import Trace

STEP = ("step", 0, 0, 10_000)


def kernel(launch: int, start: int, duration: int) -> tuple:
    return ("kernel", "k", launch, start, duration)


def sync(start: int, duration: int) -> tuple:
    return ("call", "cudaStreamSynchronize", start, duration)


def made_of(*events: tuple) -> Trace:
    return HandMadeTrace().apply(*events).read()


SHORT = (STEP, kernel(10, 100, 100), kernel(230, 260, 40))
"""The device runs until 200, the next kernel is launched at 230 and begins at 260."""
LONG = (STEP, kernel(10, 100, 100), kernel(1_000, 1_060, 100))
"""The device runs until 200, the next kernel is launched at 1,000 and begins at 1,060."""
BESIDE = (kernel(10, 100, 100), kernel(1_100, 1_200, 100), kernel(2_100, 2_200, 100))
AROUND = (kernel(1_050, 1_100, 100), kernel(900, 1_200, 300), kernel(1_060, 1_500, 100))
ONE_MISSING = [(("step", n, n * 1_000, 1_000), kernel(n * 1_000 + 10, n * 1_000 + 100, 200)) for n in (4, 5, 7)]
LOADER = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"
OPTIMISER = ("annotation", "Optimizer.step#SGD.step", 150, 800)

GAPS = {
    "nothing_before_the_first_and_after_the_last": ((STEP, kernel(10, 500, 100)), Idle()),
    "negative_gap": ((STEP, kernel(10, 100, 200), kernel(20, 250, 100)), Idle()),
    "no_gap": ((STEP, kernel(10, 100, 200), kernel(20, 300, 100)), Idle()),
    "behind_a_long_kernel": ((STEP, kernel(10, 100, 900), kernel(20, 200, 10), kernel(30, 400, 10)), Idle()),
    "no_duration": ((STEP, kernel(10, 100, 0), kernel(20, 100, 50)), Idle()),
    "queued": ((STEP, kernel(10, 100, 100), kernel(20, 260, 40)), Idle(queued_ns=60)),
    "launched_as_the_gap_began": ((STEP, kernel(10, 100, 100), kernel(200, 260, 40)), Idle(queued_ns=60)),
    "launched_too_late": ((STEP, kernel(10, 100, 100), kernel(210, 260, 40)), Idle(python_ns=10, launch_ns=50)),
    "clocks_that_disagree": ((STEP, kernel(10, 100, 100), kernel(270, 260, 40)), Idle(python_ns=60)),
    "kernel_beside_the_step": ((("step", 0, 1_000, 500), *BESIDE), Idle()),
    "kernel_around_the_step": ((("step", 0, 1_000, 500), *AROUND), Idle()),
    "step_missing_between_5_and_7": (sum(ONE_MISSING, ()), Idle(python_ns=710, launch_ns=90)),
    "wait_when_the_device_ran_dry": ((*SHORT, sync(150, 60)), Idle(sync_ns=60)),
    "wait_over_before": ((*SHORT, sync(150, 20)), Idle(python_ns=30, launch_ns=30)),
    "wait_begun_on_an_idle_device": ((*SHORT, sync(205, 3)), Idle(sync_ns=3, python_ns=27, launch_ns=30)),
    "wait_later": ((*SHORT, sync(400, 50)), Idle(python_ns=30, launch_ns=30)),
    "wait_within_a_longer_one": ((*SHORT, sync(50, 200), sync(60, 20)), Idle(sync_ns=60)),
    "host_in_no_operation": (LONG, Idle(python_ns=800, launch_ns=60)),
    "operation": ((*LONG, ("op", "aten::conv2d", 250, 700)), Idle(python_ns=100, launch_ns=760)),
    "data_loader": ((*LONG, ("annotation", LOADER, 100, 750)), Idle(data_ns=650, python_ns=150, launch_ns=60)),
    "making_of_a_batch": ((*LONG, ("annotation", "augmentation", 200, 800)), Idle(data_ns=800, launch_ns=60)),
    "item": ((*LONG, ("op", "aten::item", 300, 500)), Idle(python_ns=300, sync_ns=500, launch_ns=60)),
    "operation_within_the_optimiser": (
        (*LONG, OPTIMISER, ("op", "aten::add_", 300, 200)),
        Idle(optimiser_ns=750, python_ns=50, launch_ns=60),
    ),
    "operations_within_the_loader": (
        (*LONG, ("annotation", LOADER, 150, 800), ("op", "aten::to", 300, 200), ("op", "aten::item", 350, 100)),
        Idle(data_ns=750, python_ns=50, launch_ns=60),
    ),
    "annotation_is_python": ((*LONG, ("annotation", "epoch 3", 0, 5_000)), Idle(python_ns=800, launch_ns=60)),
    "item_when_the_device_ran_dry": ((*LONG, ("op", "aten::item", 100, 950)), Idle(sync_ns=800, launch_ns=60)),
    "batch_after_a_wait": (
        (*LONG, sync(150, 70), ("annotation", LOADER, 300, 600), ("op", "aten::to", 920, 90)),
        Idle(sync_ns=260, data_ns=600),
    ),
}


@pytest.mark.parametrize(("events", "expected"), GAPS.values(), ids=GAPS)
def test_gap_goes_to_its_cause(events, expected):
    assert idle(made_of(*events)) == expected


@pytest.mark.parametrize(("gap_ns", "doubted"), [(999_000, False), (1_001_000, True)])
def test_launched_kernel_that_leaves_the_device_empty_for_long_is_doubted(gap_ns, doubted):
    trace = made_of(STEP, *(kernel(10 + i, 100 + i * (200 + gap_ns), 200) for i in range(3)))
    assert idle(trace).queued_ns == 2 * gap_ns
    said = doubt(trace) or ""
    assert said.startswith("2 kernels that had been launched took more than 1 ms to begin on an empty") == doubted


def test_two_devices_are_not_merged():
    """Each is busy for 100 and idle for 50, side by side, and hides nothing of the other."""
    made = HandMadeTrace().apply(STEP)
    for device in (0, 1):
        for start, name in ((100, "gemm"), (200, "mystery")):
            made.kernel(name, 10, start + 50 * device, 50)
            made.events[-1]["args"]["device"] = made.events[-1]["pid"] = device
    trace = made.read()
    total = per_step(trace).total
    assert total.busy_ns == 100
    assert {c: ns for c, ns in total.by_category.items() if ns} == {"convolution": 50, "unknown": 50}
    assert {key.name: time for key, time in total.by_kernel.items()} == {"gemm": (1, 50, 50), "mystery": (1, 50, 50)}
    assert idle(trace) == Idle(queued_ns=50)


INCOMPLETE = {
    "kernel_missing": lambda made: made.call("cudaLaunchKernel", 500),
    "launch_missing": lambda made: made.on_device("k", 600, 10, 999),
    "negative_duration": lambda made: made.event("kernel", "k", 600, -10),
    "no_kernels": lambda made: made.events.__delitem__(slice(2, None, 2)),
}


@pytest.mark.parametrize("spoil", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_trace_has_no_idle(spoil):
    made = HandMadeTrace().apply(STEP, kernel(10, 100, 100), kernel(300, 400, 100))
    assert sum(idle(made.read())) == 200
    spoil(made)
    assert made.read().lacks
    assert idle(made.read()) is None
