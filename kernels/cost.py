"""The least work that an op must do: the numerator of every roofline."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Arithmetic operations, and compulsory traffic with device memory: a tensor moves once in a pass over it."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements; None counts nothing, so that optional operands need no case of their own."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
