"""Kernels of a replayed CUDA graph, and the operations they come from.

A replay is one launch: nothing in the trace says which operation put a kernel into the graph. But the graph is the
step, captured: its kernels are those of a step run eagerly, in that order. So the eager step is where operations are
learned, and each replay's kernels are given them by name and order. That holds only while each replay has all its
kernels, which `profiling.account.cross_check` sees to.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from profiling.account.trace import Kernel


class EagerKernel(NamedTuple):
    """A kernel of the eager step; see `Kernel`."""

    name: str
    ops: tuple[str, ...]
    dims: str


def learn(kernels: Iterable[Kernel]) -> list[EagerKernel]:
    """What a captured step holds, from the `kernels` of the same step run eagerly."""
    eager = sorted((kernel for kernel in kernels if kernel.graph is None), key=lambda kernel: kernel.start_ns)
    return [EagerKernel(kernel.name, kernel.ops, kernel.dims) for kernel in eager]


def attribute_replays(kernels: Sequence[Kernel], learned: Sequence[EagerKernel]) -> list[Kernel]:
    """`kernels`, by their start; those of replays with the operations that were `learned`.

    By name, and among kernels of one name by order: branches of a graph may run in another order than they were
    captured in. A kernel of a name that the eager step did not have is left to its name. Where the trace has the nodes
    of a graph, each is given what most replays say of it, so that two branches that changed places once do no harm.
    """
    waiting: dict[int, dict[str, deque[EagerKernel]]] = {}
    found: list[EagerKernel | None] = []
    votes: dict[int, Counter[EagerKernel]] = defaultdict(Counter)
    for kernel in kernels:
        entry = None
        if kernel.graph is not None:
            if kernel.graph not in waiting:
                waiting[kernel.graph] = defaultdict(deque)
                for one in learned:
                    waiting[kernel.graph][one.name].append(one)
            if queue := waiting[kernel.graph][kernel.name]:
                entry = queue.popleft()
                if kernel.node is not None:
                    votes[kernel.node][entry] += 1
        found.append(entry)
    said = {node: entries.most_common(1)[0][0] for node, entries in votes.items()}
    entries = [entry and said.get(kernel.node, entry) for kernel, entry in zip(kernels, found, strict=True)]
    return [k._replace(ops=e.ops, dims=e.dims) if e else k for k, e in zip(kernels, entries, strict=True)]
