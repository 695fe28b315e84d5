import dataclasses

import pytest

from experiments import expected
from experiments.expected import GAP_US, START_US, Launch, predict
from model.presets import preset
from profiling.bench import cases
from profiling.bench.ahead_of_time import Build, Facts
from profiling.device.specifications import H200

TEST_MACHINE = H200._replace(
    flops_per_s=1e12,
    bytes_per_s=1e11,
    l2_bytes_per_s=1e12,
    l2_latency_us=1.0,
    multiprocessors=10,
    multiprocessor_bytes_per_s=2e10,
    instructions_per_s=1e9,
)


def facts_of(builds: list[Build]) -> list[Facts]:
    return [Facts("", 90, registers=64, warps=4) for _ in builds]


def of(programs: int, tail: float = 1.0, issue: float = 1.0, **more) -> Launch:
    return Launch("kernel", programs, 64, 8, tail, issue, **more)


def build(programs: int, kernel: str = "kernel", constexprs: dict | None = None, **integers: int) -> Build:
    return Build("kernels.x", kernel, {}, constexprs or {"BLOCK_N": 128}, programs=programs, integers=integers)


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


def test_a_product_is_bound_by_its_operands_tiles_where_the_cache_is_the_slowest():
    """1024 x 128 by 128 x 64, in blocks of 128 x 64 x 64: 8 programs of 2 passes over (128 + 64) x 64 fp16 elements."""
    flops = 2 * 1024 * 64 * 128
    moved = 8 * 2 * (128 + 64) * 64 * 2
    assert expected.operand_bytes(flops, (128, 64)) == moved
    fast = TEST_MACHINE._replace(flops_per_s=1e15, multiprocessor_bytes_per_s=1e12)
    product = predict("conv_fprop", "layer", flops, 1000, [of(8, block=(128, 64))], fast)
    assert (product.bound, product.l2_bytes) == ("L2", moved)
    assert product.expected_us == pytest.approx(START_US + moved / 1e6)  # 1e12 bytes a second
    slow = fast._replace(multiprocessor_bytes_per_s=2e10)
    few = predict("conv_fprop", "layer", flops, 1000, [of(2, block=(128, 64))], slow)  # 2e10 for each of two
    assert few.expected_us == pytest.approx(START_US + moved / 4e4)
    assert predict("bn_apply", "layer", flops, 1000, [of(8)], fast).l2_bytes == 0


@pytest.mark.parametrize(
    ("op", "layer", "block"),
    [
        ("fprop", "64x32x32-128x3x3-s2", (256, 128)),
        ("dgrad", "64x32x32-128x3x3-s2", (256, 64)),
        ("wgrad", "3x32x32-64x3x3-s1", (256, 64)),
        ("fprop", "256x8x8-512x1x1-s1", (256, 128)),
        ("batch norm", "512x64x32x32", None),
    ],
)
def test_the_librarys_convolutions_read_tiles_too(op, layer, block):
    found = predict(op, layer, 10**9, 0, [], TEST_MACHINE)
    assert found.l2_bytes == (expected.operand_bytes(10**9, block) if block else 0)
    assert found.main is None


def test_the_launch_that_multiplies_does_the_work_however_small_its_grid():
    """Its tail counts, and the reduction's many programs and wide tail do not."""
    launches = [of(504, tail=1.5, block=(128, 128)), of(2304, tail=9.0, serial_us=2.0)]
    assert expected.main_launch(launches) == 0
    both = predict("conv_wgrad", "layer", 10**8, 0, launches, TEST_MACHINE)
    assert both.expected_us == pytest.approx(2 * START_US + 150 + 2.0)
    assert (both.main, both.after_us) == (0, 2.0)
    assert expected.main_launch([of(8, serial_us=1.0), of(4), of(6)]) == 2
    assert expected.main_launch([]) is None


def test_the_parts_of_a_split_product_are_written_and_read():
    """1e6 bytes of operands and twice 2e6 of parts: written by the product, read by the reduction's single program at
    2e10 bytes a second."""
    launches = [of(100, block=(64, 64)), of(1, serial_us=5.0, parts_bytes=2 * 10**6)]
    found = predict("conv_wgrad", "layer", 0, 5 * 10**6, launches, TEST_MACHINE)
    assert found.expected_us == pytest.approx(2 * START_US + 30 + 100)
    assert found.floor_us == 50


def test_taps_that_share_a_load_read_its_operand_once():
    """A block of 64 channels by 32 filters in three taps: of the channels' tile a third, of the filters' all three."""
    values = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}
    blocks = [
        expected.launch(build(10, "conv_wgrad_kernel", values | {"TAPS": taps}), facts_of([0])[0], TEST_MACHINE).block
        for taps in (1, 3)
    ]
    flops = 2 * 3 * 64 * 32 * 64  # of one step
    assert expected.operand_bytes(flops, blocks[0]) == 3 * (64 + 32) * 64 * 2
    assert expected.operand_bytes(flops, blocks[1]) == (64 + 3 * 32) * 64 * 2


PARTS = {"BLOCK": 1024, "AHEAD": 4}


@pytest.mark.parametrize(
    ("kernel", "values", "loads", "programs", "us"),
    [
        # 512 parts of 1024 floats, four of them in a pass: 128 passes of 16 KB and 100 x 4 instructions, for which one
        # multiprocessor takes 0.8192 and 0.4 us behind 1 us of latency.
        ("conv_wgrad_reduce_kernel", {"SPLIT": 512, "elements": 8192, **PARTS}, 8, 8, 128 * (1 + 0.8192 + 0.4)),
        # 14 parts: the fourth pass has two of them.
        ("conv_wgrad_reduce_kernel", {"SPLIT": 14, "elements": 8192, **PARTS}, 8, 8, 4 * (1 + 0.8192 + 0.4)),
        # 25 programs on 10 multiprocessors: three share what one has.
        (
            "conv_wgrad_reduce_kernel",
            {"SPLIT": 8, "elements": 25600, **PARTS},
            8,
            25,
            2 * (1 + 3 * (0.8192 + 0.4)),
        ),
        # Three planes of 512 tiles by 8 channels: 48 KB a pass.
        ("bn_finalize_kernel", {"T": 4096, "BLOCK_T": 512, "BLOCK_C": 8}, 24, 8, 8 * (1 + 2.4576 + 0.4)),
        # Fewer tiles than a pass takes.
        ("bn_coefficients_kernel", {"T": 128, "BLOCK_T": 512, "BLOCK_C": 8}, 16, 8, 1 * (1 + 0.4096 + 0.4)),
        ("bn_apply_kernel", {"T": 4096, "BLOCK_T": 512, "BLOCK_C": 8}, 24, 8, 0),
    ],
    ids=["reduce", "remainder", "shared", "finalize", "one_pass", "no_reduction"],
)
def test_a_reduction_takes_its_passes_in_turn(kernel, values, loads, programs, us):
    loop = {"LDG.E.128": loads, "FADD": 99 - loads, "BAR.SYNC": 1}
    facts = Facts("", 90, registers=64, warps=4, loops=[{"IMAD": 7}, loop])
    found = expected.launch(build(programs, kernel, {}, **values), facts, TEST_MACHINE)
    assert found.serial_us == pytest.approx(us)
    assert found.parts_bytes == (4 * values["SPLIT"] * values["elements"] if "SPLIT" in values else 0)


@pytest.mark.parametrize(("additions", "us"), [(76, 2.4576), (976, 4.0)], ids=["bytes", "instructions"])
def test_without_a_barrier_bytes_and_instructions_of_a_pass_overlap(additions, us):
    loop = {"LDG.E.128": 24, "FADD": additions}
    facts = Facts("", 90, registers=64, warps=4, loops=[loop])
    values = {"T": 4096, "BLOCK_T": 512, "BLOCK_C": 8}
    found = expected.launch(build(8, "bn_finalize_kernel", {}, **values), facts, TEST_MACHINE)
    assert found.serial_us == pytest.approx(8 * (1 + us))


def test_a_reduction_alone_is_bound_by_its_latency():
    found = predict("bn_finalize", "layer", 10, 1000, [of(8, serial_us=12.0)], TEST_MACHINE)
    assert (found.expected_us, found.bound, found.after_us) == (START_US + 12, "latency", 0)


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
    ops = expected.cases(chosen, H200)
    facts = expected.facts_of(ops.values(), facts_of)
    found = {name: expected.expect(op, facts, H200) for name, op in ops.items()}
    wgrad = found["conv_wgrad 64x32x32-64x3x3-s1"]
    assert wgrad.flops == 2 * 512 * 32 * 32 * 64 * 64 * 9
    assert [one.kernel for one in wgrad.launches] == ["conv_wgrad_kernel", "conv_wgrad_reduce_kernel"]
    product, reduction = wgrad.launches
    assert (wgrad.main, wgrad.bound, reduction.block) == (0, "L2", None)
    split = ops["conv_wgrad 64x32x32-64x3x3-s1"].builds[1].integers["SPLIT"]
    assert reduction.parts_bytes == split * 64 * 64 * 9 * 4
    assert wgrad.l2_bytes == expected.operand_bytes(wgrad.flops, product.block)
    assert wgrad.floor_us == pytest.approx(1e6 * wgrad.flops / 790e12)
    operands = 2 * 512 * 32 * 32 * 64 * 2 + 64 * 64 * 9 * 4
    assert wgrad.bytes == operands + 2 * reduction.parts_bytes
    assert found["bn_finalize 64x32x32"].launches[0].programs < 132
    assert found["bn_finalize 64x32x32"].bound == "latency"


def test_the_fused_step_is_predicted_kernel_by_kernel():
    """On few images; of the launches each belongs to the op that made it."""
    ops = expected.fused_step(dataclasses.replace(preset("fused"), batch_size=4), H200)
    facts = expected.facts_of(ops, facts_of)
    rows = [expected.expect(op, facts, H200) for op in ops]
    ours = [row for row in rows if row.launches]
    assert {row.op for row in ours} >= {"augment", "fprop", "dgrad", "wgrad", "bn_finalize", "bn_backward_apply"}
    for row in ours:
        kernel = {"fprop": "conv_fprop", "dgrad": "conv_dgrad", "wgrad": "conv_wgrad", "optimiser": "sgd"}.get(
            row.op, row.op
        )
        assert all(one.kernel.startswith(kernel.removesuffix("_add")) for one in row.launches), row
        assert (row.launches[row.main].block is not None) == (row.op in expected.CONVOLUTIONS)
    assert sum(row.op == "fprop" for row in rows) == sum(row.op == "wgrad" for row in rows)
    assert rows[-1].op == "optimiser"


def test_the_eager_step_makes_eager_modes_passes():
    whole = expected.whole([expected.expect(op, {}, H200) for op in expected.eager_step(preset("article-256"))])
    seconds = whole["floor_us"] / 1e6 * 35 * 50_000 / 512
    assert 13.6 < seconds < 14.5  # the floor of its layers, 13.6 s, and what that leaves out


@pytest.mark.parametrize("kernel", expected.LINES_KERNELS)
def test_a_program_that_walks_down_a_map_loads_a_pixel_three_times(kernel):
    """64 channels to 64, 512 maps of 32x32: 256 programs load nine taps, and 33 lines of 64 pixels three times each."""
    constants = {"H": 32, "W": 32, "C": 64, "K": 64, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    one = expected.launch(build(256, kernel, constants), Facts("", 90, registers=1, warps=4), H200)
    flops, loaded = 2 * 512 * 32 * 32 * 64 * 64 * 9, 256 * 2 * (9 * 64 * 64 + 3 * 33 * 64 * 64)
    assert expected.operand_bytes(flops, one.block) == pytest.approx(loaded, rel=1e-9)
    assert one.tail == pytest.approx(2 * 132 / 256 * 33 / 32), "a line is beyond the map's edge"
