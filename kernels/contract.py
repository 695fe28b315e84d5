"""The contract at an op's door, checked once so that kernels take no strides and no surprises.

Every check raises ValueError or TypeError in one line: what was wrong, what was expected.
"""

import torch
from torch import Tensor

from kernels.jit import unavailable

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def check_device(name: str, x: Tensor) -> None:
    """Raise ValueError unless the kernels can run where `x` is."""
    reason = unavailable(x.device)
    if reason is not None:
        raise ValueError(f"the kernels cannot run on {name}'s device {x.device}: {reason}; use the reference ops")


def check_activation(name: str, x: Tensor) -> None:
    """Raise unless `x` is a non-empty [N, C, H, W] activation, channels_last in memory, where the kernels can run."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, ACTIVATION_DTYPES))}")
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected a non-empty [N, C, H, W]")
    if x.numel() // x.shape[1] >= 2**30:  # kernels count pixels in int32, up to a tile past the last
        raise ValueError(f"{name} has {x.numel() // x.shape[1]} pixels, expected fewer than 2**30")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} has strides {x.stride()} for shape {list(x.shape)}, expected channels_last: "
            f"use {name}.contiguous(memory_format=torch.channels_last)"
        )
    check_device(name, x)


def check_like(name: str, x: Tensor, like_name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless `x` is an activation of `shape` with the dtype and the device of `like`."""
    check_activation(name, x)
    if x.dtype != like.dtype:
        raise TypeError(f"{name} is {x.dtype}, expected {like_name}'s {like.dtype}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")
    _check_same_device(name, x, like_name, like)


def check_fp32(name: str, x: Tensor, shape: tuple[int | None, ...], like_name: str, like: Tensor) -> None:
    """Raise unless `x` is contiguous fp32 of `shape` (None: any positive extent), on the device of `like`."""
    if x.dtype != torch.float32:
        raise TypeError(f"{name} is {x.dtype}, expected torch.float32")
    fits = x.dim() == len(shape) and all(
        have == want or (want is None and have > 0) for have, want in zip(x.shape, shape, strict=True)
    )
    if not fits or not x.is_contiguous():
        expected = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(
            f"{name} has shape {list(x.shape)} and strides {x.stride()}, expected a contiguous [{expected}] "
            f"to go with {like_name}"
        )
    _check_same_device(name, x, like_name, like)


def _check_same_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like_name}'s device {like.device}")
