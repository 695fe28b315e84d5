"""All that a run learns with, as one object: network, step, batches, evaluation; to and from a checkpoint."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from kernels.contract import dtype_name as dtype_name
from model import capture, verdict
from model.checkpoint import load_tensors_into, require_tensors
from model.compilation import compile_kernels
from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset
from model.distributed import Ranks
from model.errors import DeviceError, NonFiniteError
from model.evaluation import Evaluation, Evaluator
from model.implementation import implementation
from model.network import ResNet, ResNet9
from model.step import TrainingStep


def with_available_ops(
    config: Config,
    device: torch.device,
    say: Callable[[str], Any] = lambda text: None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> tuple[Config, str | None]:
    """(`config`, None), or (the same on the reference ops, why) where its kernels do not run on `device` or are wrong.

    See `model.verdict`; every one of the `ranks` is told the same.
    """
    if config.ops == "reference":
        return config, None
    reason = verdict.refusal(config, device, choose_dtype(config.dtype, device, config.ops), ranks, say)
    return (config, None) if reason is None else (replace(config, ops="reference", conv="table"), reason)


def triton_conv_share(config: Config, dtype: torch.dtype, device: torch.device) -> float:
    """The share of a training step's convolution FLOPs that this project's kernels run, 0..1."""
    if config.ops in ("reference", "batchnorm"):
        return 0.0
    from kernels.conv_dispatch import traced_layers, triton_share
    from kernels.tiles import gpu_of

    with torch.device("meta"):
        network, x = build_network(replace(config, ops="reference", conv="table")), torch.empty(1, 3, 32, 32)
    forced = config.ops == "composed" or config.conv == "ours"
    return triton_share(traced_layers(lambda: network(x)), dtype, gpu_of(device), forced)


def build_network(config: Config) -> nn.Module:
    """The network that `config` names, on the CPU in fp32, initialised from `config.seed` alone."""
    ops = implementation(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.network == "resnet":
            return ResNet(config.widths, ops, config.prep_bn_relu, config.uniform_gamma)
        return ResNet9(config.widths, ops, config.uniform_gamma, config.pool_first)


def require_network(config: Config, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless a checkpoint's `tensors` are of the network that `config` names, which is not built.

    A checkpoint that claims a network of any size costs no memory then.
    """
    with torch.device("meta"):
        network = build_network(replace(config, ops="reference", conv="table"))
    require_tensors(network.state_dict(), tensors, "network.")


def modelled_step(
    config: Config, dtype: torch.dtype, device: str = "meta"
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """(a step of `config` up to its loss, its update), for `profiling.account.work`; they compute nothing of use.

    Augmentation is part of it where the images are on the device. On another device than meta the kernels' ops run, so
    that their launches can be recorded.
    """
    ops = implementation(config)
    network = build_network(config).to(device).to(memory_format=torch.channels_last).train()
    size = config.batch_size
    labels, index = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
    images = torch.empty(size, 32, 32, 3, dtype=torch.uint8, device=device)
    choices = torch.zeros(size, 5, dtype=torch.int32, device=device)
    mean, rstd = torch.empty(2, 3, device=device)
    parameters = sum(p.numel() for p in network.parameters())
    w, dw, v = (torch.zeros(parameters, device=device) for _ in range(3))
    copy = None if dtype == torch.float32 else torch.empty(parameters, dtype=dtype, device=device)
    rates = torch.zeros(1, device=device)

    def forward() -> Tensor:
        if config.preprocess == "on_device":
            with record_function("augmentation"):  # as `Batches.load` has it
                x = ops.augment(images, index, choices, mean, rstd, config.crop_pad, config.cutout, dtype)
        else:
            x = torch.empty(size, 3, 32, 32, dtype=dtype, device=device, memory_format=torch.channels_last)
        return F.cross_entropy(network(x).float(), labels, reduction="sum", label_smoothing=config.label_smoothing)

    def update() -> None:
        velocity = v if config.momentum else None
        ops.sgd(w, dw, velocity, copy, rates, index[:1], labels[:1], config.momentum, config.weight_decay)

    return forward, update


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


def search_convolutions(device: torch.device) -> None:
    """Let cuDNN time its algorithms at the first convolution of each shape, as tuning does, and not go by a guess.

    The fastest differs from run to run, and so do the last bits; whoever needs them equal turns it off again.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


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


def step_mode(config: Config, device: torch.device) -> str:
    """The requested mode, "eager", "compiled" or "captured"; auto is captured on a GPU and eager elsewhere."""
    if config.step != "auto":
        return config.step
    return "captured" if device.type == "cuda" else "eager"


class Trainer:
    """A run's state on its device. `step.number` says where it is; everything random follows from that and the seed."""

    def __init__(self, batches: Batches, dataset: Dataset, ranks: Ranks):
        self.config, self.device, self.dtype = batches.config, batches.device, batches.dtype
        self.batches, self.ranks = batches, ranks
        self.network = build_network(self.config).to(self.device, memory_format=torch.channels_last)
        self.step = TrainingStep(
            self.network, self.config, batches.steps_per_epoch, ranks.sum, batches.load, batches.state, self.dtype
        )
        shard = torch.arange(len(dataset.test_images)).tensor_split(ranks.world)[ranks.rank]
        self.test_count = len(dataset.test_images)
        self.evaluator = Evaluator(
            self.network,
            dataset.test_images[shard].to(self.device),
            dataset.test_labels[shard].to(self.device),
            self.dtype,
            implementation(self.config).augment,
        )
        self.epoch_steps = batches.steps_per_epoch
        self.step_requested = step_mode(self.config, self.device)
        self.step_mode = "eager"  # until `warm_up`

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint. Under several ranks the running statistics are averaged first.

        Waits for the device; raises NonFiniteError where one is not finite, as running statistics can become while
        every gradient is.
        """
        self.ranks.average_running_statistics(self.network)
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        sums = self.step.tensors()
        if self.ranks.world > 1:  # the sums of all ranks are kept by the first
            for name in ("sums.loss", "sums.correct"):
                sums[name] = self.ranks.sum(sums[name].clone())
        tensors |= sums
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
        if not all(finite):
            name = list(tensors)[finite.index(False)]
            raise self._not_finite(f"{name} was not finite after step {self.step.number}")
        return tensors

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from a checkpoint's tensors. Raises CheckpointError where they do not fit this network."""
        load_tensors_into(self.network.state_dict(), tensors, "network.")
        rest = self.step.tensors()
        load_tensors_into(rest, {k: v for k, v in tensors.items() if not k.startswith("network.")}, "")
        if not self.ranks.is_first:
            self.step.start_epoch()
        self.step.go_to(step)

    def train(self, epoch: int) -> Iterator[int]:
        """Steps of `epoch` (from 0) that are still to be done; yields the number of images after each."""
        first = self.step.number - epoch * self.epoch_steps
        if first == 0:
            self.step.start_epoch()
        self.network.train()
        for i, batch in enumerate(self.batches.epoch(epoch, first), start=first):
            self.step(*batch)
            yield min(self.config.batch_size, self.batches.count - i * self.config.batch_size)

    def epoch_result(self) -> tuple[float, float]:
        """(mean loss, accuracy) over this epoch's training images, as they were seen. Waits for the device."""
        loss, correct = self.ranks.sum(torch.stack([self.step.loss_sum.double(), self.step.correct.double()])).tolist()
        return loss / self.batches.count, correct / self.batches.count

    def recorded_bytes(self) -> int:
        """Memory of a step's or an evaluation's recording, whichever needs more; 0 where nothing is recorded."""
        recorder = self.step.program.recorder
        return recorder.held_bytes if recorder else 0

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
            raise self._not_finite(
                f"the gradient at step {bad} (epoch {(bad - 1) // self.epoch_steps + 1}) was not finite, with learning "
                f"rate {rate:.4g}; no update was made from that step on"
            )

    def check_loss(self, name: str, loss: float) -> None:
        """Raise NonFiniteError where the mean `loss` of the epoch that has ended, "training" or "test", is not finite.

        The test loss can be so while every gradient is finite: it is by the running statistics.
        """
        if not math.isfinite(loss):
            step = self.step.number
            raise self._not_finite(f"the {name} loss after step {step} (epoch {step // self.epoch_steps}) is {loss}")

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{what}. The seed is {self.config.seed}, and every checkpoint is from before that. Lower lr_values or try "
            "another seed"
        )

    def evaluate(self, on_batch: Callable[[], Any] = lambda: None) -> Evaluation:
        """Loss and accuracy on the test images, by the running statistics; `on_batch()` is called after each batch."""
        self.ranks.average_running_statistics(self.network)
        return Evaluation.of(self.ranks.sum(self.evaluator(on_batch)))

    def warm_up(self, say: Callable[[str], Any] = lambda text: None) -> str | None:
        """Compile, search and record for every kind of batch, so that none of a run pays for it; `say` tells of each.

        From then on steps run as `config.step` asks. Where that fails they run eagerly, and why is returned, in a line.
        Weights, statistics, momentum, sums and numbers are those of before, bit for bit, and so are random numbers.
        """
        reason = None
        try:
            if self.device.type == "cuda" and self.config.ops != "reference":
                say("warm-up: compiling the kernels that are not in Triton's cache")
                compile_kernels(lambda: self._prepare(lambda text: None, "eager"), self.device)
            if self.step_requested == "captured":
                self._capture()
            elif self.step_requested == "compiled":
                self.step.compile()
            self._prepare(say, self.step_requested)
            self.step_mode = self.step_requested
        except Exception as error:  # a compiler and a driver have an exception for everything
            if self.step_requested == "eager":
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.step.disable_capture()
            self.evaluator.program.disable_capture()
        if reason:  # outside of the handler, whose exception holds the failed step's memory
            self._prepare(say, "eager")
        return reason

    def _capture(self) -> None:
        if not self.ranks.capturable:
            raise RuntimeError("a sum over ranks by gloo happens on the host; only NCCL's is part of a CUDA graph")
        recorder = capture.recorder(self.device)
        self.step.program.recorder = self.evaluator.program.recorder = recorder

    def _prepare(self, say: Callable[[str], Any], mode: str) -> None:
        self.network.train()
        for batch in self.batches.kinds():
            size = batch[0].size if self.batches.on_device else len(batch[0])
            say(f"warm-up: a training step of {size} images ({mode})")
            self.step.program.prepare(*batch)
        self.evaluator.start()
        for size in dict.fromkeys(self.evaluator.sizes()):
            say(f"warm-up: evaluation of {size} images")
            self.evaluator.program.prepare(size)
