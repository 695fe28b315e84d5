"""The augmentation kernel is its reference, bit for bit."""

import dataclasses

import pytest
import torch
from ahead_of_time import compile_all, launches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_caught, mutant

pytest.importorskip("triton")

from kernels import augment as module
from kernels import jit
from kernels.augment import augment, augment_cost, augment_reference
from kernels.cost import Cost

pytestmark = pytest.mark.usefixtures("poisoned_memory")
interpreted = pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")


def problem(seed: int, n: int, batch: int, height: int, width: int, pad: int, cutout: int, device="cpu") -> tuple:
    """Arguments of `augment` up to the dtype, drawn from all that is legal; a function of the seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    highs = (2 * pad + 1, 2 * pad + 1, 2, height - cutout + 1, width - cutout + 1)
    choices = torch.stack([draw(high, n) for high in highs], dim=1).int()
    images = draw(256, n, height, width, 3).to(torch.uint8)
    mean, rstd = torch.rand(3, generator=generator) * 255, 1 / (1 + 64 * torch.rand(3, generator=generator))
    tensors = [t.to(device) for t in (images, draw(n, batch), choices, mean, rstd)]
    return (*tensors, pad, cutout)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def check(under_test, seed: int = 0) -> None:
    for n, batch, height, width, pad, cutout in ((6, 5, 5, 7, 3, 2), (3, 2, 32, 32, 4, 8), (2, 3, 4, 4, 0, 0)):
        arguments = problem(seed, n, batch, height, width, pad, cutout)
        ours = under_test.augment(*arguments, torch.float16)
        assert torch.equal(bits(ours), bits(augment_reference(*arguments, torch.float16)))


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    batch=st.integers(1, 4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    padding=st.floats(0, 1),
    square=st.floats(0, 1),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bit_equal_to_the_reference(device, seed, n, batch, height, width, padding, square, dtype):
    smaller = min(height, width)
    arguments = problem(seed, n, batch, height, width, int(padding * (smaller - 1)), int(square * smaller), device)
    ours, reference = augment(*arguments, dtype), augment_reference(*arguments, dtype)
    assert ours.stride() == reference.stride()
    assert torch.equal(bits(ours), bits(reference))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_cifar_images(device, dtype):
    arguments = problem(1, 7, 9, 32, 32, 4, 8, device)
    assert torch.equal(bits(augment(*arguments, dtype)), bits(augment_reference(*arguments, dtype)))


def test_flip_is_its_own_inverse_and_cutout_covers_its_square(device):
    images, index, choices, mean, rstd, _, _ = problem(2, 4, 4, 8, 8, 0, 3, device)
    choices[:, 2] = 0
    plain = augment(images, index, choices, mean, rstd, 0, 0, torch.float32)
    choices[:, 2] = 1
    flipped = augment(images, index, choices, mean, rstd, 0, 0, torch.float32)
    assert torch.equal(flipped.flip(3), plain)
    assert not torch.equal(flipped, plain)
    cut = augment(images, index, choices, mean, rstd, 0, 3, torch.float32)
    assert (cut != flipped).sum() == 4 * 3 * 3 * 3
    assert (cut == 0).sum() == 4 * 3 * 3 * 3


@pytest.mark.parametrize(
    ("column", "value"), [(None, 5), (None, -1), (0, 9), (0, -1), (1, 9), (1, -1)], ids=lambda v: str(v)
)
def test_out_of_range_values_come_out_as_nan(device, column, value):
    """They are on the device, so they cannot raise; they must not read a neighbour's pixels either."""
    images, index, choices, mean, rstd, pad, cutout = problem(3, 5, 4, 8, 8, 4, 0, device)
    index[:] = torch.arange(4)
    if column is None:
        index[1] = value
    else:
        choices[1, column] = value
    out = augment(images, index, choices, mean, rstd, pad, cutout, torch.float16)
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]].isnan().any()


def replaced(position: int, change, device) -> list:
    arguments = [*list(problem(4, 5, 4, 8, 8, 2, 2, device)), torch.float16]
    arguments[position] = change(arguments[position])
    return arguments


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        pytest.param(0, lambda x: x.float(), TypeError, "images is torch.float32", id="images_dtype"),
        pytest.param(0, lambda x: x.permute(0, 3, 1, 2), ValueError, "images has strides", id="nchw"),
        pytest.param(0, lambda x: x[..., :2].contiguous(), ValueError, "N, H, W, 3", id="channels"),
        pytest.param(1, lambda x: x.int(), TypeError, "index is torch.int32", id="index_dtype"),
        pytest.param(1, lambda x: x[None], ValueError, r"expected \[B\]", id="index_shape"),
        pytest.param(2, lambda x: x[:3], ValueError, "choices has shape", id="choices_rows"),
        pytest.param(2, lambda x: x.long(), TypeError, "choices is torch.int64", id="choices_dtype"),
        pytest.param(3, lambda x: x.double(), TypeError, "mean is torch.float64", id="mean_dtype"),
        pytest.param(4, lambda x: x[:2], ValueError, "rstd has shape", id="rstd_shape"),
        pytest.param(5, lambda _: 8, ValueError, "pad 8", id="pad_too_wide"),
        pytest.param(6, lambda _: 9, ValueError, "cutout 9", id="cutout_too_wide"),
        pytest.param(7, lambda _: torch.int8, TypeError, "dtype is torch.int8", id="output_dtype"),
    ],
)
def test_contract(device, position, change, error, message):
    arguments = replaced(position, change, device)
    with pytest.raises(error, match=message):
        augment(*arguments)


@pytest.mark.parametrize("op", [augment, augment_reference])
def test_a_batch_may_be_empty(device, op):
    """Several ranks share the last batch of an epoch, and there may not be an image for each."""
    out = op(*replaced(1, lambda index: index[:0], device))
    assert out.shape == (0, 3, 8, 8)
    assert out.dtype == torch.float16


def test_registration(device):
    torch.library.opcheck(augment, (*problem(5, 3, 2, 5, 7, 1, 2, device), torch.float16))


def test_compiles_into_one_graph(device):
    arguments = problem(6, 3, 2, 5, 7, 1, 2, device)
    compiled = torch.compile(lambda *a: augment(*a, torch.float16) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), augment_reference(*arguments, torch.float16) * 2)


def test_cost():
    """3072 elements for each of 512 images, a byte read and two written; 8 bytes of index and 20 of choices."""
    cost = augment_cost(*problem(7, 600, 512, 32, 32, 4, 8), torch.float16)
    assert cost == Cost(flops=2 * 512 * 3072, bytes=512 * (3072 + 6144 + 8 + 20) + 24)


MUTANTS = {
    "dropped_mask_on_store": (", mask=mask)\n\n\n@torch", ")\n\n\n@torch"),
    "dropped_mask_on_load": ("mask=readable", "mask=legal"),
    "swapped_flip": ("tl.where(flip != 0, W - 1 - w, w)", "tl.where(flip == 0, W - 1 - w, w)"),
    "flip_after_the_crop": (
        "_reflect_index(tl.where(flip != 0, W - 1 - w, w) + dx - PAD, W)",
        "_reflect_index(tl.where(flip != 0, W - 1 - (w + dx - PAD), w + dx - PAD), W)",
    ),
    "crop_off_by_one": ("_reflect_index(h + dy - PAD, H)", "_reflect_index(h + dy - PAD + 1, H)"),
    "edge_repeated": ("2 * (SIZE - 1) - i, i)", "2 * (SIZE - 1) - i + 1, i)"),
    "rows_for_columns": ("choices_ptr + image * 5 + 1)", "choices_ptr + image * 5 + 0)"),
    "cutout_too_wide": ("(w < cut_x + CUTOUT)", "(w <= cut_x + CUTOUT)"),
    "cutout_forgotten": ("tl.where(inside, 0.0, out)", "out"),
    "channels_mixed": ("c, h, w = offs % 3,", "c, h, w = 2 - offs % 3,"),
    "wrong_image": ("image * (H * W * 3) + ((", "b * (H * W * 3) + (("),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return {name: mutant(module, folder, old, new) for name, (old, new) in MUTANTS.items()}


@pytest.fixture(scope="module")
def compiled(mutants):
    """Facts of the kernel for every dtype and architecture, then of every mutant, which need only compile."""
    arguments = problem(8, 3, 2, 32, 32, 4, 8)
    with launches() as ours:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            augment(*arguments, dtype)
    with launches() as theirs:
        for changed in mutants.values():
            changed.augment(*arguments, torch.float16)
    builds = [build.on(arch) for build in ours for arch in (80, 90, 100)]
    facts = compile_all(builds + [dataclasses.replace(build, inspect=False) for build in theirs])
    return facts[: len(builds)], dict(zip(mutants, facts[len(builds) :], strict=True))


def test_machine_code(compiled):
    for fact in compiled[0]:
        assert not fact.error, fact
        assert not fact.notes, fact
        assert fact.spill_bytes == fact.local_bytes == 0, fact
        assert fact.count("STG", ".128") == fact.count("STG") > 0, "the batch is written 16 bytes at a time"
        assert fact.registers <= 64, fact


@interpreted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(mutants, compiled, name):
    assert not compiled[1][name].error, "the mutant compiles"
    assert_caught(lambda: check(mutants[name]))


@interpreted
def test_the_check_that_mutants_fail():
    check(module)
