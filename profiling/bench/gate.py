"""No speed without correctness: whether a provider's result is right, which is asked before anything is timed."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from profiling.bench.case import Case, OperandFactory, tensors


class Correctness:
    """Whether a result of a case is right: float64's by the library, and `baseline`, PyTorch's in the same dtype."""

    def __init__(self, case: Case, operands: tuple, dtype: torch.dtype):
        wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, operands)
        wide = tuple(torch.float64 if isinstance(x, torch.dtype) else x for x in wide)
        self.truth, self.baseline, self.dtype = tensors(case.call(case.library, wide)()), None, dtype

    def refusal(self, result: Any) -> str | None:
        """What is wrong with it, None if nothing."""
        return disagreement(tensors(result), self.baseline, self.truth, self.dtype)

    def library_refusal(self, result: Any) -> str | None:
        """The same of a result by PyTorch, which is as accurate as it is."""
        return disagreement(tensors(result), None, self.truth, self.dtype)


def verified(case: Case, device: torch.device, dtype: torch.dtype, batch: int, judge: torch.device) -> str | None:
    """What is wrong with our kernels' result for `case` on `device`, None if nothing.

    All else is computed on `judge`: with a few images on the CPU, so that a program which watches the device sees our
    kernels alone; where that takes minutes, on the device itself.
    """
    operands = case.operands(OperandFactory(batch, judge, dtype))
    gate = Correctness(case, operands, dtype)
    gate.baseline = tensors(case.call(case.library, operands)())
    result = case.ours(*tree_map_only(Tensor, lambda x: x.to(device), operands))
    return gate.refusal(case.comparable(tree_map_only(Tensor, lambda x: x.to(judge), result)))


def disagreement(
    result: list[Tensor], baseline: list[Tensor] | None, truth: list[Tensor], dtype: torch.dtype
) -> str | None:
    """What is wrong with `result`, None if nothing.

    Its relative L2 error against float64 may be twice that of `baseline`, PyTorch's result from the same operands, or
    four units of rounding of its own dtype. Without a baseline it must have half of the digits of `dtype`.
    """
    if [x.shape for x in result] != [x.shape for x in truth]:
        return f"shapes {[list(x.shape) for x in result]}, expected {[list(x.shape) for x in truth]}"
    for i, (x, exact) in enumerate(zip(result, truth, strict=True)):
        error, allowed = _relative_error(x, exact), torch.finfo(dtype).eps ** 0.5
        if baseline is not None:
            allowed = max(2 * _relative_error(baseline[i], exact), 4 * torch.finfo(x.dtype).eps)
        if not error <= allowed:  # False for NaN
            return f"output {i} is off by {error:.2g} against float64, {allowed:.2g} allowed"
    return None


def _relative_error(x: Tensor, truth: Tensor) -> float:
    norm = truth.norm().item()
    return (x.double() - truth).norm().item() / (norm or 1.0)
