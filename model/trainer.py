"""All that a run learns with, as one object: network, step, batches, evaluation; to and from a checkpoint."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.augment import augment
from kernels.jit import unavailable
from model.batches import Batches, gather
from model.checkpoint import load_tensors_into
from model.config import Config
from model.data import CLASSES, Dataset
from model.distributed import Ranks
from model.errors import DeviceError, NonFiniteError
from model.network import ResNet, ResNet9
from model.step import TrainingStep

EVALUATION_BATCH = 500


def implementation(config: Config) -> Any:
    """What has the three functions of `kernels.reference`, as `config.ops` and `config.conv` name it."""
    if config.ops == "triton":
        from kernels import fused

        return fused.implementation(config.conv)
    return importlib.import_module(f"kernels.{config.ops}")


def with_available_ops(config: Config, device: torch.device) -> tuple[Config, str | None]:
    """(`config`, None), or (the same on the reference ops, why) where its kernels do not run on `device`.

    That they do is seen from a step on two images: it compiles every kernel of the run for every layer.
    """
    if config.ops == "reference":
        return config, None
    reason = unavailable(device) or _failure(config, device)
    return (config, None) if reason is None else (replace(config, ops="reference", conv="table"), reason)


def _failure(config: Config, device: torch.device) -> str | None:
    """What goes wrong in forward or backward, if anything; a compiler has an exception for each of its stages."""
    x = torch.zeros(2, 3, 32, 32, dtype=choose_dtype(config.dtype, device, config.ops), device=device)
    try:
        network = build_network(config).to(device, memory_format=torch.channels_last)
        network(x.to(memory_format=torch.channels_last)).float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        return (
            f"a kernel failed with {type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        )
    return None


def triton_conv_share(config: Config, dtype: torch.dtype, device: torch.device) -> float:
    """The share of a training step's convolution FLOPs that this project's kernels run, 0..1."""
    if config.ops in ("reference", "batchnorm"):
        return 0.0
    from kernels.conv_dispatch import traced_layers, triton_share
    from kernels.tiles import gpu_of

    with torch.device("meta"):
        network, x = build_network(replace(config, ops="reference", conv="table")), torch.empty(1, 3, 32, 32)
    forced = config.ops == "composed" or config.conv == "triton"
    return triton_share(traced_layers(lambda: network(x)), dtype, gpu_of(device), forced)


def build_network(config: Config) -> nn.Module:
    """The network that `config` names, on the CPU in fp32, initialised from `config.seed` alone."""
    ops = implementation(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.network == "resnet":
            return ResNet(config.widths, ops, config.prep_bn_relu, config.uniform_gamma)
        return ResNet9(config.widths, ops, config.uniform_gamma, config.pool_first)


def modelled_step(config: Config, dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """(a step of `config` on the meta device up to its loss, the network's parameters), for `profiling.work`."""
    network = build_network(config).to("meta").to(memory_format=torch.channels_last).train()
    size = config.batch_size
    labels, index = (torch.empty(size, dtype=torch.int64, device="meta") for _ in range(2))
    images = torch.empty(size, 32, 32, 3, dtype=torch.uint8, device="meta")
    choices = torch.empty(size, 5, dtype=torch.int32, device="meta")
    mean, rstd = torch.empty(2, 3, device="meta")

    def forward() -> Tensor:
        x = augment(images, index, choices, mean, rstd, config.crop_pad, config.cutout, dtype)
        return F.cross_entropy(network(x).float(), labels, reduction="sum", label_smoothing=config.label_smoothing)

    return forward, list(network.parameters())


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`name` is auto, cpu, cuda or cuda:N. Raises DeviceError where there is no such device."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = f"cuda:{local_rank}" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device={name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device={name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and not cuda:
        raise DeviceError(f"device={name} was asked for, but torch finds no CUDA GPU here; use device=cpu or auto")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise DeviceError(
            f"device={device} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0 on"
        )
    return device


def choose_dtype(name: str, device: torch.device, ops: str = "reference") -> torch.dtype:
    """The activations' dtype. `auto`: fp16 on a GPU; on a CPU bf16 if it multiplies bf16 in hardware, else fp32.

    Raises DeviceError for fp16 on a CPU, whose convolutions are emulated, and for bf16 in Triton's interpreter, which
    computes it wrongly; there `auto` is fp32.
    """
    interpreted = device.type == "cpu" and ops != "reference"
    if interpreted and name == "bfloat16":
        raise DeviceError("dtype=bfloat16 is wrong in Triton's interpreter; use dtype=float32 or ops=reference")
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        if interpreted:
            return torch.float32
        return (
            torch.bfloat16
            if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            else torch.float32
        )
    if name == "float16" and device.type == "cpu":
        raise DeviceError("dtype=float16 has no fast convolutions on a CPU; use dtype=bfloat16, float32 or auto")
    return getattr(torch, name)


class Evaluation(NamedTuple):
    """The test images seen through the network: mean loss, share classified right, and the same for each class."""

    loss: float
    accuracy: float
    class_accuracy: dict[str, float]


class Trainer:
    """A run's state on its device. `step.number` says where it is; everything random follows from that and the seed."""

    def __init__(self, batches: Batches, dataset: Dataset, ranks: Ranks):
        self.config, self.device, self.dtype = batches.config, batches.device, batches.dtype
        self.batches, self.ranks = batches, ranks
        self.network = build_network(self.config).to(self.device, memory_format=torch.channels_last)
        self.step = TrainingStep(self.network, self.config, batches.steps_per_epoch, ranks.sum_gradients)
        shard = torch.arange(len(dataset.test_images)).tensor_split(ranks.world)[ranks.rank]
        self.test_count = len(dataset.test_images)
        self.test_images = dataset.test_images[shard].to(self.device)
        self.test_labels = dataset.test_labels[shard].to(self.device)
        self.epoch_steps = batches.steps_per_epoch

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds. Under several ranks the running statistics are averaged first."""
        self.ranks.average_running_statistics(self.network)
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        sums = self.step.tensors()
        if self.ranks.world > 1:  # the sums of all ranks are kept by the first
            for name in ("sums.loss", "sums.correct"):
                sums[name] = self.ranks.sum(sums[name].clone())
        return {**tensors, **sums}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from a checkpoint's tensors. Raises CheckpointError where they do not fit this network."""
        load_tensors_into(self.network.state_dict(), tensors, "network.")
        rest = self.step.tensors()
        load_tensors_into(rest, {k: v for k, v in tensors.items() if not k.startswith("network.")}, "")
        if not self.ranks.is_first:
            self.step.start_epoch()
        self.step.number = step

    def train(self, epoch: int) -> Iterator[int]:
        """Steps of `epoch` (from 0) that are still to be done; yields the number of images after each."""
        first = self.step.number - epoch * self.epoch_steps
        if first == 0:
            self.step.start_epoch()
        self.network.train()
        for i, (x, labels) in enumerate(self.batches.epoch(epoch, first), start=first):
            self.step(x, labels)
            yield min(self.config.batch_size, self.batches.count - i * self.config.batch_size)

    def epoch_result(self) -> tuple[float, float]:
        """(mean loss, accuracy) over this epoch's training images, as they were seen. Waits for the device."""
        loss, correct = self.ranks.sum(torch.stack([self.step.loss_sum.double(), self.step.correct.double()])).tolist()
        return loss / self.batches.count, correct / self.batches.count

    def images_seen(self) -> int:
        """Training images so far, over all epochs and ranks."""
        epochs, steps = divmod(self.step.number, self.epoch_steps)
        return epochs * self.batches.count + steps * self.config.batch_size

    def so_far(self) -> str:
        """Loss and accuracy of this epoch up to here, of this rank. Waits for the device."""
        seen = max(self.images_seen() % self.batches.count or self.batches.count, 1) / self.ranks.world
        return f"loss {float(self.step.loss_sum) / seen:.3f}, accuracy {int(self.step.correct) / seen:.1%}"

    def check_finite(self) -> None:
        """Wait for the device; raise NonFiniteError, with step, seed and learning rate, for a gradient not finite."""
        bad = int(self.step.bad_step)
        if bad >= 0:
            rate = self.step.learning_rate(bad)
            raise NonFiniteError(
                f"the gradient at step {bad} (epoch {(bad - 1) // self.epoch_steps + 1}) was not finite, with seed "
                f"{self.config.seed} and learning rate {rate:.4g}; no update was made from that step on, and the last "
                "checkpoint is from before it. Lower lr_values or try another seed"
            )

    @torch.inference_mode()
    def evaluate(self, on_batch: Any = lambda: None) -> Evaluation:
        """Loss and accuracy on the test images, by the running statistics; `on_batch()` is called after each batch."""
        self.ranks.average_running_statistics(self.network)
        self.network.eval()
        unchanged = torch.zeros(len(self.test_images), 5, dtype=torch.int32, device=self.device)
        # Rows: images of a class, how many of them are right; and the summed loss.
        counts = torch.zeros(2, len(CLASSES), dtype=torch.int64, device=self.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in torch.arange(len(self.test_images), device=self.device).split(EVALUATION_BATCH):
            x = gather(self.test_images, index, unchanged, 0, 0, self.dtype)
            labels = self.test_labels[index]
            logits = self.network(x).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            counts[0] += torch.bincount(labels, minlength=len(CLASSES))
            counts[1] += torch.bincount(labels[logits.argmax(1) == labels], minlength=len(CLASSES))
            on_batch()
        images, right = self.ranks.sum(counts).tolist()
        return Evaluation(
            loss=self.ranks.sum(loss_sum).item() / self.test_count,
            accuracy=sum(right) / self.test_count,
            class_accuracy={name: r / n for name, r, n in zip(CLASSES, right, images, strict=True) if n},
        )

    def warm_up(self) -> None:
        """Run a step of each shape and a batch of evaluation, so that no later one pays for compiling or searching.

        Weights, statistics, momentum, sums and the step's number are those of before, bit for bit.
        """
        state = {**self.network.state_dict(), **self.step.tensors()}
        kept, number = {name: t.clone() for name, t in state.items()}, self.step.number
        # Ranks may take very different times to compile, and must not wait for each other here.
        sum_gradients, self.step.sum_gradients = self.step.sum_gradients, lambda parameters: None
        self.network.train()
        for n in self.batches.shapes():
            x = torch.zeros(n, 3, 32, 32, dtype=self.dtype, device=self.device)
            self.step(x.to(memory_format=torch.channels_last), torch.zeros(n, dtype=torch.int64, device=self.device))
        self.network.eval()
        x = torch.zeros(min(EVALUATION_BATCH, len(self.test_images)), 3, 32, 32, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            self.network(x.to(memory_format=torch.channels_last))
        self.step.sum_gradients, self.step.number = sum_gradients, number
        self.step.bad_step.fill_(-1)
        with torch.no_grad():
            for name, t in state.items():
                t.copy_(kept[name])
