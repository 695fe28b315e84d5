"""One training step: forward, loss, backward, update.

Loss is summed over the batch, so a learning rate is the schedule's value divided by the batch size and the weight decay
is multiplied by it: a larger batch then only delays updates, to first order (the article, Part 2).
"""

import bisect
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Config


def piecewise_linear(x: float, knots: Sequence[float], values: Sequence[float]) -> float:
    """Linear interpolation; two knots at the same place are a jump, whose later value holds from there on."""
    i = bisect.bisect_right(knots, x)
    if i == 0 or i == len(knots):
        return values[max(i - 1, 0)]
    (x0, x1), (y0, y1) = knots[i - 1 : i + 1], values[i - 1 : i + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class TrainingStep:
    """Steps of Nesterov SGD on `network`, with sums that stay on the device until somebody reads them.

    `sum_gradients(parameters)` is called between backward and update: `Ranks.sum_gradients` where there are several.

    number     steps done so far
    loss_sum   fp32 [], summed loss of the images of this epoch (of this rank)
    correct    int64 [], how many of them were classified right
    bad_step   int64 [], the first step whose gradient was not finite, or -1. From that step on updates are masked on
               the device: the weights stay the last good ones, and nobody waits for a read.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        steps_per_epoch: int,
        sum_gradients: Callable[[Sequence[Tensor]], None] = lambda parameters: None,
    ):
        self.network, self.sum_gradients = network, sum_gradients
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.parameters = list(network.parameters())
        device = self.parameters[0].device
        self.number = 0
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.optimiser = torch.optim.SGD(
            self.parameters,
            lr=0.0,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay * config.batch_size,
            fused=True,
        )
        if config.momentum:
            for p in self.parameters:
                self.optimiser.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def learning_rate(self, number: int) -> float:
        """The schedule after `number` steps. The article takes it at the end of a step, so that the first one moves."""
        return piecewise_linear(number / self.steps_per_epoch, self.config.lr_epochs, self.config.lr_values)

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        """Train on x [b, 3, 32, 32], labels [b]. b = 0 (a rank with nothing left) only takes part in the summing."""
        if len(x):
            logits = self.network(x).float()
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.config.label_smoothing)
            self.correct += (logits.detach().argmax(1) == labels).sum()
            loss.backward()
            self.loss_sum += loss.detach()
        else:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
        self.sum_gradients(self.parameters)
        self.number += 1
        self._update()

    def _update(self) -> None:
        largest = torch.nn.utils.get_total_norm([p.grad for p in self.parameters], norm_type=float("inf"))
        self.bad_step.copy_(torch.where((self.bad_step < 0) & ~largest.isfinite(), self.number, self.bad_step))
        # The fused optimiser skips its update where this is 1; it is how torch's own loss scaler tells it to.
        self.optimiser.found_inf = (self.bad_step >= 0).float()
        self.optimiser.param_groups[0]["lr"] = self.learning_rate(self.number) / self.config.batch_size
        self.optimiser.step()
        self.optimiser.zero_grad()

    def start_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self.loss_sum.zero_()
        self.correct.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Momentum buffers and the running sums: with the network's own tensors, all a checkpoint needs."""
        names = {p: name for name, p in self.network.named_parameters()}
        buffers = {f"momentum.{names[p]}": s["momentum_buffer"] for p, s in self.optimiser.state.items()}
        return {**buffers, "sums.loss": self.loss_sum, "sums.correct": self.correct}
