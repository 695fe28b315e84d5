import dataclasses

import pytest

from experiments import expected
from experiments.expected import GAP_US, H200, START_US, Launch, predict
from model.config import preset
from profiling import cases
from profiling.ahead_of_time import Build, Facts

TEST_MACHINE = H200._replace(flops_per_s=1e12, bytes_per_s=1e11, multiprocessors=10, multiprocessor_bytes_per_s=2e10)


def facts_of(builds: list[Build]) -> list[Facts]:
    return [Facts("", 90, registers=64, warps=4) for _ in builds]


def of(programs: int, tail: float = 1.0, issue: float = 1.0) -> Launch:
    return Launch("kernel", programs, 64, 8, tail, issue)


def build(programs: int) -> Build:
    return Build("kernels.x", "kernel", {}, {"BLOCK_N": 128}, programs=programs)


@pytest.mark.parametrize(("programs", "tail"), [(10, 1), (20, 1), (11, 20 / 11), (5, 2), (15, 4 / 3), (0, 1)])
def test_the_last_programs_leave_multiprocessors_idle(programs, tail):
    found = expected.launch(build(programs), Facts("", 90, registers=1, warps=4), TEST_MACHINE)
    assert found.tail == pytest.approx(tail)


def test_a_loop_that_issues_more_than_the_tensor_core_can_hide_is_longer():
    """64 x 64 x 16 multiply-adds are 32 cycles of 2048; with 48 instructions a matrix step takes 1.5 times that."""

    def issue(loop: dict[str, int]) -> float:
        facts = Facts("", 90, registers=1, warps=4, loops=[loop])
        return expected.launch(build(10), facts, H200).issue

    assert issue({"HGMMA.64x64x16.F32": 2, "IMAD": 94}) == pytest.approx(1.5)
    assert issue({"HGMMA.64x128x16.F32": 2, "IMAD": 94}) == 1
    assert issue({"IMAD": 96}) == 1
    assert issue({"HGMMA": 2, "IMAD": 94}) == 1


def test_a_kernel_takes_a_start_and_the_larger_of_two_times():
    compute = predict("op", "layer", 10**8, 10**6, [of(100)], TEST_MACHINE)  # 100 us, 10 us
    assert (compute.floor_us, compute.expected_us, compute.bound) == (100, START_US + 100, "compute")
    memory = predict("op", "layer", 10**6, 10**8, [of(100)], TEST_MACHINE)  # 1 us, 1000 us
    assert (memory.floor_us, memory.expected_us, memory.bound) == (1000, START_US + 1000, "memory")


def test_factors_lengthen_arithmetic_and_few_programs_lengthen_traffic():
    slow = predict("op", "layer", 10**8, 10**6, [of(100, tail=1.5, issue=2.0)], TEST_MACHINE)
    assert (slow.floor_us, slow.expected_us) == (100, START_US + 300)
    few = predict("op", "layer", 0, 10**6, [of(1)], TEST_MACHINE)  # 10 us by all, 50 us by one multiprocessor of ten
    assert (few.floor_us, few.expected_us) == (10, START_US + 50)


def test_further_launches_add_a_start_each():
    both = predict("op", "layer", 10**8, 0, [of(1, tail=9.0), of(100)], TEST_MACHINE)
    assert both.expected_us == 2 * START_US + 100
    library = predict("op", "layer", 10**8, 0, [], TEST_MACHINE)
    assert library.expected_us == START_US + 100


def test_a_step_is_its_kernels_with_the_gaps_of_a_graph():
    rows = [predict("a", "", 10**8, 0, [of(100), of(1)], TEST_MACHINE), predict("b", "", 10**8, 0, [], TEST_MACHINE)]
    whole = expected.whole(rows)
    assert whole["kernels"] == 3
    assert whole["floor_us"] == 200
    assert whole["expected_us"] == pytest.approx(200 + 3 * (START_US + GAP_US))
    assert whole["families_us"] == {"a": 100 + 2 * START_US, "b": 100 + START_US}


def test_cases_are_predicted_by_the_launches_they_would_make():
    chosen = [c for c in cases.cases() if c.name in ("bn_finalize 64x32x32", "conv_wgrad 64x32x32-64x3x3-s1")]
    found = expected.cases(chosen, H200, facts_of)
    wgrad = found["conv_wgrad 64x32x32-64x3x3-s1"]
    assert wgrad.flops == 2 * 512 * 32 * 32 * 64 * 64 * 9
    assert [one.kernel for one in wgrad.launches] == ["conv_wgrad_kernel", "conv_wgrad_reduce_kernel"]
    assert wgrad.bound == "compute"
    assert wgrad.floor_us == pytest.approx(1e6 * wgrad.flops / 790e12)
    assert found["bn_finalize 64x32x32"].launches[0].programs < 132


def test_the_fused_step_is_predicted_kernel_by_kernel():
    """On few images; of the launches each belongs to the op that made it."""
    config = dataclasses.replace(preset("fused"), batch_size=4)
    rows = expected.fused_step(config, H200, facts_of)
    ours = [row for row in rows if row.launches]
    assert {row.op for row in ours} >= {"augment", "fprop", "dgrad", "wgrad", "bn_finalize", "bn_backward_apply"}
    for row in ours:
        kernel = {"fprop": "conv_fprop", "dgrad": "conv_dgrad", "wgrad": "conv_wgrad"}.get(row.op, row.op)
        assert all(one.kernel.startswith(kernel.removesuffix("_add")) for one in row.launches), row
    assert sum(row.op == "fprop" for row in rows) == sum(row.op == "wgrad" for row in rows)
    assert rows[-1].op == "optimiser"


def test_the_eager_step_makes_eager_modes_passes():
    rows = expected.eager_step(preset("article-256"), H200)
    whole = expected.whole(rows)
    seconds = whole["floor_us"] / 1e6 * 35 * 50_000 / 512
    assert 13.6 < seconds < 14.5  # the floor of its layers, 13.6 s, and what that leaves out
