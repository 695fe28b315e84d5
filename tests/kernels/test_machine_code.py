"""Machine code of every kernel at the layers of both networks: spills, vector accesses, loops, matrix instructions.

A plain run compiles a few kernels for Hopper; the slow tests compile all, on every architecture.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import prologue_kernel
from ahead_of_time import SHARED_LIMIT, Build, Facts, compile_all, launches, network_builds, unique
from checks import augment as augment_checks
from checks import sgd as sgd_checks

from kernels import batchnorm, fused, tiles
from kernels.augment import augment
from kernels.bn_backward import bn_coefficients
from kernels.bn_stats import bn_finalize
from kernels.conv_dgrad import conv_dgrad
from kernels.conv_fprop import conv_fprop
from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS, ConvShape
from kernels.conv_wgrad import conv_wgrad
from kernels.sgd import sgd
from kernels.tiles import Gpu

ARCHITECTURES = (80, 90, 100)
MULTIPROCESSORS = {90: 132, 100: 148}  # H100 SXM and H200, B200
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Instructions that a warp issues in the main loop for each matrix instruction. The limits are a little above what ptxas
# makes of the default tiles; on 9.x the schedulers, which issue one a clock, must not be busier than the tensor cores.
INSTRUCTION_BUDGET = {80: 12, 100: 102}
MACS_A_CLOCK = 2048  # of a Hopper multiprocessor's tensor cores, whose instruction is four warps', one a scheduler
LAYERS = dict.fromkeys(RESNET_LAYERS + RESNET9_LAYERS)


def gpu(arch: int) -> Gpu:
    return Gpu("", (arch // 10, 0))


def assert_no_spills(facts: Facts) -> None:
    assert (facts.error, facts.spill_bytes, facts.local_bytes, facts.notes) == ("", 0, 0, []), facts


def assert_machine_code(build: Build, facts: Facts) -> None:
    """No spills, no local memory, no serialised matrix instructions, no operand overwritten before it is read, TMA from
    sm_90 on, few instructions for an MMA."""
    name, arch = f"{facts.label} on sm_{facts.arch}", facts.arch
    assert_no_spills(facts)
    assert facts.overwritten == 0, name
    assert facts.shared_bytes <= SHARED_LIMIT[arch], name
    assert facts.count(MATRIX_INSTRUCTION[arch]) > 0, name
    assert build.constexprs.get("DESCRIPTORS", True) == (arch >= 90) == (facts.count("UTMALDG") > 0), name
    if arch == 80:
        assert facts.count("LDGSTS", ".128") > 0 or facts.count("LDG", ".128") > 0, name
    loop, matrices = facts.main_loop()
    # There is no loop where it was unrolled, and none to speak of in the few steps of a 1x1 filter.
    if loop and build.constexprs.get("R", 3) == 3:
        budget = facts.macs_per_matrix_step() / MACS_A_CLOCK if arch == 90 else INSTRUCTION_BUDGET[arch]
        assert sum(loop.values()) <= budget * sum(matrices.values()), (name, loop, matrices)


def operands_are_shared(facts: Facts) -> bool:
    """Whether a Hopper GPU's matrix instructions take both operands from shared memory: no warp loads one of them."""
    loop, _ = facts.main_loop()
    return not any(name.startswith("LDSM") for name in loop)


def augment_builds(arch: int) -> list[Build]:
    with launches() as builds:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            augment(*augment_checks.problem(8, 3, 2, 32, 32, 4, 8), dtype)
    return [build.on(arch) for build in builds]


def check_augment(build: Build, facts: Facts) -> None:
    assert_no_spills(facts)
    assert facts.count("STG", ".128") == facts.count("STG") > 0, "the batch is written 16 bytes at a time"
    assert facts.registers <= 64, facts


def batchnorm_builds(arch: int) -> list[Build]:
    """Every launch in fp16; in bf16, which the interpreter cannot run, only that it compiles, on the default GPU."""
    builds = [build.on(arch) for build in network_builds(batchnorm, batch=512)]
    if arch == 90:
        brain = network_builds(batchnorm, batch=512, dtype="bfloat16")
        builds += [dataclasses.replace(build, inspect=False) for build in brain]
    names = [f"bn_{name}_kernel" for name in ("stats", "finalize", "apply", "coefficients")]
    names += [f"bn_backward_{name}_kernel" for name in ("reduce", "apply")]
    assert {build.kernel for build in builds} == set(names)
    return builds


def check_batchnorm(build: Build, facts: Facts) -> None:
    if not build.inspect:
        assert not facts.error, facts
        return
    assert_no_spills(facts)
    assert facts.registers <= 128, facts
    if build.kernel not in ("bn_finalize_kernel", "bn_coefficients_kernel"):
        assert facts.count("LDG", ".128") == facts.count("LDG") > 0, facts
    if "apply" in build.kernel:
        assert facts.count("STG", ".128") == facts.count("STG") > 0, facts


def merging_builds(arch: int) -> list[Build]:
    """The kernels that merge partials: one build each for any number of tiles."""
    shapes = [(1, 16), (512, 80), (513, 512), (4096, 64)]
    with launches() as builds:
        for count, channels in shapes:
            vector = torch.empty(channels)
            bn_finalize(torch.empty(3, count, channels), vector, vector, 1e-5)
            bn_coefficients(torch.empty(2, count, channels), torch.empty(5, channels), 100.0)
    assert len(builds) == 2 * len(shapes)
    assert len(unique(builds)) == 2
    return [build.on(arch) for build in unique(builds)]


def check_merging(build: Build, facts: Facts) -> None:
    """The loop waits for no other warp; the few barriers are behind it, where the lanes are merged.

    A thread's 16 sums of each plane of the coefficients, and a pass's loads for them, are 64 registers.
    """
    assert_no_spills(facts)
    finalize = build.kernel == "bn_finalize_kernel"
    (loop,) = facts.loops
    assert sum(n for name, n in loop.items() if name.startswith("LDG") and ".128" in name) == (3 if finalize else 8)
    assert not any(name.startswith(("BAR", "SHFL", "LDS", "STS")) for name in loop)
    assert facts.count("BAR") <= (18 if finalize else 11)
    assert finalize or facts.registers > 64


def sgd_builds(arch: int) -> list[Build]:
    with launches() as recorded:
        for momentum, copy in ((0.9, torch.bfloat16), (0.9, None), (0.0, torch.float16)):
            sgd(**sgd_checks.problem(2**16, momentum, "cpu", copy))
    assert len(unique(recorded)) == 4, "one check, three updates"
    return [build.on(arch) for build in unique(recorded)]


def check_sgd(build: Build, facts: Facts) -> None:
    """Whole vectors, and one compare-and-swap."""
    assert_no_spills(facts)
    wide = "" if build.arch == 100 else "128"  # bits; for 10.0 the compiler may take 256
    if build.kernel == "sgd_check_kernel":
        assert facts.count("LDG", wide) >= 4
        assert facts.count("ATOM", "CAS") == 1, facts.sass
        return
    tensors = 2 + ("v_ptr" not in build.constexprs)
    assert facts.count("LDG", wide) >= 4 * tensors
    assert facts.count("STG", wide) >= 4 * (tensors - 1)


def prologue_builds(arch: int) -> list[Build]:
    types = {"x_ptr": "*fp16", "scale_ptr": "*fp32", "shift_ptr": "*fp32", "out_ptr": "*fp16"}
    builds = []
    for nan_is_zero in (True, False):
        constants = {"ROWS": 256, "C": 64, "NAN_IS_ZERO": nan_is_zero}
        signature, options = types | dict.fromkeys(constants, "constexpr"), {"num_warps": 4}
        path = prologue_kernel.__file__
        builds.append(Build(path, "relu_affine_kernel", signature, constants, tuple(types), options=options).on(arch))
    return builds


def check_prologue(build: Build, facts: Facts) -> None:
    """Two elements take a packed subtraction and multiply-add; and a packed maximum that turns NaN into zero, or the
    ReLU of the multiply-add."""
    pairs, nan_is_zero = 256 * 64 // 2 // 128, build.constexprs["NAN_IS_ZERO"]  # of a thread
    assert not facts.error
    assert facts.count("HADD2") - facts.count("HADD2.F32") + facts.count("HFMA2") == 2 * pairs
    assert facts.count("HFMA2", "RELU") == (0 if nan_is_zero else pairs)
    assert facts.count("HMNMX2") == (pairs if nan_is_zero else 0)


def layer_operands(shape: ConvShape) -> tuple[torch.Tensor, ...]:
    """x, w, y of a layer at 512 images, and fp32 [C] and [K]; uninitialised, for launches that are only recorded."""
    extents = (512, shape.C, shape.H, shape.W), (shape.K, shape.C, shape.R, shape.R), (512, shape.K, shape.P, shape.Q)
    x, w, y = (torch.empty(e, dtype=torch.float16, memory_format=torch.channels_last) for e in extents)
    return x, w, y, torch.empty(shape.C), torch.empty(shape.K)


def layer_builds(arch: int, launch: Callable[[ConvShape], None], layers=LAYERS) -> list[Build]:
    """The kernels that `launch(shape)` launches for each layer, in the tiles of that architecture."""
    builds = []
    for shape in layers:
        with launches(gpu(arch)) as recorded:
            launch(shape)
        builds += [dataclasses.replace(build, label=f"{build.kernel} {shape}") for build in recorded]
    return builds


def fprop_builds(arch: int) -> list[Build]:
    """The article's layers with everything on, ResNet9's without a prologue."""

    def launch(shape: ConvShape) -> None:
        x, w, y, c, k = layer_operands(shape)
        options = () if shape not in RESNET_LAYERS else (c, c) if shape.R == 1 else (c, c, y, k, k)
        conv_fprop(x, w, shape.stride, *options)

    return layer_builds(arch, launch)


def check_fprop(build: Build, facts: Facts) -> None:
    assert_machine_code(build, facts)
    if build.arch == 90 and build.constexprs.get("R", 3) == 3:
        assert operands_are_shared(facts) == build.constexprs.get("COLUMNS", False), facts.label


def dgrad_builds(arch: int) -> list[Build]:
    """The article's layers with everything on, ResNet9's without the mask.

    The gradient of the article's projections is a dgrad of stride 1, and then the 3x3 layer's strided shortcut.
    """

    def launch(shape: ConvShape) -> None:
        x, w, y, c, _ = layer_operands(shape)
        arguments = (y, w, shape.H, shape.W, shape.stride)
        if shape.R == 1:
            arguments = (y, w, shape.P, shape.Q)
        elif shape in RESNET_LAYERS:
            arguments += (torch.empty_like(x[..., : shape.P, : shape.Q]) if shape.stride == 2 else x, x, c, c, c)
        conv_dgrad(*arguments)

    return layer_builds(arch, launch)


def check_dgrad(build: Build, facts: Facts) -> None:
    assert_machine_code(build, facts)
    if build.arch == 90:
        assert facts.blocks_per_sm() >= 2, "one's epilogue is under the other's products"
        assert "lines" in build.kernel or (build.constexprs["COLUMNS"] and operands_are_shared(facts)), facts.label


def wgrad_builds(arch: int) -> list[Build]:
    """Product and reduction of the article's layers with the prologue, and the products of ResNet9's without.

    On Hopper also the products of a stored activation, and in bf16, which this machine cannot call: the tile is fp16's.
    """

    def launch(prologue: bool) -> Callable[[ConvShape], None]:
        def one(shape: ConvShape) -> None:
            x, _, y, c, _ = layer_operands(shape)
            conv_wgrad(x, y, shape.R, shape.stride, *((c, c) if prologue else ()))

        return one

    ours, stride1 = layer_builds(arch, launch(True), RESNET_LAYERS), [s for s in RESNET_LAYERS if s.stride == 1]
    plain = layer_builds(arch, launch(False), (*RESNET9_LAYERS, *(stride1 if arch == 90 else ())))
    builds = ours + [build for build in plain if "reduce" not in build.kernel]
    if arch == 90:
        for shape, build in zip(stride1, layer_builds(arch, launch(True), stride1)[::2], strict=True):
            assert tiles.default_tile("conv_wgrad", shape, torch.bfloat16, (9, 0)).prologue == "fp32"
            signature = {name: kind.replace("fp16", "bf16") for name, kind in build.signature.items()}
            constants = build.constexprs | {"HALVES": False}
            builds.append(dataclasses.replace(build, signature=signature, constexprs=constants))
    return builds


def check_wgrad(build: Build, facts: Facts) -> None:
    values, arch = build.constexprs, build.arch
    if "reduce" in build.kernel:  # it fills the GPU, and the loads of a pass are under way together
        assert (facts.error, facts.spill_bytes, facts.local_bytes) == ("", 0, 0), build.label
        if arch in MULTIPROCESSORS:
            assert build.programs >= MULTIPROCESSORS[arch], build.label
            assert build.programs * values["BLOCK"] == build.integers["elements"]
            assert sum(n for op, n in facts.loops[-1].items() if op.startswith("LDG")) >= 8, build.label
        return
    assert_machine_code(build, facts)
    if any("bf16" in kind for kind in build.signature.values()):
        return
    prologue, size = "scale_ptr" not in values, values["R"]
    assert values["HALVES"] == (arch >= 90), facts.label
    assert values["TAPS"] == (3 if arch == 90 and size == 3 and values["STRIDE"] == 1 else 1), facts.label
    if prologue and arch in MULTIPROCESSORS:
        wave = MULTIPROCESSORS[arch] * (facts.blocks_per_sm() if size == 3 else 1)
        assert 0.6 * wave < build.programs <= wave, (facts.label, build.programs, wave)
    if arch == 90:
        assert_feeds_wgmma(build, facts)


def assert_feeds_wgmma(build, facts) -> None:
    """The loop leaves the schedulers time, in clocks of the tensor core, which does 2,048 multiply-adds in one; without
    a prologue both operands come from shared memory where x is a matrix."""
    prologue = "scale_ptr" not in build.constexprs
    issue = facts.instructions_per_matrix_step() * 2048 / facts.macs_per_matrix_step()
    assert issue <= (0.72 if prologue else 0.47), (facts.label, issue)
    assert operands_are_shared(facts) == (not prologue and build.constexprs["STRIDE"] == 1), facts.label
    two_at_a_time = build.constexprs["BLOCK_M"] // 4 if build.constexprs["HALVES"] and prologue else 0
    assert facts.count("HFMA2", ".RELU") == two_at_a_time, facts.label


def fused_builds(arch: int) -> list[Build]:
    """A prologue with less than everything in the epilogue, which only the blocks launch, at batch 512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "gpu_of", lambda device: gpu(arch))
        builds = network_builds(fused.implementation("ours"), batch=512)
    alone = [
        build.on(arch)
        for build in builds
        if build.kernel.startswith("conv_fprop")
        and build.signature["scale_ptr"] != "constexpr"
        and build.signature["residual_scale_ptr"] == "constexpr"
    ]
    assert len(alone) == 13, "conv1 of seven shapes, conv2 and conv3 beside three projections"
    return alone


class Row(NamedTuple):
    """The builds of an op for an architecture, and what their machine code must satisfy."""

    builds: Callable[[int], list[Build]]
    check: Callable[[Build, Facts], None]
    architectures: tuple[int, ...] = ARCHITECTURES


ROWS = {
    "augment": Row(augment_builds, check_augment),
    "batchnorm": Row(batchnorm_builds, check_batchnorm),
    "merging": Row(merging_builds, check_merging),
    "sgd": Row(sgd_builds, check_sgd),
    "prologue": Row(prologue_builds, check_prologue, (90,)),
    "conv_fprop": Row(fprop_builds, check_fprop),
    "conv_dgrad": Row(dgrad_builds, check_dgrad),
    "conv_wgrad": Row(wgrad_builds, check_wgrad),
    "fused": Row(fused_builds, assert_machine_code),
}


def check(ops_and_builds: list[tuple[str, Build]]) -> None:
    for (op, build), facts in zip(ops_and_builds, compile_all([build for _, build in ops_and_builds]), strict=True):
        ROWS[op].check(build, facts)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_of_every_layer(arch):
    """All ops in one go: the compiling processes take seconds to start."""
    check([(op, build) for op, row in ROWS.items() if arch in row.architectures for build in row.builds(arch)])


def test_machine_code_on_hopper():
    check([(op, ROWS[op].builds(90)[0]) for op in ("augment", "merging", "sgd", "prologue", "conv_wgrad")])
