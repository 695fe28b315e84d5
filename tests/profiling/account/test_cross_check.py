"""Passes under a profiler that lies, made by hand: what it falsified is refused, what is honest is untouched."""

from collections import Counter

import pytest
from traces import EAGER, FIRST_NODE, MS, PASS_KERNELS, PASS_STEP_NS, US, HandMadeTrace, profiled_pass

from profiling.account.attribution import idle, per_step
from profiling.account.cross_check import judge
from profiling.account.trace import missing, read

LIARS, EVERY = {5, 9, 17}, set(range(21))
REPLAYS = EVERY - {EAGER}
CONV, BN, CAST = (ns for *_, ns in PASS_KERNELS)
BUSY_NS = CONV + BN + CAST


def changed(index, start=lambda ns: ns, duration=lambda ns: ns, node=lambda node: node):
    """A lie about one kernel: its start, duration or node by a function of it."""

    def lie(kernels):
        name, *said = kernels[index]
        said = (change(value) for change, value in zip((start, duration, node), said, strict=True))
        return [*kernels[:index], (name, *said), *kernels[index + 1 :]]

    return lie


def each(duration):
    return lambda kernels: [(name, start, duration(ns), node) for name, start, ns, node in kernels]


def one_more(node):
    return lambda kernels: [*kernels, ("extra", kernels[-1][1] + 2 * MS, US, node)]


def exchanged(kernels):
    """The sum is right, and the shares are not."""
    (conv, *of_conv), (bn, *of_bn), cast = kernels
    return [(bn, *of_conv), (conv, *of_bn), cast]


OTHER_TIMES, TOO_LONG = "kernel times are not those of other steps", "kernels ran longer than the step"
APART = "kernels lie further apart than the step"
LIES = {
    "dropped": (lambda kernels: kernels[1:], "kernels are missing"),
    "all_dropped": (lambda kernels: [], "kernels are missing"),
    "one_too_many": (one_more(0), "kernels are too many"),
    "zero_timestamps": (changed(1, lambda _: 0, lambda _: 0), "kernels have no length"),
    "overlapping": (changed(1, lambda ns: ns - MS), "kernels overlap on one stream"),
    "all_doubled": (each(lambda ns: 2 * ns), TOO_LONG),
    "one_doubled": (changed(1, duration=lambda ns: 2 * ns), OTHER_TIMES),
    "one_of_seconds": (changed(2, duration=lambda ns: 4000 * ns), TOO_LONG),
    "exchanged": (exchanged, OTHER_TIMES),
    "halved": (each(lambda ns: ns // 2), OTHER_TIMES),
    "shifted_later": (changed(2, lambda ns: ns + 15 * MS), APART),
    "shifted_earlier": (changed(0, lambda ns: ns - 15 * MS), APART),
}
ONE_LOST = "kernels are missing (step 5: 3 recorded, 3 expected, 1 of the graph's nodes without one)"
OF_NODES = {
    "recorded_for_another": (changed(2, node=lambda node: node - 1), ONE_LOST),
    "node_of_its_own": (changed(2, node=lambda _: 999), ONE_LOST),
    "recorded_twice": (one_more(FIRST_NODE), "kernels are recorded twice"),
}


def by(lie, steps=LIARS):
    """A lie about `steps`, for `profiled_pass`."""
    return lambda number, kernels: lie(kernels) if number in steps else kernels


def judged(tmp_path, lie=lambda number, kernels: kernels, timed_ns=PASS_STEP_NS, **how):
    changes = {key: how.pop(key) for key in ("step_images", "step_ns") if key in how}
    path, profile = profiled_pass(tmp_path / "trace.json", lie=lie, **how)
    return judge(read(path), profile | changes, timed_ns)


@pytest.mark.parametrize("nodes", [True, False], ids=["with_nodes", "without"])
def test_honest_pass_is_untouched(tmp_path, nodes):
    found = judged(tmp_path, nodes=nodes)
    assert (found.refused, found.lacks, found.said, found.fell_back) == ([], [], "", False)
    assert (found.images, found.steps, found.eager_step) == (20 * 512, 20, EAGER)
    assert found.source == "torch.profiler, a pass of its own"
    times = {"convolution": 20 * CONV, "batch norm": 20 * BN, "layout and cast": 20 * CAST}
    assert {c: ns for c, ns in per_step(found.trace).total.by_category.items() if ns} == times
    assert Counter(k.ops[-1] for k in found.trace.kernels) == {op: 20 for _, op, _, _ in PASS_KERNELS}


def jitter(number, kernels):
    """Timestamps that overlap by less than a microsecond, and times that differ by some per cent."""
    kernels = changed(1, start=lambda ns: ns - US - 500)(kernels)
    return changed(0, duration=lambda ns: ns - number % 5 * 100 * US)(kernels)


def short_batch(count):
    """An epoch's last batch is another graph: its kernels take less time, have other nodes, and may be fewer."""
    return by(
        lambda kernels: [(name, start, ns // 2, node + 100) for name, start, ns, node in kernels[:count]], {8, 18}
    )


IMAGES = [336 if number in (8, 18) else 512 for number in range(21)]
HONEST = {
    "jitter": (jitter, {}, 20 * 512),
    "launched_early_on_purpose": (by(changed(1, start=lambda ns: ns - 20 * US), EVERY), {}, 20 * 512),
    "few_steps": (by(None, ()), {"replays": 3}, 3 * 512),
    "times_of_the_run_alone": (by(None, ()), {"timed_ns": 13 * MS, "step_ns": []}, 20 * 512),
    "times_of_the_pass_alone": (by(None, ()), {"timed_ns": None}, 20 * 512),
    "short_batch_of_as_many_kernels": (short_batch(3), {"step_images": IMAGES}, 18 * 512 + 2 * 336),
    "short_batch_of_fewer": (short_batch(2), {"step_images": IMAGES}, 18 * 512 + 2 * 336),
}


@pytest.mark.parametrize(("said", "how", "images"), HONEST.values(), ids=HONEST)
def test_true_records_are_believed(tmp_path, said, how, images):
    found = judged(tmp_path, said, **how)
    assert (found.refused, found.lacks, found.fell_back, found.images) == ([], [], False, images)


def test_jitter_of_many_short_kernels_is_no_lie():
    """Each of 100 kernels of 20 us overlaps the next by 0.9 us, together by 4.5 % of the time."""
    made = HandMadeTrace()
    for number in range(6):
        begin = number * 3 * MS
        made.step(number, begin, 3 * MS)
        made.graph(begin + 10 * US, [("k", begin + 100 * US + i * 19_100, 20 * US) for i in range(100)])
    profile = {"eager_step": None, "step_images": [64] * 6, "step_ns": [3 * MS] * 6}
    assert judge(made.read(), profile, 3 * MS).refused == []


UNLEARNED = "trace incomplete: what a graph replay should hold was not learned from an eager step"
REFUSED = [pytest.param(*row, {}, id=f"{name}-with_nodes") for name, row in (LIES | OF_NODES).items()]
REFUSED += [pytest.param(*row, {"nodes": False}, id=f"{n}-without", marks=pytest.mark.slow) for n, row in LIES.items()]
WITHOUT_EAGER = ("dropped", "one_too_many", "one_doubled", "overlapping")
REFUSED += [pytest.param(*LIES[name], {"eager": False}, id=f"{name}-without_eager_step") for name in WITHOUT_EAGER]


@pytest.mark.parametrize(("lie", "said", "how"), REFUSED)
def test_steps_that_lie_are_refused_and_no_others(tmp_path, lie, said, how):
    found = judged(tmp_path, by(lie), **how)
    assert {one.step for one in found.refused} == LIARS
    assert len({one.reason for one in found.refused}) == 1
    assert all(one.detail for one in found.refused)
    total, kept = found.steps, found.steps - 3
    assert (total, found.lacks) == ((21, [UNLEARNED]) if "eager" in how else (20, []))
    assert found.said.startswith(f"3 of {total} profiled steps refused: {said}")
    assert found.source.endswith(f", {kept} of its {total} steps")
    assert found.images == kept * 512
    steps, step = per_step(found.trace)
    assert (steps, step.by_category["batch norm"], step.busy_ns) == (kept, kept * BN, kept * BUSY_NS)
    assert (idle(found.trace) is None) == bool(found.lacks)


def test_reasons_are_counted_where_there_are_several(tmp_path):
    dropped, overlapping = LIES["dropped"][0], LIES["overlapping"][0]
    found = judged(tmp_path, lambda number, kernels: by(overlapping, {9})(number, by(dropped, {5, 6})(number, kernels)))
    assert found.said == (
        "3 of 20 profiled steps refused: kernels are missing (2; step 5: 2 recorded, 3 expected, 1 of the graph's "
        "nodes without one), kernels overlap on one stream (1; step 9: for 0.999 ms of 14 ms)"
    )


ALL_REFUSED = "20 of 20 profiled steps refused: "
NO_LENGTH = f"{ALL_REFUSED}kernels have no length (step 0: 1 of 3); "
SLOWER = f"{ALL_REFUSED}{TOO_LONG} (step 0: 14 ms of kernels; a step without the profiler took 12 ms); the eager one"


def verdict(name, steps, taken, lack, slow=False, **how):
    """A lie about `steps`; the steps that are taken, and the beginning of what the pass lacks."""
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(by(LIES[name][0], steps), how, taken, lack, id=f"{name}_{taken}_{len(how)}", marks=marks)


VERDICTS = [
    *(verdict(name, REPLAYS, "eager", ALL_REFUSED, slow=name != "dropped") for name in LIES),
    *(
        verdict(name, {EAGER}, "replays", f"{UNLEARNED} (refused: {LIES[name][1]}")
        for name in ("dropped", "overlapping")
    ),
    *(
        verdict(name, {EAGER}, "replays", UNLEARNED, slow=True)
        for name in ("all_dropped", "all_doubled", "one_of_seconds")
    ),
    verdict("zero_timestamps", {EAGER}, "replays", f"{UNLEARNED} (refused: kernels have no length"),
    # Nothing is compared with an eager step whose kernels overlap.
    verdict("one_doubled", {EAGER}, "replays", f"{UNLEARNED} (refused: kernels overlap on one stream"),
    verdict("zero_timestamps", EVERY, "nothing", f"{NO_LENGTH}the eager one too: kernels have no length, 1 of 3. What"),
    verdict("zero_timestamps", EVERY, "nothing", NO_LENGTH.replace("20", "21") + "no step was run", eager=False),
    verdict("dropped", (), "nothing", SLOWER, timed_ns=12 * MS, step_ns=[]),
]


@pytest.mark.parametrize(("lie", "how", "taken", "lack"), VERDICTS)
def test_too_few_replays_or_a_lying_eager_step_are_a_lack(tmp_path, lie, how, taken, lack):
    found = judged(tmp_path, lie, **how)
    assert len(found.refused) == (0 if taken == "replays" else found.steps)
    (said,) = found.lacks
    assert said.startswith(lack)
    if taken == "nothing":
        assert (found.trace, found.images, found.fell_back) == (None, 0, False)
        assert said.endswith("What the device's time was made of is not known.")
        return
    steps, total = per_step(found.trace)
    assert (found.images, total.by_category["batch norm"], total.busy_ns) == (512 * steps, BN * steps, BUSY_NS * steps)
    assert found.fell_back == (taken == "eager")
    if taken == "eager":
        assert [step.number for step in found.trace.steps] == [EAGER]
        assert "one step run eagerly" in found.source
        assert said.endswith("Too few are left: the kernel times are those of the one step that was run eagerly.")
    else:
        assert steps == 20
        assert idle(found.trace) is None
        assert {kernel.ops for kernel in found.trace.kernels} == {()}


def test_four_steps_are_too_few_and_five_are_not(tmp_path):
    fell_back = [judged(tmp_path, by(LIES["dropped"][0], range(first, 21))).fell_back for first in (6, 5)]
    assert fell_back == [False, True]


def test_eager_step_that_contradicts_all_replays_is_taken_and_marked(tmp_path):
    """Nothing says which of them lies."""
    found = judged(tmp_path, by(LIES["halved"][0], {EAGER}))
    assert found.fell_back
    assert f"{ALL_REFUSED}{OTHER_TIMES}" in found.lacks[0]
    assert found.refused[0].detail == "14 ms in all, the eager step 7 ms; kernel by kernel 7 ms apart"


def test_replays_have_no_operations_without_an_eager_step(tmp_path):
    assert judged(tmp_path, eager=False).lacks == [UNLEARNED]


def test_launch_whose_kernels_are_lost_is_a_lack_only_where_its_step_is_kept(tmp_path):
    path, profile = profiled_pass(tmp_path / "trace.json", lie=by(LIES["all_dropped"][0]))
    assert read(path).lacks == [missing(3)]
    assert judge(read(path), profile, None).lacks == []


def test_steps_that_were_not_replayed_are_held_against_one_another():
    made = HandMadeTrace().training(*range(8))
    profile = {"eager_step": None, "step_images": [64] * 8, "step_ns": [MS] * 8}
    assert judge(made.read(), profile, MS).refused == []
    made.kernel("twice", 5 * MS + 700 * US, 5 * MS + 800 * US, 150 * US)
    found = judge(made.read(), profile, MS)
    assert [(one.step, one.reason) for one in found.refused] == [(5, "kernel times are not those of other steps")]
    assert found.lacks == []


def test_every_step_of_a_cpu_is_believed():
    made = HandMadeTrace(gpu=None)
    for number, duration in enumerate((100, 900, 100)):
        made.apply(("step", number, number * 1_000, 1_000), ("op", "aten::mm", number * 1_000 + 10, duration))
    trace = made.read()
    found = judge(trace, {"eager_step": None, "step_images": [8] * 3, "step_ns": [50] * 3}, 50)
    assert (found.trace, found.refused, found.lacks, found.images) == (trace, [], [], 24)
