"""One training step: augmentation, forward, loss, backward, update; as it is, compiled, or captured in a CUDA graph.

Loss is summed over the batch, so a learning rate is the schedule's value divided by the batch size and the weight decay
is multiplied by it: a larger batch then only delays updates, to first order (the article, Part 2).

Nothing that changes from step to step is a Python number: the step's number, the learning rate, the batch of the epoch
and its choices are read from device memory, which never moves, and are advanced there.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from model.capture import Program
from model.config import Config
from model.implementation import implementation
from model.optimiser import SGD
from model.schedule import learning_rate, rate_table

COMPILER = "inductor"
"""torch.compile's backend."""


class TrainingStep:
    """Steps of Nesterov SGD on `network`, with sums that stay on the device until somebody reads them.

    A step takes a batch: (x [b, 3, 32, 32] in `dtype`, labels [b]), or what `load` makes these of; `load_state()` are
    the tensors that it changes. b = 0 (a rank with nothing left) only takes part in the summing.
    `sum_gradient(gradient)`, in place and fp32 [N], is called between backward and update: `Ranks.sum` where there are
    several.

    number     steps done so far, as the host counts them
    loss_sum   fp32 [], summed loss of the images of this epoch (of this rank)
    correct    int64 [], how many of them were classified right
    bad_step   int64 [1], the first step whose gradient was not finite, or -1. From that step on updates are masked on
               the device: the weights stay the last good ones, and nobody waits for a read.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        steps_per_epoch: int,
        sum_gradient: Callable[[Tensor], Any] = lambda gradient: None,
        load: Callable[..., tuple[Tensor, Tensor]] = lambda x, labels: (x, labels),
        load_state: Callable[[], list[Tensor]] = list,
        dtype: torch.dtype = torch.float32,
    ):
        self.network, self.sum_gradient, self.load, self.load_state = network, sum_gradient, load, load_state
        self.config, self.steps_per_epoch = config, steps_per_epoch
        device = next(network.parameters()).device
        self.number = 0
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        rates = rate_table(config, steps_per_epoch).to(device)
        decay = config.weight_decay * config.batch_size
        self.optimiser = SGD(network, rates, config.momentum, decay, dtype, implementation(config).sgd)
        self.copies = self.optimiser.copies
        self.bad_step = self.optimiser.bad_step
        self.program = Program(self._step, self.state, rehearsal=self._step_alone)

    def compile(self) -> None:
        """Let torch.compile make one graph of forward and loss, and one of their backward, for each size of batch."""
        self.copies = {}  # a compiler traces gradients in the operands' dtype, and fuses casts with what is around them
        self._loss = torch.compile(self._loss, fullgraph=True, dynamic=False, backend=COMPILER)

    def disable_capture(self) -> None:
        """Neither compile nor record any more."""
        self.__dict__.pop("_loss", None)
        self.copies = self.optimiser.copies
        self.program.disable_capture()

    @contextlib.contextmanager
    def eagerly(self) -> Iterator[None]:
        """Steps within are not replayed: what a profiler needs to learn which operation launches which kernel."""
        recorder, self.program.recorder = self.program.recorder, None
        try:
            yield
        finally:
            self.program.recorder = recorder

    def __call__(self, *batch: Any) -> None:
        """Train on a batch."""
        self.program(*batch)
        self.number += 1

    def _step(self, *batch: Any) -> None:
        self._gradient(*batch)
        self.sum_gradient(self.optimiser.gradient)
        self.optimiser.step()

    def _step_alone(self, *batch: Any) -> None:
        """To rehearse: ranks may take very different times to compile, and must not wait for each other here."""
        self._gradient(*batch)
        self.optimiser.step()

    def _gradient(self, *batch: Any) -> None:
        x, labels = self.load(*batch)
        if len(x):
            weights = [self.copies.get(name, p) for name, p in self.network.named_parameters()]
            gradients = torch.autograd.grad(self._loss(x, labels), weights)
            torch._foreach_copy_(self.optimiser.gradients, gradients)
        else:
            self.optimiser.gradient.zero_()

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = (functional_call(self.network, self.copies, x) if self.copies else self.network(x)).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.config.label_smoothing)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.loss_sum += loss.detach()
        return loss

    def learning_rate(self, number: int) -> float:
        """The schedule after `number` steps."""
        return learning_rate(self.config, self.steps_per_epoch, number)

    def go_to(self, number: int) -> None:
        """Continue after `number` steps, on the host and on the device."""
        self.number = number
        self.optimiser.number.fill_(number)
        self.optimiser.refresh()

    def start_epoch(self) -> None:
        """Forget the sums of the epoch before, and see weights that somebody else may have set since."""
        self.optimiser.refresh()
        self.loss_sum.zero_()
        self.correct.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Momentum buffers and the running sums: with the network's own tensors, all a checkpoint needs."""
        names = [name for name, _ in self.network.named_parameters()]
        momentum = {f"momentum.{names[i]}": v for i, v in enumerate(self.optimiser.velocities)}
        return {**momentum, "sums.loss": self.loss_sum, "sums.correct": self.correct}

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes, none twice."""
        optimiser = [*self.optimiser.buffers(), self.loss_sum, self.correct]
        return [*optimiser, *self.network.buffers(), *self.load_state()]
