"""conv_wgrad against float64: every option, the split, machine code."""

import dataclasses

import pytest
import torch
from ahead_of_time import compile_all, compiling, launches
from conv_cases import (
    CASES,
    DTYPES,
    MATRIX_INSTRUCTION,
    activation,
    affine,
    assert_machine_code,
    double,
    layer_operands,
    use_tile,
)
from kernel_checks import assert_as_accurate, assert_caught, channels_last, mutant, relative_error
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from kernels import conv_wgrad as module
from kernels import jit, tiles
from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS
from kernels.conv_wgrad import conv_wgrad, conv_wgrad_cost, conv_wgrad_reference
from kernels.cost import Cost

poisoned = pytest.mark.usefixtures("poisoned_memory")


def operands(case: str, prologue: bool, dtype: torch.dtype, device, seed: int = 0) -> list:
    _, shape = CASES[case]
    x, dy = (activation(case, which, dtype, device, seed + i) for i, which in enumerate("xy"))
    return [x, dy, shape.R, shape.stride, *(affine(shape.C, device, seed) if prologue else (None, None))]


def check(op, case: str, prologue: bool, dtype: torch.dtype, device) -> None:
    """What dw must satisfy, and a mutant must not."""
    arguments = operands(case, prologue, dtype, device)
    x, dy, size, stride, scale, shift = arguments
    dw = op(*arguments)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    baseline = conv_wgrad_reference(*arguments)
    truth = conv_wgrad_reference(*double(x, dy), size, stride, *double(scale, shift))
    assert_as_accurate(dw, baseline, truth, "dw")
    if scale is not None:
        x = torch.relu(x.float() * scale[:, None, None] + shift[:, None, None]).to(dtype)
    # Of the activation as it enters the product, the sum is exact to fp32's rounding whatever its dtype.
    assert relative_error(dw, conv_wgrad_reference(*double(x, dy), size, stride)) < 1e-6


@poisoned
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_conv_wgrad_matches_float64(device, monkeypatch, case, dtype, prologue):
    use_tile(monkeypatch, case)
    check(conv_wgrad, case, prologue, DTYPES[dtype], device)


@poisoned
@pytest.mark.parametrize("case", CASES)
def test_descriptors_and_pointers_agree(device, monkeypatch, case):
    arguments = operands(case, True, torch.float16, device)
    use_tile(monkeypatch, case)
    pointers = conv_wgrad(*arguments)
    use_tile(monkeypatch, case, descriptors=True)
    if jit.INTERPRETED:
        assert torch.equal(conv_wgrad(*arguments), pointers)
    else:
        check(conv_wgrad, case, True, torch.float16, device)


@poisoned
@pytest.mark.parametrize("split", [1, 2, 4, 64])
def test_any_split_sums_every_pixel_once(device, monkeypatch, split):
    """48 rows are 3 blocks of 16: split evenly, with a part that has nothing left, and into more parts than blocks."""
    tile = tiles.Tile(16, 16, 16, 4, 1, SPLIT=split)
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tile)
    check(conv_wgrad, "partial_last_tile", True, torch.float16, device)


def test_repeats_bit_for_bit(device, monkeypatch):
    use_tile(monkeypatch, "stride2")
    arguments = operands("stride2", True, torch.float16, device)
    assert torch.equal(conv_wgrad(*arguments), conv_wgrad(*arguments))


def test_nan_is_passed_on(device):
    """A NaN of x stands, by the statistics of its channel, for a channel of NaN."""
    x, dy, *rest = operands("one_image_one_tile", False, torch.float16, device)
    scale, shift = affine(16, device)
    scale[3] = shift[3] = torch.nan
    dw = conv_wgrad(x, dy, *rest[:2], scale, shift)
    assert dw[:, 3].isnan().all()
    assert not dw[:, :3].isnan().any()


def test_registration(device):
    for case, prologue in (("stride2_odd", True), ("projection_1x1", False)):
        torch.library.opcheck(conv_wgrad, operands(case, prologue, torch.float16, device))


def test_compiles_into_one_graph(device):
    arguments = operands("stride2", True, torch.float16, device)
    compiled = torch.compile(lambda *a: conv_wgrad(*a) * 2, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, conv_wgrad(*arguments) * 2)


@pytest.mark.parametrize("case", ["odd_map", "stride2_odd", "projection_1x1"])
def test_flops_are_pytorchs(device, case):
    counts = []
    for wgrad in (conv_wgrad, conv_wgrad_reference):
        with FlopCounterMode(display=False) as counter:
            wgrad(*operands(case, True, torch.float32, device))
        counts.append(counter.get_total_flops())
    n, shape = CASES[case]
    assert counts[0] == counts[1] == shape.flops(n)


def test_cost():
    """64x32x32 to 64, 512 images, fp16: 38.7 GFLOP; x and dy are 67.1 MB each, dw 147 kB."""
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    c = torch.empty(64, device="meta")
    rows = 512 * 32 * 32
    expected = Cost(2 * rows * 64 * 64 * 9, 2 * rows * 64 * 2 + 2 * 64 * 4 + 64 * 64 * 9 * 4)
    assert conv_wgrad_cost(x, x, 3, 1, c, c) == expected


X, DY, C16 = (2, 16, 4, 4), (2, 32, 4, 4), torch.ones(16)


def nhwc(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return channels_last(*shape, dtype=dtype, seed=0, device=torch.device("cpu"))


@pytest.mark.skipif(not jit.INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((nhwc(*X)[:0], nhwc(*DY)[:0], 3), ValueError, "x has shape .* non-empty", id="zero_images"),
        pytest.param((nhwc(*X).contiguous(), nhwc(*DY), 3), ValueError, "x .* channels_last", id="nchw"),
        pytest.param((nhwc(*X), nhwc(*DY).contiguous(), 3), ValueError, "dy .* channels_last", id="dy_nchw"),
        pytest.param((nhwc(*X), nhwc(*DY).float(), 3), TypeError, "dy is torch.float32, expected x's", id="dy_dtype"),
        pytest.param((nhwc(*X), nhwc(*DY), 3, 2), ValueError, r"dy has shape .* \[2, 32, 2, 2\]", id="dy_at_stride_2"),
        pytest.param((nhwc(*X), nhwc(3, 32, 4, 4), 3), ValueError, "dy has shape", id="images_differ"),
        pytest.param((nhwc(*X), nhwc(*DY), 5), ValueError, "5 pixels wide", id="filter_5x5"),
        pytest.param((nhwc(2, 8, 4, 4), nhwc(*DY), 3), ValueError, "C is 8 .* multiple of 16", id="c_of_8"),
        pytest.param((nhwc(*X), nhwc(*DY), 3, 1, C16), ValueError, "go together", id="scale_alone"),
        pytest.param((nhwc(*X), nhwc(*DY), 3, 1, C16, C16[:8]), ValueError, "shift has shape", id="shift_shape"),
    ],
)
def test_contract(arguments, error, message):
    with pytest.raises(error, match=message):
        conv_wgrad(*arguments)


def test_more_elements_than_32_bit_offsets_reach(device):
    x = torch.empty(1, 2**14, 1, 1, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"parts .* has 2415919104 elements"):
        conv_wgrad(x, x, 3)


MUTANTS = {
    "dropped_row_mask": ("in_x = (rows < N * P * Q)", "in_x = (rows >= 0)"),
    "dropped_column_mask": ("& (h < H) & (v < W)", "& (h < H)"),
    "dropped_padding_mask": ("in_dy = in_x & (p >= down)", "in_dy = in_x & (p >= down - 1)"),
    "shifted_the_wrong_way": ("(rows - down * Q - right)", "(rows + down * Q + right)"),
    "shifted_the_wrong_way_descriptors": ("p - down, -right, k0", "p + down, right, k0"),
    "parity_forgotten": ("h, v = p * STRIDE + odd_h", "h, v = p * STRIDE"),
    "parity_forgotten_descriptors": ("odd_v * C + c0", "c0"),
    "relu_forgotten": ("tl.maximum(z, 0.0,", "tl.maximum(z, -100.0,"),
    "taps_transposed": ("tap // R - PAD, tap % R - PAD", "tap % R - PAD, tap // R - PAD"),
    "last_step_forgotten": ("for step in range(steps)", "for step in range(steps - 1)"),
    "forgotten_part": ("for part in range(SPLIT)", "for part in range(SPLIT - 1)"),
    "forgotten_partial_block": (
        "blocks = triton.cdiv(x.shape[0] * shape.P * shape.Q, ",
        "blocks = (x.shape[0] * shape.P * shape.Q // ",
    ),
}


def check_mutant(op, monkeypatch, device) -> None:
    for case, descriptors in (
        ("odd_map", False),
        ("stride2_odd", False),
        ("partial_last_tile", True),
        ("stride2", True),
    ):
        use_tile(monkeypatch, case, descriptors)
        check(op, case, True, torch.float16, device)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return {name: mutant(module, folder, old, new) for name, (old, new) in MUTANTS.items()}


@pytest.fixture(scope="module")
def compiled(mutants):
    """Which mutants compile, with pointers (on sm_80) and with descriptors, both kernels."""
    builds = []
    for arch in (80, 90):
        with pytest.MonkeyPatch.context() as patch, launches() as recorded:
            patch.setattr(tiles, "gpu_of", lambda device, arch=arch: tiles.Gpu("", (arch // 10, 0)))
            for changed in mutants.values():
                c = torch.ones(64)
                changed.conv_wgrad(nhwc(8, 64, 8, 8), nhwc(8, 64, 4, 4), 3, 2, c, c)
        builds += [build.on(arch) for build in recorded]
    results = compiling(builds)
    names = [name for name in mutants for _ in range(2)] * 2
    return {name: all(r for n, r in zip(names, results, strict=True) if n == name) for name in mutants}


@poisoned
@pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(monkeypatch, mutants, compiled, name, device):
    assert compiled[name]
    assert_caught(lambda: check_mutant(mutants[name].conv_wgrad, monkeypatch, device))


def test_the_check_that_mutants_fail(monkeypatch, device):
    check_mutant(conv_wgrad, monkeypatch, device)


def test_machine_code_of_every_layer(monkeypatch, device):
    """The article's layers with the prologue, ResNet9's without; the second kernel only adds."""
    builds = []
    for arch in MATRIX_INSTRUCTION:
        monkeypatch.setattr(tiles, "gpu_of", lambda device, arch=arch: tiles.Gpu("", (arch // 10, 0)))
        for shape in dict.fromkeys(RESNET_LAYERS + RESNET9_LAYERS):
            x, _, y, c, _ = layer_operands(shape, device)
            with launches() as recorded:
                conv_wgrad(x, y, shape.R, shape.stride, *((c, c) if shape in RESNET_LAYERS else ()))
            builds += [dataclasses.replace(build, arch=arch, label=f"conv_wgrad {shape}") for build in recorded[:1]]
    for build, facts in zip(builds, compile_all(builds), strict=True):
        assert_machine_code(build, facts)
