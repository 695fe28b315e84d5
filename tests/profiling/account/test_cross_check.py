"""Passes under a profiler that lies, made by hand: what it falsified is refused, what is honest is untouched."""

from collections import Counter

import pytest
from traces import EAGER, FIRST_NODE, MS, PASS_KERNELS, PASS_STEP_NS, US, HandMadeTrace, profiled_pass, training_step

from profiling.account.attribution import idle, per_step
from profiling.account.cross_check import judge
from profiling.account.trace import missing, read

LIARS = {5, 9, 17}
CONV, BN, CAST = (ns for *_, ns in PASS_KERNELS)
HALF_US = 500


def changed(index, **changes):
    """A lie about one kernel: its start or duration by a function of it."""

    def lie(kernels):
        name, start, duration, node = kernels[index]
        start = changes.get("start", lambda ns: ns)(start)
        duration = changes.get("duration", lambda ns: ns)(duration)
        return [*kernels[:index], (name, start, duration, node), *kernels[index + 1 :]]

    return lie


def each(duration):
    return lambda kernels: [(name, start, duration(ns), node) for name, start, ns, node in kernels]


def exchanged(kernels):
    """The sum is right, and the shares are not."""
    (conv, *of_conv), (bn, *of_bn), cast = kernels
    return [(bn, *of_conv), (conv, *of_bn), cast]


LIES = {
    "dropped": (lambda kernels: kernels[1:], "kernels are missing"),
    "all_dropped": (lambda kernels: [], "kernels are missing"),
    "one_too_many": (lambda kernels: [*kernels, ("extra", kernels[-1][1] + 2 * MS, US, 0)], "kernels are too many"),
    "zero_timestamps": (changed(1, start=lambda _: 0, duration=lambda _: 0), "kernels have no length"),
    "overlapping": (changed(1, start=lambda ns: ns - MS), "kernels overlap on one stream"),
    "all_doubled": (each(lambda ns: 2 * ns), "kernels ran longer than the step"),
    "one_doubled": (changed(1, duration=lambda ns: 2 * ns), "kernel times are not those of other steps"),
    "one_of_seconds": (changed(2, duration=lambda ns: 4000 * ns), "kernels ran longer than the step"),
    "exchanged": (exchanged, "kernel times are not those of other steps"),
    "halved": (each(lambda ns: ns // 2), "kernel times are not those of other steps"),
    "shifted_later": (changed(2, start=lambda ns: ns + 15 * MS), "kernels lie further apart than the step"),
    "shifted_earlier": (changed(0, start=lambda ns: ns - 15 * MS), "kernels lie further apart than the step"),
}


def judged(tmp_path, lie=lambda number, kernels: kernels, timed_ns=PASS_STEP_NS, change=lambda profile: profile, **how):
    path, profile = profiled_pass(tmp_path / "trace.json", lie=lie, **how)
    return judge(read(path), change(profile), timed_ns)


@pytest.mark.parametrize("nodes", [True, False], ids=["with_nodes", "without"])
def test_an_honest_pass_is_untouched(tmp_path, nodes):
    found = judged(tmp_path, nodes=nodes)
    assert (found.refused, found.lacks, found.said, found.fell_back) == ([], [], "", False)
    assert (found.images, found.steps, found.eager_step) == (20 * 512, 20, EAGER)
    assert found.source == "torch.profiler, a pass of its own"
    step = per_step(found.trace)
    assert {c: ns for c, ns in step.total.by_category.items() if ns} == {
        "convolution": 20 * CONV,
        "batch norm": 20 * BN,
        "layout and cast": 20 * CAST,
    }
    assert Counter(k.ops[-1] for k in found.trace.kernels) == {op: 20 for _, op, _, _ in PASS_KERNELS}


def test_jitter_is_no_lie(tmp_path):
    """Timestamps that overlap by less than a microsecond, and times that differ by some per cent."""

    def lie(number, kernels):
        kernels = changed(1, start=lambda ns: ns - US - HALF_US)(kernels)
        return changed(0, duration=lambda ns: ns - number % 5 * 100 * US)(kernels)

    found = judged(tmp_path, lie)
    assert (found.refused, found.lacks) == ([], [])


def test_the_jitter_of_many_short_kernels_is_no_lie(tmp_path):
    """Each of 100 kernels of 20 us overlaps the next by 0.9 us, together by 4.5 % of the time."""
    made = HandMadeTrace()
    for number in range(6):
        made.step(number, number * 3 * MS, 3 * MS)
        starts = [number * 3 * MS + 100 * US + i * 19_100 for i in range(100)]
        made.graph(number * 3 * MS + 10 * US, [("k", start, 20 * US) for start in starts])
    profile = {"eager_step": None, "step_images": [64] * 6, "step_ns": [3 * MS] * 6}
    assert judge(read(made.write(tmp_path / "trace.json")), profile, 3 * MS).refused == []


def test_kernels_launched_early_on_purpose_are_no_lie(tmp_path):
    """Programmatic dependent launch: each begins some microseconds before the one before it has ended."""
    found = judged(tmp_path, lambda number, kernels: changed(1, start=lambda ns: ns - 20 * US)(kernels))
    assert (found.refused, found.lacks) == ([], [])


@pytest.mark.parametrize("nodes", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["with_nodes", "without"])
@pytest.mark.parametrize(("lie", "reason"), LIES.values(), ids=LIES)
def test_steps_that_lie_are_refused_and_no_others(tmp_path, lie, reason, nodes):
    found = judged(tmp_path, lambda number, kernels: lie(kernels) if number in LIARS else kernels, nodes=nodes)
    assert {one.step for one in found.refused} == LIARS
    assert all(one.reason.startswith(reason) and one.detail for one in found.refused)
    assert found.said.startswith(f"3 of 20 profiled steps refused: {reason}")
    assert found.lacks == []
    assert found.images == 17 * 512
    assert found.source.endswith("17 of its 20 steps")
    step = per_step(found.trace)
    assert (step.steps, step.total.by_category["batch norm"]) == (17, 17 * BN)
    assert step.total.busy_ns == 17 * (CONV + BN + CAST)
    assert idle(found.trace) is not None


def test_a_kernel_recorded_for_another_is_seen_by_the_nodes(tmp_path):
    def lie(number, kernels):
        return [*kernels[:2], (*kernels[2][:3], kernels[1][3])] if number in LIARS else kernels

    found = judged(tmp_path, lie)
    detail = "3 recorded, 3 expected, 1 of the graph's nodes without one"
    assert found.said == f"3 of 20 profiled steps refused: kernels are missing (step 5: {detail})"
    assert {one.detail for one in found.refused} == {detail}


def test_a_node_that_one_step_alone_has_is_its_own_fault(tmp_path):
    def lie(number, kernels):
        return [*kernels[:2], (*kernels[2][:3], 999)] if number in LIARS else kernels

    assert {one.step for one in judged(tmp_path, lie).refused} == LIARS


def test_a_kernel_recorded_twice_is_seen_by_the_nodes(tmp_path):
    def lie(number, kernels):
        return [*kernels, ("extra", kernels[-1][1] + 2 * MS, US, FIRST_NODE)] if number in LIARS else kernels

    assert {one.reason for one in judged(tmp_path, lie).refused} == {"kernels are recorded twice"}


def test_reasons_are_counted_where_there_are_several(tmp_path):
    lies = {5: LIES["dropped"][0], 6: LIES["dropped"][0], 9: LIES["overlapping"][0]}
    found = judged(tmp_path, lambda number, kernels: lies.get(number, lambda k: k)(kernels))
    assert found.said == (
        "3 of 20 profiled steps refused: kernels are missing (2; step 5: 2 recorded, 3 expected, 1 of the graph's "
        "nodes without one), kernels overlap on one stream (1; step 9: for 0.999 ms of 14 ms)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("lie", [lie for lie, _ in LIES.values()], ids=LIES)
def test_where_all_replays_lie_the_eager_step_is_taken(tmp_path, lie):
    found = judged(tmp_path, lambda number, kernels: lie(kernels) if number != EAGER else kernels)
    assert (len(found.refused), found.fell_back, found.images) == (20, True, 512)
    assert [step.number for step in found.trace.steps] == [EAGER]
    assert "one step run eagerly" in found.source
    (lack,) = found.lacks
    assert lack.startswith("20 of 20 profiled steps refused: ")
    assert lack.endswith("Too few are left: the kernel times are those of the one step that was run eagerly.")
    step = per_step(found.trace)
    assert (step.steps, step.total.by_category["batch norm"]) == (1, BN)
    assert step.total.busy_ns == CONV + BN + CAST


def test_four_steps_are_too_few_and_five_are_not(tmp_path):
    def dropped_from(first):
        return lambda number, kernels: kernels[1:] if number >= first else kernels

    assert judged(tmp_path, dropped_from(6)).fell_back is False
    assert judged(tmp_path, dropped_from(5)).fell_back is True


def test_few_steps_of_which_none_lies_are_enough(tmp_path):
    found = judged(tmp_path, replays=3)
    assert (found.steps, found.refused, found.fell_back) == (3, [], False)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("all_dropped", "all_doubled", "one_of_seconds")]


@pytest.mark.parametrize("name", ["dropped", "zero_timestamps", "overlapping", *SLOW])
def test_an_eager_step_that_lies_teaches_nothing(tmp_path, name):
    lie, reason = LIES[name]
    found = judged(tmp_path, lambda number, kernels: lie(kernels) if number == EAGER else kernels)
    assert (found.refused, found.fell_back) == ([], False)
    (lack,) = found.lacks
    assert lack.startswith("trace incomplete: what a graph replay should hold was not learned from an eager step (ref")
    assert reason in lack
    assert idle(found.trace) is None
    assert per_step(found.trace).total.busy_ns == 20 * (CONV + BN + CAST)
    assert {kernel.ops for kernel in found.trace.kernels} == {()}


def test_nothing_is_compared_with_an_eager_step_whose_kernels_overlap(tmp_path):
    lie, _ = LIES["one_doubled"]
    found = judged(tmp_path, lambda number, kernels: lie(kernels) if number == EAGER else kernels)
    assert (found.refused, found.fell_back) == ([], False)
    assert "kernels overlap on one stream" in found.lacks[0]


def test_an_eager_step_that_contradicts_all_replays_is_taken_and_marked(tmp_path):
    """Nothing says which of them lies."""
    lie, _ = LIES["halved"]
    found = judged(tmp_path, lambda number, kernels: lie(kernels) if number == EAGER else kernels)
    assert found.fell_back
    assert "20 of 20 profiled steps refused: kernel times are not those of other steps" in found.lacks[0]
    assert found.refused[0].detail == "14 ms in all, the eager step 7 ms; kernel by kernel 7 ms apart"


def test_nothing_is_left_where_both_lie(tmp_path):
    found = judged(tmp_path, lambda number, kernels: LIES["zero_timestamps"][0](kernels))
    assert (found.trace, found.images, found.fell_back) == (None, 0, False)
    assert found.lacks == [
        "20 of 20 profiled steps refused: kernels have no length (step 0: 1 of 3); the eager one too: kernels have no "
        "length, 1 of 3. What the device's time was made of is not known."
    ]


def test_without_an_eager_step_replays_are_held_against_one_another(tmp_path):
    def judge_without(lie):
        path, profile = profiled_pass(tmp_path / "trace.json", lie=lie, eager=False)
        return judge(read(path), profile, PASS_STEP_NS)

    found = judge_without(lambda number, kernels: kernels)
    assert found.lacks == ["trace incomplete: what a graph replay should hold was not learned from an eager step"]
    for name in ("dropped", "one_too_many", "one_doubled", "overlapping"):
        lie, reason = LIES[name]
        found = judge_without(lambda number, kernels, lie=lie: lie(kernels) if number in LIARS else kernels)
        assert {one.step for one in found.refused} == LIARS
        assert found.said.startswith(f"3 of 21 profiled steps refused: {reason}")
    found = judge_without(lambda number, kernels: LIES["zero_timestamps"][0](kernels))
    assert found.trace is None
    assert "kernels have no length (step 0: 1 of 3); no step was run eagerly." in found.lacks[0]


def test_times_are_held_against_the_run_without_the_profiler(tmp_path):
    """Where the profiled pass lost the time of its own steps."""
    found = judged(tmp_path, timed_ns=12 * MS, change=lambda profile: profile | {"step_ns": []})
    assert found.trace is None
    assert {one.detail for one in found.refused} == {"14 ms of kernels; a step without the profiler took 12 ms"}
    assert judged(tmp_path, timed_ns=13 * MS, change=lambda profile: profile | {"step_ns": []}).refused == []
    assert judged(tmp_path, timed_ns=None).refused == []


@pytest.mark.parametrize("count", [3, 2], ids=["as_many_kernels", "fewer"])
def test_the_short_last_batch_of_an_epoch_is_no_lie(tmp_path, count):
    """It is another graph: its kernels take less time, have other nodes, and may be fewer."""

    def short(number, kernels):
        ended = number in (8, 18)
        return [(name, start, ns // 2, node + 100) for name, start, ns, node in kernels[:count]] if ended else kernels

    images = [336 if number in (8, 18) else 512 for number in range(21)]
    found = judged(tmp_path, short, change=lambda profile: profile | {"step_images": images})
    assert (found.refused, found.lacks) == ([], [])
    assert found.images == 18 * 512 + 2 * 336


def test_a_launch_whose_kernels_are_lost_is_a_lack_only_where_its_step_is_kept(tmp_path):
    path, profile = profiled_pass(tmp_path / "trace.json", lie=lambda n, kernels: [] if n in LIARS else kernels)
    trace = read(path)
    assert trace.lacks == [missing(3)]
    assert judge(trace, profile, None).lacks == []


def test_steps_that_were_not_replayed_are_held_against_one_another(tmp_path):
    made = HandMadeTrace()
    for number in range(8):
        training_step(made, number, number * MS)
    path, profile = tmp_path / "trace.json", {"eager_step": None, "step_images": [64] * 8, "step_ns": [MS] * 8}
    assert judge(read(made.write(path)), profile, MS).refused == []
    made.kernel("twice", 5 * MS + 700 * US, 5 * MS + 800 * US, 150 * US)
    found = judge(read(made.write(path)), profile, MS)
    assert [(one.step, one.reason) for one in found.refused] == [(5, "kernel times are not those of other steps")]
    assert found.lacks == []


def test_on_a_cpu_every_step_is_believed(tmp_path):
    made = HandMadeTrace(gpu=None)
    for number, duration in enumerate((100, 900, 100)):
        made.step(number, number * 1_000, 1_000)
        made.op("aten::mm", number * 1_000 + 10, duration)
    profile = {"eager_step": None, "step_images": [8] * 3, "step_ns": [50] * 3}
    trace = read(made.write(tmp_path / "trace.json"))
    found = judge(trace, profile, 50)
    assert (found.trace, found.refused, found.lacks, found.images) == (trace, [], [], 24)
