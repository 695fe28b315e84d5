"""The test images seen through a network, a batch at a time, with counts that stay on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.capture import Program
from model.data.batches import normalisation
from model.data.cifar10 import CLASSES

EVALUATION_BATCH = 500


class Evaluation(NamedTuple):
    """The test images seen through the network: mean loss, share classified right, and the same for each class."""

    loss: float
    accuracy: float
    class_accuracy: dict[str, float]

    @staticmethod
    def of(sums: Tensor) -> "Evaluation":
        """From an Evaluator's sums, over all ranks. Waits for the device."""
        loss, *counts = sums.tolist()
        images, right = counts[: len(CLASSES)], counts[len(CLASSES) :]
        shares = {name: r / n for name, r, n in zip(CLASSES, right, images, strict=True) if n}
        return Evaluation(loss / sum(images), sum(right) / sum(images), shares)


class Evaluator:
    """`images` uint8 [N, 32, 32, 3] with `labels` int64 [N], both on the device, through `network` in `dtype`.

    `augment`, an implementation's, only gathers and normalises them.

    sums      float64 [1 + 2 * classes]: the summed loss, images of each class, and how many of those are right
    position  int64 [1], the first image of the next batch
    """

    def __init__(
        self, network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype, augment: Callable[..., Tensor]
    ):
        self.network, self.images, self.labels, self.dtype, self.augment = network, images, labels, dtype, augment
        device = images.device
        self.normalisation = normalisation(device)
        self.sums = torch.zeros(1 + 2 * len(CLASSES), dtype=torch.float64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.unchanged = torch.zeros(len(images), 5, dtype=torch.int32, device=device)
        self.offsets = torch.arange(min(EVALUATION_BATCH, len(images)), device=device)
        self.classes = torch.arange(len(CLASSES), device=device)
        self.program = Program(self._batch, self.state)

    def sizes(self) -> list[int]:
        """The batches' sizes, in their order."""
        full, rest = divmod(len(self.images), EVALUATION_BATCH)
        return [EVALUATION_BATCH] * full + ([rest] if rest else [])

    def __call__(self, on_batch: Callable[[], Any]) -> Tensor:
        """The sums over all images; `on_batch()` is called after each batch. Nothing waits for the device."""
        self.start()
        for size in self.sizes():
            self.program(size)
            on_batch()
        return self.sums

    def start(self) -> None:
        """Go to the first image."""
        self.network.eval()
        self.sums.zero_()
        self.position.zero_()

    @torch.inference_mode()
    def _batch(self, size: int) -> None:
        index = self.position + self.offsets[:size]
        x = self.augment(self.images, index, self.unchanged, *self.normalisation, 0, 0, self.dtype)
        labels = self.labels[index]
        logits = self.network(x).float()
        of_class = labels[:, None] == self.classes
        right = of_class & (logits.argmax(1) == labels)[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum").view(1)
        self.sums += torch.cat([loss, of_class.sum(0), right.sum(0)])
        self.position += size

    def state(self) -> list[Tensor]:
        """Every tensor that a batch changes."""
        return [self.sums, self.position]
