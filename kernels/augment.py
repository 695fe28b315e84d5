"""Augmentation: gather, reflect-padded crop, flip, normalise, cutout.

    out[b,:,h,w] = (images[index[b], y, x, :] - mean) * rstd      y = reflect(h + dy - pad), x = reflect(w' + dx - pad)
                                                                  w' = W-1-w if flip else w
    out[b,:,h,w] = 0                                              inside the square of `cutout` pixels at (cut_y, cut_x)

images      uint8 [N, H, W, 3], the whole dataset
index       int64 [B], which images, each in 0..N-1; B may be 0
choices     int32 [N, 5], one row (dy, dx, flip, cut_y, cut_x) per image of the dataset; dy, dx in 0..2*pad
mean, rstd  fp32 [3], in units of 0..255
out         `dtype` [B, 3, H, W], channels_last

Choices are data and application is pure: the same choices give the same batch on any device, in any batch, on any
number of ranks. The subtraction and the product are each rounded once in fp32 (there is no a*b+c that a compiler could
fuse), so every implementation agrees bit for bit. One kernel, one pass: B*H*W*3 bytes are read and as many elements
written.
"""

import torch
from torch import Tensor

from kernels.contract import ACTIVATION_DTYPES, check_device, check_fp32
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH, tl, triton, wait_for_the_kernel_before

BLOCK = 1024  # elements of one image: a third of 32x32x3, 16 bytes of fp16 for each thread of four warps


def augment_reference(
    images: Tensor,
    index: Tensor,
    choices: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pad: int,
    cutout: int,
    dtype: torch.dtype,
) -> Tensor:
    """The formula above in PyTorch; `pad=0, cutout=0` with choices of zero only gathers and normalises."""
    height, width, channels = images.shape[1:]
    dy, dx, flip, cut_y, cut_x = choices[index].long().unsqueeze(-1).unbind(1)  # each [B, 1]
    h, w = (torch.arange(size, device=images.device) for size in (height, width))
    y = _reflect(h + dy - pad, height)  # [B, H]
    x = _reflect(torch.where(flip.bool(), width - 1 - w, w) + dx - pad, width)  # [B, W]
    source = (index[:, None] * height + y)[:, :, None] * width + x[:, None, :]  # [B, H, W]
    out = (images.view(-1, channels)[source].float() - mean) * rstd
    if cutout:
        cut_rows, cut_columns = (h >= cut_y) & (h < cut_y + cutout), (w >= cut_x) & (w < cut_x + cutout)
        out.masked_fill_((cut_rows[:, :, None] & cut_columns[:, None, :])[..., None], 0.0)
    return out.to(dtype).permute(0, 3, 1, 2)


def _reflect(i: Tensor, size: int) -> Tensor:
    """Reflect -size < i < 2*size - 1 into 0..size-1 without repeating the edge, as `F.pad(mode="reflect")` does."""
    i = i.abs()
    return torch.where(i >= size, 2 * (size - 1) - i, i)


@triton.jit
def _reflect_index(i, SIZE: tl.constexpr):
    i = tl.abs(i)
    return tl.where(i >= SIZE, 2 * (SIZE - 1) - i, i)


@triton.jit(do_not_specialize=["N"])  # one build for every data set
def augment_kernel(
    images_ptr,
    index_ptr,
    choices_ptr,
    mean_ptr,
    rstd_ptr,
    out_ptr,
    N,
    H: tl.constexpr,
    W: tl.constexpr,
    PAD: tl.constexpr,
    CUTOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK consecutive elements (h, w, c) of one image."""
    wait_for_the_kernel_before()
    b = tl.program_id(0).to(tl.int64)
    image = tl.load(index_ptr + b)
    legal = (image >= 0) & (image < N)
    image = tl.where(legal, image, 0)
    dy = tl.load(choices_ptr + image * 5)
    dx = tl.load(choices_ptr + image * 5 + 1)
    flip = tl.load(choices_ptr + image * 5 + 2)
    legal = legal & (dy >= 0) & (dy <= 2 * PAD) & (dx >= 0) & (dx <= 2 * PAD)

    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H * W * 3
    c, h, w = offs % 3, offs // (3 * W), (offs // 3) % W
    y = _reflect_index(h + dy - PAD, H)
    x = _reflect_index(tl.where(flip != 0, W - 1 - w, w) + dx - PAD, W)
    readable = tl.where(legal, mask, False)
    pixel = tl.load(images_ptr + image * (H * W * 3) + ((y * W + x) * 3 + c), mask=readable, other=0)

    # Three scalars and two selects: a gather would cost two more loads for each element.
    mean0, mean1, mean2 = tl.load(mean_ptr), tl.load(mean_ptr + 1), tl.load(mean_ptr + 2)
    rstd0, rstd1, rstd2 = tl.load(rstd_ptr), tl.load(rstd_ptr + 1), tl.load(rstd_ptr + 2)
    mean = tl.where(c == 0, mean0, tl.where(c == 1, mean1, mean2))
    rstd = tl.where(c == 0, rstd0, tl.where(c == 1, rstd1, rstd2))
    out = (pixel.to(tl.float32) - mean) * rstd
    if CUTOUT > 0:
        cut_y, cut_x = tl.load(choices_ptr + image * 5 + 3), tl.load(choices_ptr + image * 5 + 4)
        inside = (h >= cut_y) & (h < cut_y + CUTOUT) & (w >= cut_x) & (w < cut_x + CUTOUT)
        out = tl.where(inside, 0.0, out)
    # An index or an offset out of range must not read other memory, and must not pass unseen.
    out = tl.where(legal, out, float("nan"))
    tl.store(out_ptr + b * (H * W * 3) + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("cifar::augment", mutates_args=())
def augment(
    images: Tensor,
    index: Tensor,
    choices: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pad: int,
    cutout: int,
    dtype: torch.dtype,
) -> Tensor:
    """`augment_reference` as one kernel, bit-equal to it.

    The values of `index` and `choices` stay on the device: an image whose index, dy or dx is out of range comes out as
    NaN. Raises ValueError or TypeError for shapes, dtypes, devices and layouts other than the module's, and unless
    0 <= pad < min(H, W) and 0 <= cutout <= min(H, W).
    """
    _check(images, index, choices, mean, rstd, pad, cutout, dtype)
    (n, height, width, _), out = images.shape, _empty_batch(images, index, dtype)
    if index.numel() == 0:
        return out
    grid = (index.numel(), triton.cdiv(height * width * 3, BLOCK))
    augment_kernel[grid](
        images,
        index,
        choices,
        mean,
        rstd,
        out,
        n,
        H=height,
        W=width,
        PAD=pad,
        CUTOUT=cutout,
        BLOCK=BLOCK,
        num_warps=4,
        **LAUNCH,
    )
    return out


@augment.register_fake
def _(images, index, choices, mean, rstd, pad, cutout, dtype):
    return _empty_batch(images, index, dtype)


def _empty_batch(images: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (index.shape[0], 3, images.shape[1], images.shape[2])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def _check(images, index, choices, mean, rstd, pad, cutout, dtype) -> None:
    wanted = (("images", images, torch.uint8), ("index", index, torch.int64), ("choices", choices, torch.int32))
    for name, x, expected in wanted:
        if x.dtype != expected:
            raise TypeError(f"{name} is {x.dtype}, expected {expected}")
        if x.device != images.device:
            raise ValueError(f"{name} is on {x.device}, expected images' device {images.device}")
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()} for shape {list(x.shape)}, expected contiguous")
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype is {dtype}, expected one of {', '.join(map(str, ACTIVATION_DTYPES))}")
    if images.dim() != 4 or images.shape[3] != 3 or images.numel() == 0:
        raise ValueError(f"images has shape {list(images.shape)}, expected a non-empty [N, H, W, 3]")
    if index.dim() != 1:
        raise ValueError(f"index has shape {list(index.shape)}, expected [B]")
    if tuple(choices.shape) != (images.shape[0], 5):
        raise ValueError(
            f"choices has shape {list(choices.shape)}, expected [{images.shape[0]}, 5]: a row for each image"
        )
    check_fp32("mean", mean, (3,), "images", images)
    check_fp32("rstd", rstd, (3,), "images", images)
    smaller = min(images.shape[1:3])
    if not 0 <= pad < smaller or not 0 <= cutout <= smaller:
        raise ValueError(f"pad {pad} and cutout {cutout} do not fit images of {list(images.shape[1:3])} pixels")
    check_device("images", images)


def augment_cost(
    images: Tensor,
    index: Tensor,
    choices: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pad: int,
    cutout: int,
    dtype: torch.dtype,
) -> Cost:
    """A subtraction and a product for each element; the chosen images and choices read once, the batch written once."""
    elements, batch = index.numel() * images[0].numel(), index.numel()
    read = elements + nbytes(index, mean, rstd) + batch * nbytes(choices[0])
    return Cost(flops=2 * elements, bytes=read + elements * dtype.itemsize)
