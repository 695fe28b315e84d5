"""The error of a kernel's result against float64, and the error that is allowed."""

import math

import torch
from torch import Tensor


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth||, L2, in float64; of a truth of zeros, ||x||; infinity for an x that is not finite."""
    truth = truth.double()
    error, norm = (x.double() - truth).norm().item(), truth.norm().item()
    return error / (norm or 1.0) if math.isfinite(error) else math.inf


def allowed_error(baseline_error: float, dtype: torch.dtype, units: int = 4) -> float:
    """Twice the error of PyTorch's own result; `units` of rounding of `dtype` where PyTorch happens to be exact."""
    return max(2 * baseline_error, units * torch.finfo(dtype).eps)
