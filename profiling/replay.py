"""Kernels of a replayed CUDA graph, and the operations they come from.

A replay is one launch: nothing in the trace says which operation put a kernel into the graph. But the graph is the
step, captured: its kernels are those of a step run eagerly, in that order. So the eager step is where operations are
learned, and each replay's kernels are given them by name and order. That holds only while each replay has all its
kernels; one that has lost some also has gaps that never were.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from profiling.categories import INCOMPLETE_REPLAY
from profiling.trace import Kernel, Trace


class Learned(NamedTuple):
    """A kernel of the eager step; see `Kernel`."""

    name: str
    ops: tuple[str, ...]
    dims: str


def learn(kernels: Iterable[Kernel]) -> list[Learned]:
    """What a captured step holds, from the `kernels` of the same step run eagerly."""
    eager = sorted((kernel for kernel in kernels if kernel.graph is None), key=lambda kernel: kernel.start_ns)
    return [Learned(kernel.name, kernel.ops, kernel.dims) for kernel in eager]


def attribute_replays(trace: Trace, learned: Sequence[Learned]) -> tuple[list[Kernel], list[str]]:
    """(the kernels of `trace`, those of replays with the operations that were `learned`; what the trace lacks for it).

    A replay of another length than `learned` is incomplete, and its kernels are of no known operation. So are those of
    every replay shorter than the longest if nothing was learned; the longest keep what their names tell, but that none
    of their kernels is missing is then not known either, and is among the lacks.
    """
    replays: dict[int, list[int]] = defaultdict(list)
    for index, kernel in enumerate(trace.kernels):
        if kernel.graph is not None:
            replays[kernel.graph].append(index)
    if not replays:
        return trace.kernels, []
    kernels, lacks = list(trace.kernels), []
    captured = len(learned) or max(map(len, replays.values()))
    for indices in replays.values():
        if len(indices) != captured:
            for index in indices:
                kernels[index] = kernels[index]._replace(ops=(INCOMPLETE_REPLAY,), dims="")
        elif learned:
            _fill_in(kernels, indices, learned)
    wrong = Counter(len(indices) for indices in replays.values() if len(indices) != captured)
    for length, count in sorted(wrong.items()):
        lacks.append(f"trace incomplete: {count} of {len(replays)} graph replays have {length} kernels, not {captured}")
    if not learned:
        lacks.append("trace incomplete: how many kernels a graph replay should have was not learned from an eager step")
    return kernels, lacks


def _fill_in(kernels: list[Kernel], indices: list[int], learned: Sequence[Learned]) -> None:
    """By name, and among kernels of one name by order: branches of a graph may run in another order than they were
    captured in. A kernel of a name that the eager step did not have is left to its name.
    """
    waiting: dict[str, deque[Learned]] = defaultdict(deque)
    for entry in learned:
        waiting[entry.name].append(entry)
    for index in indices:
        if queue := waiting[kernels[index].name]:
            entry = queue.popleft()
            kernels[index] = kernels[index]._replace(ops=entry.ops, dims=entry.dims)
