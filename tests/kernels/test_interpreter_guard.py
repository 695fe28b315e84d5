"""The guard catches what it is for: planted accesses outside a tensor, and stores that collide."""

import pytest
import torch

pytest.importorskip("triton")

from interpreter_guard import is_out_of_bounds
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import jit
from kernels.jit import tl, triton

pytestmark = pytest.mark.skipif(not jit.INTERPRETED, reason="kernels are compiled here, not interpreted")


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, first, step, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if MASKED:
        offs += tl.program_id(0) * step
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)
    else:
        tl.store(y_ptr + tl.program_id(0) * step + offs, tl.load(x_ptr + first + offs))


@triton.jit
def descriptor_kernel(x_desc, y_desc, row, column):
    y_desc.store([0, 0], x_desc.load([row, column]))


def raised_by_guard(launch, *args) -> bool:
    try:
        launch(*args)
    except Exception as error:
        return is_out_of_bounds(error)
    return False


def copies(x: torch.Tensor, y: torch.Tensor, first: int = 0, n: int = 0, step: int = 64, programs: int = 1) -> bool:
    """Whether the guard lets programs copy 64 elements each, from `first` on; with `n` masked from there on."""
    return not raised_by_guard(copy_kernel[(programs,)], x, y, n, first, step, 64, n > 0)


def test_a_masked_kernel_passes():
    x, y = torch.arange(100.0), torch.zeros(100)
    assert copies(x, y, n=100, programs=2)
    assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8, torch.int64], ids=str)
def test_unmasked_accesses_outside(dtype):
    short, long = torch.zeros(60, dtype=dtype), torch.zeros(128, dtype=dtype)
    assert copies(long, long.clone())
    assert not copies(short, long), "load past the end"
    assert not copies(long, short), "store past the end"
    assert not copies(long, long.clone(), first=-1), "load before the start"


def test_a_view_ends_where_the_view_ends():
    """Rows 0 and 1 of a [4, 64] tensor: the storage goes on, the argument does not."""
    x, y = torch.zeros(4, 64), torch.zeros(4, 64)
    assert not copies(x[:2], y, n=192, programs=3)
    assert copies(x, y, n=192, programs=3)


def test_an_address_that_falls_into_another_argument():
    """One buffer holds both: the memory is legal, the tensor that the address was computed from is another."""
    buffer = torch.zeros(128)
    assert not copies(buffer[:64], buffer[64:], first=64)
    assert not copies(buffer[64:], buffer[:64], first=-64)


def test_two_programs_that_store_the_same_element():
    x, y = torch.zeros(64), torch.zeros(256)
    assert copies(x, y, programs=4)
    assert not copies(x, y, step=63, programs=4), "programs overlap by one"


def test_descriptors_clip_and_are_checked():
    x, y = torch.ones(8, 16), torch.full((4, 16), torch.nan)
    block = [4, 16]
    whole, out = TensorDescriptor(x, [8, 16], [16, 1], block), TensorDescriptor(y, [4, 16], [16, 1], block)
    descriptor_kernel[(1,)](whole, out, -2, 0)  # rows -2 and -1 read as zeros
    assert y[:2].eq(0).all()
    assert y[2:].eq(1).all()
    too_long = TensorDescriptor(x, [9, 16], [16, 1], block)
    assert not raised_by_guard(descriptor_kernel[(1,)], too_long, out, 4, 0)
    assert raised_by_guard(descriptor_kernel[(1,)], too_long, out, 5, 0), "row 8 does not exist"
