"""Training within an experiment: on a part of the images, at any schedule, without a folder, and free to blow up."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import train
from model import checkpoint
from model.config import Config
from model.data.batches import Batches
from model.data.choices import draw_order
from model.data.cifar10 import Dataset
from model.distributed import Ranks
from model.errors import NonFiniteError
from model.presets import article_297, fused, laptop
from model.trainer import Trainer, choose_dtype, with_available_ops

if TYPE_CHECKING:
    from experiments.study.folder import Request
    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

BATCH = 128
"""The article's first batch size; its rate is the experiments' base rate."""
SMALL_S = 480.0
"""Seconds that `--small` plans with, of its ten minutes."""


def open_session(request: "Request", terminal: "Terminal", interrupts: "Interrupts") -> train.Session:
    """The session of this command line: its data and device."""
    device = request.configure(laptop()).device
    return train.open_session(terminal, interrupts, device, request.data_dir, synthetic=request.synthetic)


def recipe(request: "Request", session: train.Session) -> Config:
    """The recipe of train.py on this device, at the article's first batch size; on a CPU or `small`, the preset laptop.

    The article's network takes the article's own rate at that batch, laptop its rate scaled linearly.
    """
    if session.device.type == "cuda" and not request.small:
        start = dataclasses.replace(fused(), batch_size=BATCH, lr_values=article_297().lr_values)
    else:
        start = at_batch(laptop(), BATCH)
    return runnable(request.configure(start), session)


def identity(config: Config) -> dict[str, Any]:
    """The settings of `config` that decide what is learned, as settings of a study, which names a difference."""
    return {f"recipe {name}": value for name, value in config.learned().items()}


def runnable(config: Config, session: train.Session) -> Config:
    """`config` with its images on the device, and on the reference ops, with a warning, where its own cannot run."""
    config = dataclasses.replace(config, preprocess="on_device", draw="per_epoch", workers=0)
    config, reason = with_available_ops(config, session.device, session.terminal.say)
    if reason:
        session.terminal.warn(f"the kernels cannot run here ({reason}): reference ops")
    return config


def at_batch(config: Config, batch: int, factor: float = 1.0) -> Config:
    """`config` at another batch size, its learning rates scaled linearly, and by `factor`."""
    scale = factor * batch / config.batch_size
    return dataclasses.replace(config, batch_size=batch, lr_values=tuple(v * scale for v in config.lr_values))


def at_constant_rate(config: Config, rate: float, epochs: int, ramp: int = 0) -> Config:
    """`config` for `epochs` epochs at `rate`, the first `ramp` of which rise to it from 0."""
    knots, values = ((0, ramp, epochs), (0, rate, rate)) if ramp else ((0, epochs), (rate, rate))
    return dataclasses.replace(config, epochs=epochs, lr_epochs=knots, lr_values=values)


def subset(dataset: Dataset, images: int) -> Dataset:
    """The first `images` training images in one random order, so that a smaller set is a part of every larger one."""
    chosen = draw_order(0, 0, len(dataset.train_images))[:images]
    return dataclasses.replace(
        dataset, train_images=dataset.train_images[chosen], train_labels=dataset.train_labels[chosen]
    )


def train_whole(session: train.Session, config: Config, folder: Path, **options: Any) -> dict[str, Any]:
    """The summary of a run of train.py in `folder`, which goes on from its newest checkpoint.

    A run whose gradient is not finite is a result too: its summary has no accuracy and no loss.
    """
    found = checkpoint.newest(folder, session.terminal.warn) if folder.exists() else None
    try:
        return train.run(session, config, folder, found, **options)
    except NonFiniteError as error:
        session.interrupts.deferred = False  # the run has put signals off until its summary was written
        return {**error.summary, "test_accuracy": None, "test_loss": None, "train_loss": None}


def prepare(session: train.Session, config: Config, dataset: Dataset) -> Trainer:
    """A trainer of `config` on `dataset` in this process alone, warmed up where its step is not an eager one."""
    dtype = choose_dtype(config.dtype, session.device, config.ops)
    batches = Batches(dataset.train_images, dataset.train_labels, config, session.device, dtype)
    trainer = Trainer(batches, dataset, Ranks())
    if trainer.step_requested != "eager":
        reason = trainer.warm_up()
        if reason:
            session.terminal.warn(f"the training step runs eagerly, not {trainer.step_requested}: {reason}")
    return trainer


def steps(trainer: Trainer, epoch: int) -> Iterator[int]:
    """`trainer.train(epoch)`, ended early by a gradient that is not finite where looking at it is free, on a CPU."""
    for images in trainer.train(epoch):
        yield images
        if trainer.device.type == "cpu" and bad_step(trainer) is not None:
            return


def bad_step(trainer: Trainer) -> int | None:
    """The first step, counted from 1, whose gradient was not finite. Waits for the device."""
    number = int(trainer.step.bad_step)
    return number if number >= 0 else None


def fit(trainer: Trainer, on_images: Callable[[int], Any]) -> dict[str, Any]:
    """Train to the end of the schedule, or until a gradient is not finite.

    losses         the mean loss of each epoch's images as they were seen; None for an epoch that blew up
    diverged_step  the step whose gradient was not finite, or None
    """
    losses: list[float | None] = []
    for epoch in range(trainer.config.epochs):
        for images in steps(trainer, epoch):
            on_images(images)
        if bad_step(trainer) is not None:
            losses.append(None)
            break
        loss = trainer.epoch_result()[0]
        losses.append(loss if math.isfinite(loss) else None)
    return {"losses": losses, "diverged_step": bad_step(trainer)}


def images_per_s(session: train.Session, config: Config, images: int = 50_000) -> float:
    """The speed of training `config` on this machine: the median of a few whole batches, after the first two."""
    trainer = prepare(session, config, subset(session.dataset, min(images, len(session.dataset.train_images))))
    seconds = []
    start = time.monotonic()
    for number, _ in enumerate(trainer.train(0)):
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        end = time.monotonic()
        seconds.append(end - start)
        start = end
        if number == 9:
            break
    return config.batch_size / statistics.median(seconds[2:] or seconds)
