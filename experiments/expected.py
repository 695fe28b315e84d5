"""How long a kernel should take on a GPU that is not there: the cost model, and what the compiler says.

A kernel takes START_US and then the larger of two times. Its arithmetic's, at the rate that the device sustains, times
two factors known before it runs: `tail`, since the last programs leave multiprocessors idle, and `issue`, where a warp
issues more instructions for each matrix instruction than the tensor core takes cycles for it. Its bytes', at the
device's bandwidth or at that of the multiprocessors that have a program. All else is taken to be free: latency,
conflicts, barriers, a cold start of the loop, and the partial sums between the launches of one op. What is measured is
therefore longer, and by how much is the finding; shorter only where a step finds its operands still in the L2 cache.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from model.config import Config

if TYPE_CHECKING:
    from profiling.ahead_of_time import Build, Facts

START_US = 1.5
"""The shortest kernels of a recorded H100 trace (PyTorch's profiler, 154 kernels of a vision transformer): 1.505 us."""
GAP_US = 1.0
"""From a kernel's end to the next one's start in a replayed CUDA graph: the median of a recorded trace, 0.96 us."""
BATCH = 512


class Machine(NamedTuple):
    """What a prediction needs to know of a GPU."""

    name: str
    capability: tuple[int, int]
    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int
    multiprocessor_bytes_per_s: float
    matrix_macs_per_cycle: int
    source: str


H200 = Machine(
    "NVIDIA H200",
    (9, 0),
    790e12,
    4.3e12,
    132,
    64 * 1.755e9,
    2048,
    "a large fp16 product and a copy in device memory, measured elsewhere on an H200; 64 bytes a cycle from the L2 "
    "cache into a multiprocessor at 1.755 GHz, 2048 fp16 multiply-adds a cycle in its tensor cores",
)


class Launch(NamedTuple):
    """One kernel launch: its grid, and the factors on the time of its arithmetic."""

    kernel: str
    programs: int
    registers: int | None
    blocks_per_sm: int | None
    tail: float
    issue: float


class Prediction(NamedTuple):
    """An op: the least that its work takes, and what is expected of its launches; microseconds."""

    op: str
    layer: str
    flops: int
    bytes: int
    floor_us: float
    expected_us: float
    bound: str
    launches: tuple[Launch, ...]


def launch(build: "Build", facts: "Facts", machine: Machine) -> Launch:
    """The factors of one launch: what the grid leaves idle, and what the machine code must issue."""
    each = build.programs / machine.multiprocessors
    tail = math.ceil(each) / each if build.programs else 1.0
    issued, macs, issue = facts.instructions_per_matrix_step(), facts.macs_per_matrix_step(), 1.0
    if issued is not None and macs is not None:
        issue = max(1.0, issued * machine.matrix_macs_per_cycle / macs)
    return Launch(build.kernel, build.programs, facts.registers or None, facts.blocks_per_sm(), tail, issue)


def predict(op: str, layer: str, flops: int, bytes_: int, launches: Sequence[Launch], machine: Machine) -> Prediction:
    """An op's times; its work is its largest launch's, what the others add is a start each."""
    compute_us, memory_us = 1e6 * flops / machine.flops_per_s, 1e6 * bytes_ / machine.bytes_per_s
    floor_us = max(compute_us, memory_us)
    if launches:
        largest = max(launches, key=lambda one: one.programs)
        compute_us *= largest.tail * largest.issue
        busy = min(largest.programs, machine.multiprocessors)
        memory_us = 1e6 * bytes_ / min(machine.bytes_per_s, busy * machine.multiprocessor_bytes_per_s)
    expected_us = max(len(launches), 1) * START_US + max(compute_us, memory_us)
    bound = "compute" if compute_us > memory_us else "memory"
    return Prediction(op, layer, flops, bytes_, floor_us, expected_us, bound, tuple(launches))


Compile = Callable[[list["Build"]], list["Facts"]]


def cases(chosen: Iterable[Any], machine: Machine, compile_: Compile) -> dict[str, Prediction]:
    """A prediction for each benchmark case, in fp16 at batch 512, by the case's name."""
    import torch

    from profiling.ahead_of_time import launches
    from profiling.case import Draw
    from profiling.kernel_facts import Gpu

    draw, found = Draw(BATCH, torch.device("cpu"), torch.float16, untouched=True), []
    for case in chosen:
        operands = case.operands(draw)
        with torch.no_grad(), launches(Gpu(machine.name, machine.capability)) as builds:
            case.ours(*operands)
        found.append((case, case.cost(*operands), builds))
    facts = _facts([builds for *_, builds in found], compile_)
    return {
        case.name: predict(case.op, case.shape, cost.flops, cost.bytes, _launches(builds, facts, machine), machine)
        for case, cost, builds in found
    }


def eager_step(config: Config, machine: Machine) -> list[Prediction]:
    """A prediction for each kernel of a step of `config` in PyTorch's own operations, with eager mode's passes."""
    import torch

    from model.trainer import modelled_step
    from profiling.floors import CUTS, kernels
    from profiling.work import work_of

    rows = work_of(*modelled_step(config, torch.float16))
    passes = [(kernels([row], CUTS[0]) or [row])[0] for row in rows]
    return [predict(row.family, row.layer, row.flops, row.bytes, (), machine) for row in passes]


def fused_step(config: Config, machine: Machine, compile_: Compile) -> list[Prediction]:
    """A prediction for each kernel of a training step of `config`, of this project's kernels, in order."""
    import torch

    from model.trainer import modelled_step
    from profiling.ahead_of_time import launches
    from profiling.kernel_facts import Gpu
    from profiling.work import work_of

    found, seen = [], 0
    with launches(Gpu(machine.name, machine.capability)) as builds:

        def on_op(rows: list) -> None:
            nonlocal seen
            found.extend((row, builds[seen:]) for row in rows)
            seen = len(builds)

        update = work_of(*modelled_step(config, torch.float16, "cpu"), on_op)[-1]
    found.append((update, []))
    facts = _facts([launched for _, launched in found], compile_)
    return [
        predict(row.family, row.layer, row.flops, row.bytes, _launches(launched, facts, machine), machine)
        for row, launched in found
    ]


def _facts(launched: Iterable[list["Build"]], compile_: Compile) -> dict[str, "Facts"]:
    from profiling.ahead_of_time import unique

    builds = unique([build for builds in launched for build in builds])
    return dict(zip((build.key() for build in builds), compile_(builds), strict=True))


def _launches(builds: Sequence["Build"], facts: dict[str, "Facts"], machine: Machine) -> list[Launch]:
    return [launch(build, facts[build.key()], machine) for build in builds]


def whole(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """A step: its kernels one after the other with the gaps of a replayed graph, and what each family takes."""
    families: dict[str, float] = {}
    for p in predictions:
        families[p.op] = families.get(p.op, 0.0) + p.expected_us
    kernels = sum(max(len(p.launches), 1) for p in predictions)
    return {
        "kernels": kernels,
        "floor_us": sum(p.floor_us for p in predictions),
        "expected_us": sum(families.values()) + GAP_US * kernels,
        "families_us": dict(sorted(families.items(), key=lambda item: -item[1])),
    }
