"""Batches of training images: the article's input pipelines, and the one that replaces them.

`preprocess` and `draw` say what is really done, and where (the rungs of the article differ in nothing else):

every_epoch, per_image    each image, every epoch, in loader workers: draw, pad, crop, flip, normalise, transpose
once, per_image           pad, normalise, transpose the whole set once; then draw, crop and flip image by image
once, per_epoch           the same, with all of an epoch's choices drawn at once
on_device                 uint8 images live on the device; `augment` of the run's ops makes a batch of them

All of them give the same batches, bit for bit: choices and order are functions of (seed, epoch, image index).
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset, Sampler

from model.config import Config
from model.data.choices import Augmentation, draw_choices, draw_order
from model.data.cifar10 import MEAN, STD
from model.errors import WorkerError
from model.implementation import implementation
from model.memory import free_shared_bytes

PREFETCHED = 2
"""Batches that each worker makes in advance: DataLoader's default."""


def normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """(mean, rstd), fp32 [3], in units of 0 to 255, for `kernels.augment`."""
    return torch.tensor(MEAN, device=device), 1 / torch.tensor(STD, device=device)


class Part(NamedTuple):
    """A rank's images of a global batch that lies on the device: `size` of them, from its image `start` on."""

    start: int
    size: int


class Batches:
    """An epoch of (x, labels) at a time: x [b, 3, 32, 32] channels_last in `dtype`, labels int64 [b], both on `device`.

    A global batch of `config.batch_size` images is split over `world` ranks; the last batch of an epoch is short, and a
    rank's part of it may be empty. There are no more workers than processors, and than find room for their batches in
    shared memory, of which `warn` tells.

    Of images on the device, the epoch's order and choices lie there too, in tensors that never move, and so does the
    number of the next batch. `epoch` then yields nothing but which part of a batch is this rank's: one or two different
    ones in a whole run; `load` reads the rest.

    order     int64 [steps of an epoch + 1, batch_size], the images of each batch; the end is of no meaning, and is
              there so that `position` may stand after the last batch
    choices   int32 [images, 5], see `draw_choices`
    position  int64 [1], the batch of the epoch that `load` makes next
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        rank: int = 0,
        world: int = 1,
        warn: Callable[[str], Any] = warnings.warn,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.rank, self.world = rank, world
        self.augmentation = Augmentation(config.crop_pad, config.flip, config.cutout)
        self.count = len(images)
        self.steps_per_epoch = -(-self.count // config.batch_size)
        self.labels = labels.to(device)
        self.on_device = config.preprocess == "on_device"
        if self.on_device:
            self.images = images.to(device)
            self.augment, self.normalisation = implementation(config).augment, normalisation(device)
            self.order = torch.zeros(self.steps_per_epoch + 1, config.batch_size, dtype=torch.int64, device=device)
            self.choices = torch.zeros(self.count, 5, dtype=torch.int32, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            return
        Samples = RawImages if config.preprocess == "every_epoch" else PreparedImages
        workers = min(config.workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        if workers:
            dtype_made = torch.float32 if Samples is RawImages else dtype
            workers = _affordable(workers, self._part(0).size * 3 * 32 * 32 * dtype_made.itemsize, world, warn)
        self.sampler = _EpochSampler()
        self.loader = DataLoader(
            Samples(images, config, self.augmentation, dtype),
            batch_sampler=self.sampler,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            # A fork has the images without a copy; elsewhere than on Linux it is not safe.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_parent,
        )

    def kinds(self) -> list[tuple]:
        """One batch of every kind that `epoch` yields, the usual kind first; its images are of no meaning."""
        parts = list(dict.fromkeys(self._part(i) for i in (0, self.steps_per_epoch - 1)))
        if self.on_device:
            return [(part,) for part in parts]
        x = torch.zeros(parts[0].size, 3, 32, 32, dtype=self.dtype, device=self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        return [(x[: part.size], torch.zeros_like(self.labels[: part.size])) for part in parts]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple]:
        """The batches of `epoch` (counted from 0) from `first_step` on, as operands of `load`, each to be loaded once.

        They are (x, labels), or (Part,) where the images are on the device. Raises WorkerError if a worker is gone.
        """
        order = draw_order(self.config.seed, epoch, self.count, self.device if self.on_device else "cpu")
        parts = [self._part(i) for i in range(first_step, self.steps_per_epoch)]
        if self.on_device:
            self.order.view(-1)[: self.count].copy_(order)
            self.choices.copy_(draw_choices(self.augmentation, self.config.seed, epoch, self.count, self.device))
            self.position.fill_(first_step)
            yield from ((part,) for part in parts)
            return
        batches = order.split(self.config.batch_size)[first_step:]
        indices = [batch[p.start : p.start + p.size] for batch, p in zip(batches, parts, strict=True)]
        self.sampler.batches = [(epoch * self.count + index).tolist() for index in indices]
        for index, x in zip(indices, _from_workers(self.loader), strict=True):
            x = x.to(self.device, non_blocking=True).to(self.dtype, memory_format=torch.channels_last)
            yield x, self.labels[index.to(self.device)]

    def load(self, part_or_x: Part | Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, labels) of a batch as `epoch` yields it; of a part, those of the batch at `position`, which moves on."""
        if not isinstance(part_or_x, Part):
            return part_or_x, labels
        with record_function("augmentation"):  # what a profiler calls it, whichever ops do it
            row = self.order.index_select(0, self.position)[0]
            index = row[part_or_x.start : part_or_x.start + part_or_x.size]
            self.position += 1
            pad, cutout = self.config.crop_pad, self.config.cutout
            x = self.augment(self.images, index, self.choices, *self.normalisation, pad, cutout, self.dtype)
            return x, self.labels[index]

    def state(self) -> list[Tensor]:
        """The tensors that `load` changes."""
        return [self.position] if self.on_device else []

    def _part(self, step: int) -> Part:
        """This rank's part of the epoch's batch `step`, as `Tensor.tensor_split` has it."""
        size = min(self.config.batch_size, self.count - step * self.config.batch_size)
        each, more = divmod(size, self.world)
        return Part(self.rank * each + min(self.rank, more), each + (self.rank < more))


class _EpochSampler(Sampler):
    """Lists of keys, one a batch; a key is epoch * images + image, so that workers know both."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Samples(Dataset):
    def __init__(self, images: Tensor, config: Config, augmentation: Augmentation, dtype: torch.dtype):
        self.config, self.augmentation, self.dtype = config, augmentation, dtype
        self.count = len(images)
        self.drawn = (-1, [])  # an epoch and its choices

    def choose(self, key: int) -> tuple[int, tuple]:
        """The image and its choices."""
        epoch, image = divmod(key, self.count)
        seed = self.config.seed
        if self.config.draw == "per_image":
            return image, self.augmentation.choose(seed, epoch, image)
        if self.drawn[0] != epoch:
            self.drawn = epoch, draw_choices(self.augmentation, seed, epoch, self.count).tolist()
        return image, self.drawn[1][image]


class RawImages(_Samples):
    """From uint8 pixels to a normalised fp32 [3, 32, 32] image, every time it is asked for."""

    def __init__(self, images: Tensor, config: Config, augmentation: Augmentation, dtype: torch.dtype):
        super().__init__(images, config, augmentation, dtype)
        self.images = images
        self.mean, self.rstd = normalisation(torch.device("cpu"))

    def __getitem__(self, key: int) -> Tensor:
        image, (dy, dx, flip, cut_y, cut_x) = self.choose(key)
        pad, cut = self.config.crop_pad, self.config.cutout
        x = F.pad(self.images[image].permute(2, 0, 1).float(), (pad, pad, pad, pad), mode="reflect")
        x = x[:, dy : dy + 32, dx : dx + 32]
        if flip:
            x = x.flip(-1)
        x = ((x.permute(1, 2, 0) - self.mean) * self.rstd).permute(2, 0, 1).contiguous()
        if cut:
            x[:, cut_y : cut_y + cut, cut_x : cut_x + cut] = 0
        return x


class PreparedImages(_Samples):
    """Padded, normalised and transposed when constructed: [N, 3, 32 + 2*pad, 32 + 2*pad] in the network's dtype."""

    def __init__(self, images: Tensor, config: Config, augmentation: Augmentation, dtype: torch.dtype):
        super().__init__(images, config, augmentation, dtype)
        pad = config.crop_pad
        mean, rstd = normalisation(torch.device("cpu"))
        self.padded = torch.empty(len(images), 3, 32 + 2 * pad, 32 + 2 * pad, dtype=dtype)
        for few, out in zip(images.split(1000), self.padded.split(1000), strict=True):
            x = ((few.float() - mean) * rstd).permute(0, 3, 1, 2)
            out.copy_(F.pad(x, (pad, pad, pad, pad), mode="reflect"))

    def __getitem__(self, key: int) -> Tensor:
        image, (dy, dx, flip, cut_y, cut_x) = self.choose(key)
        x = self.padded[image, :, dy : dy + 32, dx : dx + 32]
        if flip:
            x = x.flip(-1)
        cut = self.config.cutout
        if cut:
            x = x.clone()
            x[:, cut_y : cut_y + cut, cut_x : cut_x + cut] = 0
        return x


def _affordable(workers: int, batch_bytes: int, ranks: int, warn: Callable[[str], Any]) -> int:
    """The number of workers whose batches made in advance, beside those of all ranks, fit into /dev/shm."""
    free = free_shared_bytes()
    if free is None:
        return workers
    batches = free // max(ranks * batch_bytes, 1) - 1  # less the one that is being trained on
    fitting = min(max(batches // PREFETCHED, 0), workers)
    if fitting < workers:
        needed = ranks * batch_bytes * (PREFETCHED * workers + 1)
        warn(
            f"/dev/shm has {free / 1e6:,.1f} MB free and {workers} workers need {needed / 1e6:,.1f} MB there for "
            f"their batches: {f'{fitting} of them work' if fitting else 'this process makes them itself'}. Enlarge it "
            "(docker run --shm-size=1g), or --set preprocess=on_device --set workers=0"
        )
    return fitting


def _from_workers(loader: DataLoader) -> Iterator[Tensor]:
    """The loader's batches; raises WorkerError for a worker that is gone, here and nowhere else."""
    child = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = child and signal.getsignal(child)
    try:
        batches = iter(loader)
        if child and signal.getsignal(child) is not before:
            # torch's own handler raises wherever the run happens to be: in the midst of a step, or of writing its
            # summary. Without it, torch looks after its workers whenever it has waited for some seconds.
            signal.signal(child, before)
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        raise WorkerError(
            f"a process that makes batches has ended: {str(error).splitlines()[0].strip(' .')}. Unless somebody ended "
            "it, this machine is short of memory: go on with --resume auto and fewer workers, such as --set workers=0"
        ) from error


def _collate(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples) if samples else torch.empty(0, 3, 32, 32)


def _leave_signals_to_parent(_: int) -> None:
    # Ctrl-C and torchrun's SIGTERM go to the whole process group. The parent then finishes its step, with the batches
    # it is waiting for, and saves; where a worker is gone, torch raises in the midst of that. Outside the group, a
    # worker ends when its parent ends it, or a few seconds after its parent is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
