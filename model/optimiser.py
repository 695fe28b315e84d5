"""The optimiser of all parameters as one tensor: one launch updates them, one transfer sums them over ranks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.sgd import sgd_reference

ALIGNMENT = 32  # elements, so that every parameter begins on a cache line of 128 bytes


class SGD:
    """Nesterov SGD on `network`, whose parameters and gradients become views of two buffers; names and layouts stay.

    `rates` are the learning rates after each number of steps (see `kernels.sgd`), on the parameters' device, where the
    numbers of steps are counted too: a step needs nothing from the host. `sgd` is an implementation's.

    With a 16-bit `dtype` every weight of a convolution or a matrix product has a copy in it, which the update writes in
    the same pass: `copies`, by the parameter's name, for `torch.func.functional_call`. They are leaves whose gradients
    are fp32, as the master's would be.

    weights, gradient, velocity  fp32 [N], with the parameters one after another; no velocity without momentum
    number    int64 [1], steps done
    bad_step  int64 [1], the first step whose gradient was not finite, or -1; from it on the weights stay
    """

    def __init__(
        self,
        network: nn.Module,
        rates: Tensor,
        momentum: float,
        decay: float,
        dtype: torch.dtype = torch.float32,
        sgd: Callable[..., None] = sgd_reference,
    ):
        self.rates, self.momentum, self.decay, self.sgd = rates, momentum, decay, sgd
        self.parameters = list(network.parameters())
        device = self.parameters[0].device
        offsets, size = [], 0
        for p in self.parameters:
            offsets.append(size)
            size += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        self.weights, self.gradient, velocity = (torch.zeros(size, device=device) for _ in range(3))
        self.velocity = velocity if momentum else None
        self.copy = None if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        self.velocities: list[Tensor] = []
        self.copies: dict[str, Tensor] = {}
        for (name, p), offset in zip(network.named_parameters(), offsets, strict=True):
            place = p.shape, p.stride(), offset  # parameters are dense, in whatever layout
            w = self.weights.as_strided(*place).copy_(p.detach())
            p.data, p.grad = w, self.gradient.as_strided(*place)
            if momentum:
                self.velocities.append(velocity.as_strided(*place))
            if self.copy is not None and p.dim() > 1:
                leaf = self.copy.as_strided(*place).detach().requires_grad_()
                leaf.grad_dtype = torch.float32
                self.copies[name] = leaf
        self.gradients = [p.grad for p in self.parameters]
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.bad_step = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.refresh()

    def step(self) -> None:
        """Count a step, and move the weights by `gradient` unless it, or one before it, is not finite."""
        self.number += 1
        self.sgd(
            self.weights,
            self.gradient,
            self.velocity,
            self.copy,
            self.rates,
            self.number,
            self.bad_step,
            self.momentum,
            self.decay,
        )

    def refresh(self) -> None:
        """Make the copies those of the weights, after somebody else has set these."""
        if self.copy is not None:
            self.copy.copy_(self.weights)

    def buffers(self) -> list[Tensor]:
        """The tensors that change from step to step."""
        buffers = [self.weights, self.gradient, self.velocity, self.copy, self.number, self.bad_step]
        return [b for b in buffers if b is not None]
