"""Checks that a run's records are of one run, and that its account is possible.

Idle is the steps less the kernels' busy time and takes up every mistake in either, so that the sum of the terms proves
nothing. `believed` leaves out records that disagree with others; `doubts` names figures that cannot be.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from profiling.account.cross_check import Judged
from profiling.account.roofline import Row
from profiling.account.terms import NECESSARY, UNEXPLAINED, Evidence, Term

if TYPE_CHECKING:
    from profiling.account.run_folder import Run

NEGATIVE = 0.02
"""Share of the training phase by which a term may be below zero: models and two passes differ by so much."""
RESIDUAL_DOUBT = 0.05
"""Share of it that may be unexplained before the whole account is in doubt."""
DISTURBED = 0.15
"""Difference of profiled and timed steps above which an account cannot join the two. On a GPU the profiler may make the
host slower, and steps longer, without a change of its kernels; it cannot make them shorter."""
IDLE_APART = 0.05
"""Share of a step by which the idle time of the account may differ from what was seen in the trace."""
SAME_S = 0.01
"""Relative difference of one time in two records, which round it."""
ABOVE_ROOF = 1.1
"""Rate over the roof from which a kernel is above it: the roof is the best of some windows of 50 ms or more."""
ABOVE_SHARE = 0.02
"""Share of the busy time in such kernels from which the roof is in doubt."""
CACHE_BYTES, FASTER_CACHE, LARGE_BYTES = 256 << 20, 4, 16 << 20
"""A kernel may find so many bytes in the last-level cache and leave them there without touching memory: twice the 126
MiB of a B200, more than twice the 96 MiB of an EPYC's die (data sheets). That cache may be so many times as fast as
memory (assumed; 2 to 3 on an H100), which does not matter below LARGE_BYTES, where a CPU's core has its own cache."""
TRAINING = ("preprocessing", "training")
"""Phases that count as training, as DAWNBench has it."""


def believed(run: "Run") -> "Run":
    """The run without the records that others contradict; `lacks` says which. Raises nothing."""
    lacks = list(run.lacks)
    phases, steps, work, profile = run.phases, run.steps, run.work, run.profile
    batch, counted = run.config.get("batch_size"), run.summary["steps"]
    if phases and (why := _phases_wrong(phases, run.summary["train_s"])):
        lacks.append(f"phases.json contradicts itself or the summary: {why}. The phases are left out.")
        phases = None
    if work and (why := _work_wrong(work, batch, run.summary["epochs"], counted)):
        lacks.append(f"work.json contradicts the run: {why}. The work is left out, and what is made of it.")
        work = None
    if steps and (why := _steps_wrong(steps, counted, run.summary["train_s"])):
        lacks.append(f"steps.json contradicts the run: {why}. The steps are left out.")
        steps = None
    if len(run.epochs) != run.summary["epochs"]:
        lacks.append(f"Epochs: {len(run.epochs):,} in log.jsonl, {run.summary['epochs']:,} in summary.json.")
    if run.trace is not None and profile and not profile["error"] and (why := _profile_wrong(run, batch)):
        lacks.append(f"profile.json contradicts the run or its trace: {why}. The profiled pass is left out.")
        profile = {}
    return run._replace(lacks=lacks, phases=phases, steps=steps, work=work, profile=profile)


def _phases_wrong(record: dict[str, Any], train_s: float) -> str:
    ends = [record["start_ns"], *(p["end_ns"] for p in record["phases"])]
    starts = [*(p["start_ns"] for p in record["phases"]), record["end_ns"]]
    if ends != starts or ends != sorted(ends):
        return "its phases are not contiguous from start to end"
    training_s = sum(p["end_ns"] - p["start_ns"] for p in record["phases"] if p["name"] in TRAINING) / 1e9
    if abs(training_s - train_s) > SAME_S * max(training_s, train_s):
        return f"{training_s:.4g} s of training and preprocessing, {train_s:.4g} s in summary.json"
    return ""


def _work_wrong(work: dict[str, Any], batch: int | None, epochs: int, steps: int) -> str:
    if batch is not None and work["batch"] != batch:
        return f"a batch of {work['batch']:,} images, {batch:,} in config.json"
    most, images = steps * work["batch"], work["images"]
    if not most - epochs * work["batch"] < images <= most:  # an epoch's last batch may be short
        return f"{images:,} images, and {steps:,} steps of at most {work['batch']:,} in summary.json"
    flops, rows = work["flops_per_image"] * work["batch"], work["reference"] or work["ops"]
    if abs(flops - sum(row["flops"] for row in rows)) > 0.01 * flops:
        return f"{flops:.4g} FLOPs a step, and its operations have {sum(row['flops'] for row in rows):.4g}"
    return ""


def _steps_wrong(record: dict[str, Any], counted: int, train_s: float) -> str:
    epochs, missed = record["epochs"], record["missed_steps"]
    if any(a >= b for epoch in epochs for a, b in itertools.pairwise(epoch)):
        return "a step ends before it begins"
    if missed:
        return f"{missed:,} steps were missed"
    timed = sum(max(len(epoch) - 1, 0) for epoch in epochs)
    if timed != counted:
        return f"{timed:,} steps, {counted:,} in summary.json"
    seconds = sum(epoch[-1] - epoch[0] for epoch in epochs if epoch) / 1e9
    return f"{seconds:.4g} s of steps in {train_s:.4g} s of training" if seconds > (1 + SAME_S) * train_s else ""


def _profile_wrong(run: "Run", batch: int | None) -> str:
    images, times, steps = run.profile["step_images"], run.profile["step_ns"], len(run.trace.steps)
    if not (len(images) == len(times) == steps):
        return f"{len(images)} counts and {len(times)} times of steps, {steps} steps in the trace"
    batch = batch or (run.work["batch"] if run.work else max(images))
    usual = min(batch, run.work["images"]) if run.work else batch
    if max(images) > batch or (run.summary["steps"] > 1 and max(images) < usual):
        return f"steps of {max(images):,} images, and a batch of {batch:,}"
    return ""


class Witness(NamedTuple):
    """Idle time of the training by the profiled pass alone: the gaps in its trace, less what its steps took longer.

    `blind` is the share of the gaps between steps that cannot be seen, since the step before or after is missing.
    """

    idle_ns: float
    blind: float


def witness(run: "Run", judged: Judged, gaps_ns: float, steps_ns: float, scale: float) -> Witness | None:
    """`gaps_ns`, scaled to the run like `scale` images of it for one of the pass; None for want of times of its steps.

    Busy times cancel out: with n for the profiled pass, gaps_n = steps_n - busy and idle = steps - busy.
    """
    index = {step.number: i for i, step in enumerate(run.trace.steps)}
    numbers = [step.number for step in judged.trace.steps]
    profiled_ns = scale * sum(run.profile["step_ns"][index[number]] for number in numbers)
    alone = 1 + sum(b - a > 1 for a, b in itertools.pairwise(numbers))
    return Witness(gaps_ns - (profiled_ns - steps_ns), alone / len(numbers))


_NEGATIVE = {
    "idle": "The kernels of the profiled pass took longer than the steps of the run.",
    "conv_inefficiency": "The convolutions were faster than this device was seen to sustain: the ceiling is too low.",
}
"""Why a term is below zero."""


def doubts(
    e: Evidence, terms: Sequence[Term], perturbation: float | None, seen: Witness | None, kernels: Sequence[Row]
) -> list[str]:
    """Sentences on figures that cannot be, for the head of the report; `kernels` are those of the profiled pass."""
    found = []
    total = e.training_ns
    for term in terms if total > 0 else ():
        share = term.ns / total
        name = term.to_json(total)["name"]
        if term.key == "residual" and abs(share) > RESIDUAL_DOUBT:
            found.append(
                f"{abs(share):.1%} of training {'is unexplained' if share > 0 else 'is counted twice'}, more than "
                f"{RESIDUAL_DOUBT:.0%}: steps took other times in the profiled pass than in the run. Profile it again "
                "on a machine that does nothing else."
            )
        elif term.key not in UNEXPLAINED and share < -NEGATIVE:
            found.append(
                f"{name[:1].upper()}{name[1:]} is {term.ns / 1e9:.3g} s, {share:.1%} of training. "
                + _NEGATIVE.get(term.key, "The records do not belong together.")
            )
        elif share > 1:
            why = " The ceiling is too low." if term.key in NECESSARY else ""
            found.append(f"{name[:1].upper()}{name[1:]} is {term.ns / 1e9:.3g} s, more than all of training.{why}")
    if perturbation is not None and not 1 - DISTURBED < perturbation < (math.inf if e.on_gpu else 1 + DISTURBED):
        found.append(
            f"A profiled step took {perturbation:.3g} times as long as a timed one: something else used this machine "
            "in one of the two. Profile again when it is idle."
        )
    idle = next((t.ns for t in terms if t.key == "idle"), None)
    if seen and idle is not None and abs(idle - seen.idle_ns) > IDLE_APART * e.steps_ns + seen.blind * abs(idle):
        found.append(
            f"Idle is {idle / 1e9:.3g} s by the steps and the kernels' times, and {seen.idle_ns / 1e9:.3g} s by the "
            "gaps between kernels in the trace: one of the two is wrong. Profile it again."
        )
    return found + _above_roofs(e, kernels)


def _above_roofs(e: Evidence, kernels: Sequence[Row]) -> list[str]:
    """A sentence if kernels did more than this device can in their time, even with what its cache spares it."""
    above = []
    for row in kernels:
        seconds = row.ns_per_step / row.calls_per_step / 1e9 if row.calls_per_step else 0
        moved = row.bytes or 0
        moved = max(moved - CACHE_BYTES, moved / FASTER_CACHE if moved > LARGE_BYTES else 0)
        needs = max((row.flops or 0) / (e.ceiling or math.inf), moved / (e.bandwidth or math.inf))
        if needs > ABOVE_ROOF * seconds:
            above.append(row)
    share = sum(row.share for row in above)
    if share <= ABOVE_SHARE:
        return []
    row = max(above, key=lambda row: row.share)
    return [
        f"Kernels of {share:.1%} of the time are faster than this device was seen to be ({row.name[:60]}: "
        f"{row.roof_fraction or 0:.3g} times its roof): the ceiling is too low. Measure again when the machine is "
        "idle: python -m profiling device --out RUN/records/ceilings.json, then python -m profiling report RUN."
    ]
