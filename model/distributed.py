"""Several processes as one: torchrun's ranks, and what they agree on.

The batch is the global one. Each rank's batch norm sees its own part of it (a ghost batch), gradients are summed, and
running statistics are averaged before they are used.
"""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

SET_UP_S = 600
"""How long ranks wait for each other before the first step: one may be compiling kernels or reading a slow disk."""

STEP_S = int(os.environ.get("CIFAR10_RANK_TIMEOUT_S", "25"))
"""How long ranks wait for each other afterwards. torchrun gives the others 30 s to end: together under a minute."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. With one process every method is the identity."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None  # of steps, with the short timeout
    signals: dist.ProcessGroup | None = None  # gloo, on host memory: agreeing must not wait for the GPU

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def parallel(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network, with gradients *summed* over ranks by the end of backward."""
        if self.world == 1:
            return network
        wrapped = DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self.group,
            broadcast_buffers=False,  # every rank keeps its own running statistics until they are averaged
        )
        wrapped.register_comm_hook(self.group, _sum_gradients)
        return wrapped

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def average_running_statistics(self, network: nn.Module) -> None:
        """Every rank gets the mean of the ranks' running means and variances."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.all_reduce(buffer, group=self.group)
                buffer /= self.world

    def any(self, flag: int) -> int:
        """The largest of the ranks' flags, so that all of them stop after the same step."""
        if self.world == 1:
            return flag
        highest = torch.tensor(flag)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.signals)
        return int(highest)

    def all_equal(self, text: str) -> bool:
        """Whether every rank holds the same `text`."""
        if self.world == 1:
            return True
        texts: list[str | None] = [None] * self.world
        dist.all_gather_object(texts, text, group=self.signals)
        return len(set(texts)) == 1

    def wait(self) -> None:
        """Until every rank is here; with set-up's patience."""
        if self.world > 1:
            dist.barrier()


def join(device: torch.device) -> Ranks:
    """The process group torchrun describes in the environment, or a single process without it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=SET_UP_S))
    patience = datetime.timedelta(seconds=STEP_S)
    signals = dist.new_group(timeout=patience, backend="gloo")
    return Ranks(rank, world, dist.new_group(timeout=patience), signals)


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _sum_gradients(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
