"""The session of a process: its data, device and ranks, the folder that it owns, the checkpoint that it resumes."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from model import checkpoint, folder
from model.config import Config
from model.data import cifar10
from model.data.batches import Batches
from model.data.cifar10 import Dataset
from model.distributed import Ranks, join
from model.errors import CheckpointError, DataError, DeviceError, UsageError
from model.interrupts import Interrupts
from model.memory import forget_peak, keep_freed_memory
from model.run_state import RunState, require_same
from model.trainer import Trainer, choose_device, choose_dtype, require_network, search_convolutions, with_available_ops


class Terminal(Protocol):
    """The person to talk to, as `profiling.output.terminal.Terminal` does."""

    def say(self, text: str, style: str = "") -> None: ...
    def warn(self, text: str) -> None: ...
    def banner(self, title: str, text: str) -> None: ...
    def header(self, columns: Sequence[str]) -> None: ...
    def row(self, cells: Sequence[str], style: str = "") -> None: ...
    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...
    def progress(self, total: int, done: int = 0, unit: str = "") -> contextlib.AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Session:
    """Data, device, ranks, terminal and signals, which the runs of one process share."""

    dataset: Dataset
    device: torch.device
    ranks: Ranks
    terminal: Terminal
    interrupts: Interrupts


@contextlib.contextmanager
def own(session: Session, out: Path) -> Iterator[None]:
    """Make `out`, keep other processes from it, and clear it of what a killed one left. The first rank does, for all.

    Raises UsageError where `out` cannot be made, or is another process's.
    """
    if not session.ranks.is_first:
        yield
        return
    folder.make(out)
    with folder.hold(out, session.terminal.warn):
        checkpoint.clean(out)
        yield


def find_checkpoint(session: Session, named: checkpoint.Checkpoint | None, out: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from: the one `named`, else the newest in `out`; None where there is none."""
    newest = checkpoint.newest(out, session.terminal.warn if session.ranks.is_first else lambda text: None)
    if named is None:
        session.terminal.say(f"resuming from {newest.path}" if newest else f"no checkpoint in {out}: starting afresh")
        return newest
    if newest and newest.step > named.step:
        raise CheckpointError(
            f"{out} holds a later checkpoint than {named.path.name}: step {newest.step}. Go on from that with "
            "--resume auto, or name a new --out for a run that branches off here"
        )
    return named


def require_batch(session: Session, config: Config) -> None:
    """Raise UsageError for a batch of more images than there are."""
    count = len(session.dataset.train_images)
    if config.batch_size > count:
        raise UsageError(f"batch_size={config.batch_size} is more than the {count:,} training images")


def other_images(session: Session, found: checkpoint.Checkpoint) -> str | None:
    """A sentence, unless the checkpoint was trained on the session's images."""
    data = session.dataset
    if found.state.data == data.fingerprint():
        return None
    return (
        f"{found.path} was trained on other images than these ({data.identity}: {data.source}); name its own, by "
        "--data-dir or --synthetic"
    )


def require_fit(session: Session, found: checkpoint.Checkpoint, config: Config) -> None:
    """Raise CheckpointError, with the difference, unless `config` on this data is what the checkpoint began."""
    state, name = found.state, found.path.name
    require_same(state.config.learned(), config.learned(), f"configuration ({name})")
    if other := other_images(session, found):
        raise CheckpointError(other)
    require_same({"processes": state.world_size}, {"processes": session.ranks.world}, f"launch ({name})")
    require_network(config, found.tensors)
    try:
        state.require_step(found.step, -(-len(session.dataset.train_images) // config.batch_size))
    except ValueError as error:
        raise CheckpointError(f"{found.path}: {error}; name another, or start afresh in another folder") from None


def open_session(
    terminal: Terminal,
    interrupts: Interrupts,
    device: str = "auto",
    data_dir: Path | None = None,
    download: bool = False,
    synthetic: bool = False,
) -> Session:
    """Load the data, choose the device, join torchrun's other processes.

    Raises DataError and DeviceError; falls back to synthetic images, with a banner, where no data was named.
    """
    keep_freed_memory()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    search_convolutions(chosen)
    if download and data_dir is None:
        data_dir = Path("data")
    with contextlib.ExitStack() as stack:
        meters = []

        def progress(done: int, total: int) -> None:
            if not meters:
                meters.append(stack.enter_context(terminal.progress(total, done, "bytes")))
            meters[0].advance(done - meters[0].done, "downloading CIFAR-10 (--synthetic does without)")

        dataset = cifar10.load(data_dir, download=download, synthetic=synthetic, say=terminal.say, progress=progress)
    if dataset.reason:
        terminal.banner(
            "SYNTHETIC IMAGES, NOT CIFAR-10",
            f"{dataset.reason}\n\nTraining goes on with generated pictures of shapes, so that you can see everything "
            "work. No accuracy below says anything about CIFAR-10.",
        )
    ranks = join(chosen)
    if not ranks.all_equal(dataset.fingerprint()):
        raise DataError("the processes loaded different data; name a folder that all of them can read with --data-dir")
    return Session(dataset, chosen, ranks, terminal, interrupts)


def prepare(
    session: Session,
    config: Config,
    dtype: torch.dtype,
    found: checkpoint.Checkpoint | None,
    switch: Callable[[str], None],
) -> Trainer:
    """A Trainer ready for its next step, of `found` if there is one. `switch(phase)` is called as a phase begins.

    Raises CheckpointError where ranks found different checkpoints.
    """
    dataset, ranks = session.dataset, session.ranks
    switch("preprocessing")
    warn = session.terminal.warn if ranks.is_first else lambda text: None
    batches = Batches(
        dataset.train_images, dataset.train_labels, config, session.device, dtype, ranks.rank, ranks.world, warn
    )
    switch("set-up")
    trainer = Trainer(batches, dataset, ranks)
    if not ranks.all_equal(json.dumps(found.state.to_json(), sort_keys=True) if found else ""):
        raise CheckpointError("the processes found different checkpoints; put --out where all of them can read it")
    if found:
        trainer.restore(found.tensors, found.step)
    if session.device.type == "cuda" or trainer.step_requested != "eager":
        switch("warm-up")
        reason = trainer.warm_up(session.terminal.say)
        if reason:
            warn(f"the training step runs eagerly, not {trainer.step_requested}: {reason}")
        switch("set-up")
    forget_peak(session.device)
    return trainer


def restore(session: Session, config: Config, found: checkpoint.Checkpoint) -> tuple[Config, Trainer, torch.dtype]:
    """A Trainer that can only evaluate, of `found`; with its Config and the dtype of activations."""
    dataset, ranks, device = session.dataset, session.ranks, session.device
    require_network(config, found.tensors)
    config, _ = with_available_ops(config, device, session.terminal.say, ranks)
    # There is no training: whatever batches and schedule the checkpoint claims, they take no memory.
    config = replace(config.with_epochs(1), preprocess="on_device", draw="per_epoch", workers=0, batch_size=1)
    dtype = choose_dtype(config.dtype, device, config.ops)
    batches = Batches(dataset.train_images, dataset.train_labels, config, device, dtype, ranks.rank, ranks.world)
    trainer = Trainer(batches, dataset, ranks)
    trainer.restore(found.tensors, found.step)
    return config, trainer, dtype


def save(session: Session, trainer: Trainer, out: Path, log: Callable[[], dict[str, Any]], final: bool) -> None:
    """Write a checkpoint, with what `log()` returns. A failure is a warning, and for the `final` one a CheckpointError.

    Raises NonFiniteError for a gradient or a tensor that is not finite: it would take the place of a good one.
    """
    trainer.check_finite()
    tensors = trainer.tensors()
    if not session.ranks.is_first:
        return
    number = trainer.step.number
    state = RunState(trainer.config, session.dataset.fingerprint(), session.ranks.world, **log())
    try:
        checkpoint.save(out, number, tensors, state)
    except OSError as error:
        text = f"the checkpoint of step {number} could not be written to {out}: {error}; those before it are intact"
        if final:
            raise CheckpointError(f"{text}. Free some space and go on with --resume auto") from None
        session.terminal.warn(f"{text}, and training goes on")


def runnable(session: Session, config: Config, require_ops: bool) -> Config:
    """`config`, on the reference ops where its kernels cannot run, after a banner; with `require_ops` DeviceError."""
    available, reason = with_available_ops(config, session.device, session.terminal.say, session.ranks)
    if reason and require_ops:
        raise DeviceError(
            f"the kernels of ops={config.ops} cannot run here: {reason}; use --set ops=reference, or another machine"
        )
    if reason:
        session.terminal.banner(
            f"REFERENCE OPS, NOT {config.ops.upper()}",
            f"{config.preset} asks for ops={config.ops}, and the kernels cannot run here: {reason}. "
            "The same network is trained with the library's convolutions and batch norm.",
        )
    return available
