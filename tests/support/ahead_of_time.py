"""The kernels that a training step of the networks launches, for `profiling.bench.ahead_of_time` to compile."""

import dataclasses
from types import ModuleType

from profiling.bench.ahead_of_time import LIMITS, Build, Facts, compile_all, launches, unique

__all__ = ["SHARED_LIMIT", "Build", "Facts", "compile_all", "compiling", "launches", "network_builds", "unique"]

SHARED_LIMIT = {arch: limits.block_shared_bytes for arch, limits in LIMITS.items()}  # bytes that one block may use


def compiling(builds: list[Build]) -> list[bool]:
    """Whether each of the builds compiles."""
    return [not fact.error for fact in compile_all([dataclasses.replace(build, inspect=False) for build in builds])]


def network_builds(ops: ModuleType, batch: int, dtype: str = "float16") -> list[Build]:
    """Every different kernel launch of a training step of both networks, at the article's widths, with these `ops`.

    The step runs on fake tensors, which costs nothing and says which ops are called with which shapes; each is then
    called once on tensors of that shape with its launches recorded.
    """
    import torch
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    from model.network import ResNet, ResNet9

    calls: dict[str, tuple] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "cifar":
                key = tree_map_only(torch.Tensor, lambda x: (x.dtype, x.shape, x.stride()), (args, kwargs))
                calls[f"{op} {key}"] = (op, args, kwargs or {})
            return op(*args, **(kwargs or {}))

    def allocate(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)  # untouched, hence free

    for network in (ResNet, ResNet9):
        with FakeTensorMode(), Record():
            images = torch.empty(batch, 3, 32, 32, dtype=getattr(torch, dtype)).to(memory_format=torch.channels_last)
            network(ops=ops)(images).sum().backward()
    with launches() as builds:
        for op, args, kwargs in calls.values():
            op(*tree_map_only(torch.Tensor, allocate, args), **tree_map_only(torch.Tensor, allocate, kwargs))
    return unique(builds)
