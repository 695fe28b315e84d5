"""The augmentation kernel is its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from checks.augment import bits, problem

from kernels import jit
from kernels.augment import augment, augment_cost, augment_reference
from kernels.cost import Cost

interpreted = pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")


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
