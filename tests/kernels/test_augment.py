"""The augmentation kernel is its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from checks.augment import bits, problem

from kernels.augment import augment, augment_reference


def same(*arguments) -> None:
    ours, reference = augment(*arguments), augment_reference(*arguments)
    assert ours.stride() == reference.stride()
    assert torch.equal(bits(ours), bits(reference))


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
    same(*problem(seed, n, batch, height, width, int(padding * (smaller - 1)), int(square * smaller), device), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_cifar_images(device, dtype):
    same(*problem(1, 7, 9, 32, 32, 4, 8, device), dtype)


def test_flip_is_its_own_inverse_and_cutout_covers_its_square(device):
    images, index, choices, mean, rstd, _, _ = problem(2, 4, 4, 8, 8, 0, 3, device)
    choices[:, 2] = 0
    plain = augment(images, index, choices, mean, rstd, 0, 0, torch.float32)
    choices[:, 2] = 1
    flipped = augment(images, index, choices, mean, rstd, 0, 0, torch.float32)
    assert torch.equal(flipped.flip(3), plain)
    assert not torch.equal(flipped, plain)
    cut = augment(images, index, choices, mean, rstd, 0, 3, torch.float32)
    assert (cut != flipped).sum() == (cut == 0).sum() == 4 * 3 * 3 * 3


@pytest.mark.parametrize(("column", "value"), [(None, 5), (None, -1), (0, 9), (0, -1), (1, 9), (1, -1)], ids=str)
def test_values_out_of_range_come_out_as_nan(device, column, value):
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


@pytest.mark.parametrize("op", [augment, augment_reference])
def test_a_batch_may_be_empty(device, op):
    """Several ranks share the last batch of an epoch, and there may not be an image for each."""
    images, index, *rest = problem(4, 5, 4, 8, 8, 2, 2, device)
    out = op(images, index[:0], *rest, torch.float16)
    assert out.shape == (0, 3, 8, 8)
    assert out.dtype == torch.float16
