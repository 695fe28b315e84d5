"""Several processes as one: torchrun's ranks, and what they agree on.

The batch is the global one. Each rank's batch norm sees its own part of it (a ghost batch), gradients are summed, and
running statistics are averaged before they are used.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a world: its default arguments would hold it for ever
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from model.errors import DeviceError, RunError, UsageError

SET_UP_S = 600
"""Seconds that ranks wait for each other before the first step: one may be compiling kernels or reading a slow disk."""

STEP_S = 20
"""Seconds that ranks wait for each other afterwards, unless CIFAR10_RANK_TIMEOUT_S says otherwise. torchrun then gives
the others 30 s to end: a hanging rank ends the job within a minute."""

LEAVE_S = 3
"""Seconds that a failing rank waits for the first one to fail too."""

_groups: dict[str, dist.ProcessGroup] = {}
"""Process groups, which are the process's as torch.distributed's own are. Nothing else holds them, so that `leave` ends
their threads: one that lives on while Python shuts down can abort the process, or never let it end."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. With one process every method is the identity.

    Every rank must make the same calls in the same order. They raise RunError where another rank has ended, or has not
    made its call in time.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    @property
    def capturable(self) -> bool:
        """Whether `sum` can be part of a CUDA graph: NCCL's can, gloo's happens on the host."""
        return self.world == 1 or dist.get_backend(_groups["device"]) == "nccl"

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over ranks, in place; bit-equal on all of them.

        All gradients are one `x`, with the same parameters at the same places in every step. From three ranks on, the
        order in which an element is summed depends on its place, and a resumed run has to repeat the bits:
        DistributedDataParallel is not used, since it rearranges its buckets after a process's first step. It would hide
        the sum behind backward: 20 MB for the article's network.
        """
        if self.world > 1:
            with _reporting_loss():
                dist.all_reduce(x, group=_groups["device"])
        return x

    def average_running_statistics(self, network: nn.Module) -> None:
        """Every rank gets the mean of the ranks' running means and variances."""
        if self.world > 1:
            statistics = list(network.buffers())
            total = self.sum(torch.cat([t.flatten() for t in statistics]))
            parts = total.split([t.numel() for t in statistics])
            torch._foreach_copy_(statistics, [part.view(t.shape) for part, t in zip(parts, statistics, strict=True)])
            torch._foreach_div_(statistics, self.world)

    def any(self, flag: int) -> int:
        """The largest of the ranks' flags, by which all of them stop after the same step."""
        if self.world == 1:
            return flag
        highest = torch.tensor(flag)
        with _reporting_loss():
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=_groups["host"])
        return int(highest)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, which is plain data, in the ranks' order; with set-up's patience."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with _reporting_loss():
            dist.all_gather_object(values, value)
        return values

    def all_equal(self, text: str) -> bool:
        """Whether every rank holds the same `text`; with set-up's patience."""
        return len(set(self.gather(text))) == 1

    def wait(self) -> None:
        """Until every rank is here; with set-up's patience."""
        if self.world > 1:
            with _reporting_loss():
                dist.barrier()


def join(device: torch.device) -> Ranks:
    """The process group torchrun describes in the environment, or a single process without it.

    Raises DeviceError where two processes of this machine would share a GPU, RunError where a process does not appear,
    UsageError where the environment is not torchrun's.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = datetime.timedelta(seconds=_step_s())
    if device.type == "cuda":
        if device.index != int(os.environ.get("LOCAL_RANK", "0")):
            raise DeviceError(
                f"device={device} is one GPU, and each process of torchrun needs its own; use device=auto"
            )
        torch.cuda.set_device(device)
    with _reporting_loss():
        # Set-up waits on the host: a barrier of NCCL's would make a second communicator for it.
        try:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SET_UP_S))
        except ValueError as error:  # a variable of the environment is missing or is no number
            raise UsageError(f"{error}; start by torchrun, or unset RANK and WORLD_SIZE") from None
        _groups["leave"] = dist.new_group(timeout=datetime.timedelta(seconds=LEAVE_S))
        # Of tensors in host memory, so that agreeing does not wait for the GPU; and of tensors on the device.
        _groups["host"] = _groups["device"] = dist.new_group(timeout=patience)
        if device.type == "cuda":  # device_id makes NCCL connect now, and not in the first step
            _groups["device"] = dist.new_group(timeout=patience, backend="nccl", device_id=device)
    return Ranks(rank, world)


def leave() -> None:
    """End the process groups and their threads, if there are any."""
    _groups.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def report(error: BaseException) -> None:
    """Record the `error` that ends a rank that does not speak: torchrun finds it, and shows the job's first.

    torchrun ends the other ranks as soon as one has ended. The first rank may be about to write and to say the same,
    and gets a moment to leave before this one.
    """
    get_error_handler().record_exception(error)
    if "leave" in _groups:
        with contextlib.suppress(RuntimeError):
            dist.barrier(_groups["leave"])


@contextlib.contextmanager
def _reporting_loss() -> Iterator[None]:
    """Turn the error of gloo or NCCL for a rank that is gone or late into a RunError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"lost another process of this job: it ended, or was silent for too long ({reason}). Look for its own "
            "error; then go on from the last checkpoint with --resume auto"
        ) from error


def _step_s() -> float:
    text = os.environ.get("CIFAR10_RANK_TIMEOUT_S", str(STEP_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"CIFAR10_RANK_TIMEOUT_S={text!r} is not a number of seconds above 0")
    return seconds
