"""How long a kernel should take on a GPU that is not there: the cost model, and what the compiler says.

A kernel takes START_US and then the largest of these times:

compute   its arithmetic's, at the rate that the device sustains, times two factors known before it runs: `tail`, since
          the last programs leave multiprocessors idle, and those that walk down a map take one line beyond its edge;
          and `issue`, where a warp issues more instructions for each matrix instruction than the tensor core takes
          cycles for it
memory    its bytes', each once, at the device's bandwidth or at that of the multiprocessors that have a program
L2        of a product the bytes of its operands' tiles, which every program reads for itself, at the L2 cache's rate
latency   of a reduction whose programs are few and loop, in turn for each pass: the L2 cache's latency, and the longer
          of its bytes' time and its instructions', or both where a barrier parts the warps' loads from their sums

An op's further launches add a start each and, where they are such reductions, that time. The parts of a split product
are among its op's bytes twice: it writes them, and its reduction reads them. All else is taken to be free: conflicts,
barriers, a cold start of the loop, the latency of what is not a reduction. What is measured is therefore mostly longer,
and by how much is the finding; shorter where a step finds its operands still in the L2 cache, or where an assumption is
wrong.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from model.config import Config
from model.presets import preset
from profiling.device.specifications import Machine

if TYPE_CHECKING:
    from profiling.bench.ahead_of_time import Build, Facts

START_US = 1.5
"""The shortest kernels of a recorded H100 trace (PyTorch's profiler, 154 kernels of a vision transformer): 1.505 us."""
GAP_US = 1.0
"""From a kernel's end to the next one's start in a replayed CUDA graph: the median of a recorded trace, 0.96 us."""
BATCH = 512
ELEMENT_BYTES = 2
"""Of fp16."""
LIBRARY_BLOCK = (256, 128)
"""Pixels by filters of a tile of the library's convolutions: assumed, the largest that is usual on these GPUs."""
CONVOLUTIONS = ("fprop", "dgrad", "wgrad")
LINES_KERNELS = ("conv_fprop_lines_kernel", "conv_dgrad_lines_kernel")
ROOFS = ("compute", "memory", "L2", "latency")
STEPS = {"article-256": ("preprocess=on_device",), "fused": ()}
"""The presets whose steps are predicted, and with which settings: what a GPU does, not the host beside it."""


class Launch(NamedTuple):
    """One kernel launch: its grid, and what its time follows from.

    block        (BLOCK_M, BLOCK_N) of a product, larger where a load serves several tiles; else None
    tail, issue  factors on the time of its arithmetic
    serial_us    of a reduction that loops: its passes in turn; else 0
    parts_bytes  that it reads of the parts of a split product; else 0
    """

    kernel: str
    programs: int
    registers: int | None
    blocks_per_sm: int | None
    tail: float
    issue: float
    block: tuple[float, float] | None = None
    serial_us: float = 0.0
    parts_bytes: int = 0


class Prediction(NamedTuple):
    """An op: the least that its work takes, and what is expected of its launches; microseconds.

    `roofs_us` are the times by ROOFS of the launch that does the work, number `main`; `bound` names the longest;
    `after_us` is what the reductions behind it add. `main` is None where the library does it.
    """

    op: str
    layer: str
    flops: int
    bytes: int
    l2_bytes: int
    floor_us: float
    expected_us: float
    after_us: float
    roofs_us: tuple[float, ...]
    bound: str
    main: int | None
    launches: tuple[Launch, ...]


class Op(NamedTuple):
    """An op's work, and what it would launch: nothing where the library does it."""

    op: str
    layer: str
    flops: int
    bytes: int
    builds: Sequence["Build"] = ()


def launch(build: "Build", facts: "Facts", machine: Machine) -> Launch:
    """What one launch's time follows from: what its grid leaves idle, and what the machine code must issue."""
    each = build.programs / machine.multiprocessors
    tail = math.ceil(each) / each if build.programs else 1.0
    issued, macs, issue = facts.instructions_per_matrix_step(), facts.macs_per_matrix_step(), 1.0
    if issued is not None and macs is not None:
        issue = max(1.0, issued * machine.matrix_macs_per_cycle / macs)
    values = {**build.constexprs, **build.integers}
    is_product = {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= values.keys()
    # Several taps of one load of the first operand: as if their columns lay side by side.
    block = (values["BLOCK_M"], values["BLOCK_N"] * values.get("TAPS", 1)) if is_product else None
    if build.kernel in LINES_KERNELS:  # the filter serves every line, a line's load three products; one line is extra
        lines = values["H"]
        block = (values["BLOCK_M"] * lines, 3 * values["BLOCK_N"] * lines / (lines + 1))
        tail *= (lines + 1) / lines
    parts = 4 * values["SPLIT"] * values["elements"] if build.kernel == "conv_wgrad_reduce_kernel" else 0
    known = (build.kernel, build.programs, facts.registers or None, facts.blocks_per_sm())
    return Launch(*known, tail, issue, block, _serial_us(build, facts, machine), parts)


def _passes(build: "Build") -> tuple[int, int] | None:
    """(passes of a reduction's loop as its source has it, bytes that one pass loads); None for any other kernel."""
    values = {**build.constexprs, **build.integers}
    if build.kernel == "conv_wgrad_reduce_kernel":
        return math.ceil(values["SPLIT"] / values["AHEAD"]), 4 * values["BLOCK"] * values["AHEAD"]
    planes = {"bn_finalize_kernel": 3, "bn_coefficients_kernel": 2}.get(build.kernel)
    if planes is None:
        return None
    tiles = min(values["T"], values["BLOCK_T"])
    return math.ceil(values["T"] / values["BLOCK_T"]), 4 * planes * tiles * values["BLOCK_C"]


def _serial_us(build: "Build", facts: "Facts", machine: Machine) -> float:
    """Of a reduction's program, its passes one after the other; programs of one multiprocessor share what it has.

    A warp's next loads wait for its sums. Without a barrier they wait for no other warp's, so that one warp's bytes
    arrive while another adds. A compiler that unrolls the loop makes one pass of several, whose loads are under way
    together.
    """
    found = _passes(build)
    if found is None:
        return 0.0
    passes, pass_bytes = found
    loop = max(facts.loops, key=_loaded_bytes, default={})
    unrolled = max(1, min(passes, round(_loaded_bytes(loop) * 32 * facts.warps / pass_bytes)))
    rounds = passes // unrolled + passes % unrolled
    sharing = math.ceil(build.programs / machine.multiprocessors)
    transfer_us = 1e6 * unrolled * pass_bytes / machine.multiprocessor_bytes_per_s
    issue_us = 1e6 * sum(loop.values()) * facts.warps / machine.instructions_per_s
    together = sum if any(name.startswith("BAR") for name in loop) else max
    return rounds * (machine.l2_latency_us + sharing * together((transfer_us, issue_us)))


def _loaded_bytes(loop: dict[str, int]) -> int:
    """What a thread loads from global memory in one pass of a loop of the machine code."""
    loads = {name: n for name, n in loop.items() if name.startswith("LDG.")}
    widths = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}
    return sum(n * next((w for mark, w in widths.items() if mark in name), 4) for name, n in loads.items())


def main_launch(launches: Sequence[Launch]) -> int | None:
    """Which launch does an op's work: the one that multiplies, else the largest of those that are no reductions."""
    numbers = range(len(launches))
    return max(
        numbers,
        key=lambda i: (launches[i].block is not None, not launches[i].serial_us, launches[i].programs),
        default=None,
    )


def predict(op: str, layer: str, flops: int, bytes_: int, launches: Sequence[Launch], machine: Machine) -> Prediction:
    """An op's times from its work, its launches and the machine."""
    compute_us, bandwidth, l2_rate = 1e6 * flops / machine.flops_per_s, machine.bytes_per_s, machine.l2_bytes_per_s
    floor_us = max(compute_us, 1e6 * bytes_ / bandwidth)
    main, parts = main_launch(launches), sum(one.parts_bytes for one in launches)
    block, serial_us, after_us = _library_block(op, layer), 0.0, 0.0
    if main is not None:
        does = launches[main]
        block, serial_us = does.block, does.serial_us
        compute_us *= does.tail * does.issue
        few = _rate_of(does, machine)
        bandwidth, l2_rate = min(bandwidth, few), min(l2_rate, few)
        after_us = sum(_after_us(one, machine) for i, one in enumerate(launches) if i != main)
    l2_bytes = operand_bytes(flops, block) if block else 0
    times = (compute_us, 1e6 * (bytes_ - parts) / bandwidth, 1e6 * l2_bytes / l2_rate, serial_us)
    expected_us = max(len(launches), 1) * START_US + max(times) + after_us
    bound = ROOFS[times.index(max(times))]
    about = (op, layer, flops, bytes_, l2_bytes, floor_us, expected_us, after_us, times, bound, main)
    return Prediction(*about, tuple(launches))


def operand_bytes(flops: int, block: tuple[float, float]) -> int:
    """Bytes of the operands' tiles that a product's programs read.

    Each pass multiplies BLOCK_M x BLOCK_K by BLOCK_N x BLOCK_K elements, in 2 BLOCK_M BLOCK_N BLOCK_K FLOPs: programs x
    passes x (BLOCK_M + BLOCK_N) BLOCK_K elements, in which BLOCK_K cancels.
    """
    return round(flops / 2 * ELEMENT_BYTES * (1 / block[0] + 1 / block[1]))


def _rate_of(one: Launch, machine: Machine) -> float:
    return min(one.programs, machine.multiprocessors) * machine.multiprocessor_bytes_per_s


def _after_us(one: Launch, machine: Machine) -> float:
    return max(one.serial_us, 1e6 * one.parts_bytes / min(machine.bytes_per_s, _rate_of(one, machine)))


def _library_block(op: str, layer: str) -> tuple[int, int] | None:
    """The tile that a convolution of the library is taken to have; None for anything else."""
    if op not in CONVOLUTIONS:
        return None
    x, w, _ = layer.split("-")  # 64x32x32-128x3x3-s1
    columns = int((x if op == "dgrad" else w).partition("x")[0])
    return LIBRARY_BLOCK[0], min(LIBRARY_BLOCK[1], columns)


Compile = Callable[[list["Build"]], list["Facts"]]


def cases(chosen: Iterable[Any], machine: Machine) -> dict[str, Op]:
    """What each benchmark case would do on `machine`, in fp16 at batch 512, by the case's name."""
    import torch

    from profiling.bench.ahead_of_time import launches
    from profiling.bench.case import OperandFactory
    from profiling.bench.kernel_facts import Gpu

    draw, found = OperandFactory(BATCH, torch.device("cpu"), torch.float16, untouched=True), {}
    for case in chosen:
        operands = case.operands(draw)
        with torch.no_grad(), launches(Gpu(machine.name, machine.capability)) as builds:
            case.ours(*operands)
            cost = case.cost(*operands)  # of the tile that it would take there
        found[case.name] = Op(case.op, case.shape, cost.flops, cost.bytes, builds)
    return found


def config_of(name: str) -> Config:
    """The configuration whose steps are predicted under the name of a preset, as STEPS has them."""
    return preset(name).with_settings(list(STEPS[name]))


def eager_step(config: Config) -> list[Op]:
    """The kernels of a step of `config` in PyTorch's own operations, with eager mode's passes."""
    import torch

    from model.trainer import modelled_step
    from profiling.account.floors import CUTS, kernels
    from profiling.account.work import work_of

    rows = work_of(*modelled_step(config, torch.float16))
    passes = [(kernels([row], CUTS[0]) or [row])[0] for row in rows]
    return [Op(row.family, row.layer, row.flops, row.bytes) for row in passes]


def fused_step(config: Config, machine: Machine) -> list[Op]:
    """The ops of a training step of `config`, of this project's kernels as they would be launched, in order."""
    import torch

    from model.trainer import modelled_step
    from profiling.account.work import work_of
    from profiling.bench.ahead_of_time import launches
    from profiling.bench.kernel_facts import Gpu

    found, seen = [], 0
    with launches(Gpu(machine.name, machine.capability)) as builds:

        def on_op(rows: list) -> None:
            nonlocal seen
            found.extend(Op(row.family, row.layer, row.flops, row.bytes, builds[seen:]) for row in rows)
            seen = len(builds)

        update = work_of(*modelled_step(config, torch.float16, "cpu"), on_op)[-1]
    return [*found, Op(update.family, update.layer, update.flops, update.bytes, builds[seen:])]


def facts_of(ops: Iterable[Op], compile_: Compile) -> dict[str, "Facts"]:
    """What the compiler says of every build of `ops`, by its key."""
    from profiling.bench.ahead_of_time import unique

    builds = unique([build for op in ops for build in op.builds])
    return dict(zip((build.key() for build in builds), compile_(builds), strict=True))


def expect(op: Op, facts: dict[str, "Facts"], machine: Machine) -> Prediction:
    """The prediction of an op on `machine`."""
    launches = [launch(build, facts[build.key()], machine) for build in op.builds]
    return predict(op.op, op.layer, op.flops, op.bytes, launches, machine)


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
