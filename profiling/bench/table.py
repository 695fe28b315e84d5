"""Benchmarks on disk and in print: rows keyed by their machine.

A row is {"schema": 1, "kind": "timing" or "facts", "fingerprint", "machine", "git_sha", "git_dirty", "at", ...} with
the fields of `measure.Result` or `kernel_facts.KernelFacts`. Two timings are compared where their fingerprints are
equal: the same GPU, driver and libraries. The commit is not part of it: commits are compared.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kernels.contract import dtype_name
from profiling.bench.kernel_facts import KernelFacts
from profiling.bench.measure import OURS, Result, Setup
from profiling.bench.timing import FEWEST, Verdict, verdict
from profiling.device.environment import fingerprint, machine
from profiling.device.nvml import POWER_CAP
from profiling.output.files import read_jsonl
from profiling.output.numbers import MODELLED, UNAVAILABLE, Number

SCHEMA = 1
KEY = ("case", "dtype", "batch", "provider", "mode")
COLUMNS = ("us", "TFLOP/s", "GB/s", "bound", "x vs best alternative")


def row(item: Result | KernelFacts, environment: dict[str, Any]) -> dict[str, Any]:
    """The record of `item`, as JSON holds it."""
    about = machine(environment)
    return {
        "schema": SCHEMA,
        "kind": "timing" if isinstance(item, Result) else "facts",
        "fingerprint": fingerprint(about),
        "machine": about,
        "git_sha": environment["git_sha"],
        "git_dirty": environment["git_dirty"],
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **dataclasses.asdict(item),
    }


def load(path: Path, machine_now: dict[str, Any]) -> list[dict[str, Any]]:
    """The timings in `path` of the machine described by `machine_now`.

    Raises ValueError where there are none, naming the differences, and for a file of another program; OSError where it
    cannot be read.
    """
    rows = read_jsonl(path)
    if not all(isinstance(r, dict) and r.get("schema") == SCHEMA for r in rows):
        raise ValueError(
            f"{path}: expected rows with schema {SCHEMA}, as `python -m profiling bench --out` writes them"
        )
    timings = [r for r in rows if r["kind"] == "timing"]
    if not timings:
        raise ValueError(f"{path} has no timings to compare with")
    here = fingerprint(machine_now)
    same = [r for r in timings if r["fingerprint"] == here]
    if not same:
        there = timings[-1]["machine"]
        differences = [
            f"{name}: {there.get(name)} there, {machine_now.get(name)} here"
            for name in dict.fromkeys((*there, *machine_now))
            if there.get(name) != machine_now.get(name)
        ]
        raise ValueError(
            f"{path} is from another machine ({'; '.join(differences)}): its times say nothing about this one"
        )
    return same


def finished(path: Path, environment: dict[str, Any], setup: Setup) -> set[str]:
    """The cases in `path` that a bench of this machine, commit, dtype and batch has finished.

    Raises ValueError for a damaged file, OSError where it cannot be read.
    """
    here = (fingerprint(machine(environment)), environment["git_sha"], dtype_name(setup.dtype))
    try:
        return {
            r["case"]
            for r in read_jsonl(path)
            if r["kind"] == "timing"
            and (r["fingerprint"], r["git_sha"], r["dtype"], r["batch"]) == (*here, setup.batch)
            and (r["provider"], r["mode"]) == (OURS, setup.timer.modes[-1])  # the last of a case
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected rows as `python -m profiling bench --out` writes them ({error})") from None


class Change(NamedTuple):
    """One provider of one case, then and now; `verdict.speedup` is then over now, above 1 where it became faster."""

    case: str
    provider: str
    mode: str
    then_us: float
    now_us: float
    verdict: Verdict

    def __str__(self) -> str:
        word, speedup, low, high = self.verdict
        times = f"{self.then_us:,.1f} -> {self.now_us:,.1f} us  {speedup:.2f} [{low:.2f}, {high:.2f}] {word}"
        return f"{self.case:<50} {self.mode:<4}  {self.provider:<19}  {times}"


def changes(then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[Change]:
    """The changes of the timings in both; the last of several counts. Fingerprints must be equal already."""

    def by_key(rows: Sequence[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
        timed = (r for r in rows if r["kind"] == "timing" and len(r["samples_us"]) >= FEWEST)
        return {tuple(r[name] for name in KEY): r for r in timed}

    before, found = by_key(then), []
    for key, r in by_key(now).items():
        if old := before.get(key):
            judged = verdict(r["samples_us"], old["samples_us"])
            found.append(Change(r["case"], r["provider"], r["mode"], old["us"]["value"], r["us"]["value"], judged))
    return found


def heading(environment: dict[str, Any], setup: Setup) -> list[str]:
    """The first lines: GPU, clocks, driver, torch, triton, commit; how it is timed; what the columns mean."""
    e, gpu = environment, environment["gpu"]
    dirty = {True: " (dirty)", False: "", None: ""}[e["git_dirty"]]
    where = [f"torch {e['packages']['torch']}", f"triton {e['packages']['triton']}", f"git {e['git_sha']}{dirty}"]
    if gpu is None:
        lines = [
            f"no CUDA GPU; {e['cpu']}, {e['threads']} threads; {'; '.join(where)}",
            f"CPU reference timings of PyTorch at batch {setup.batch}, {setup.timer.source}; no GPU did this",
        ]
    else:
        clocks = f"SM {gpu['sm_clock_mhz']} MHz, memory {gpu['memory_clock_mhz']} MHz, limit {gpu['power_limit_w']} W"
        ceilings, c = f"unavailable ({setup.ceilings})", setup.ceilings
        if not isinstance(c, str):
            held = "".join(f", {reason}" for reason in c.reasons or () if reason != POWER_CAP)
            rates = f"copy {c.bytes_per_s / 1e9:,.0f} GB/s, matrix product {c.flops_per_s / 1e12:,.0f} TFLOP/s"
            ceilings = f"{rates} (measured{_capped(c.compute.power_capped_share)}{held})"
        lines = [
            f"{gpu['name']}; {clocks}; driver {gpu['driver']}; {'; '.join(where)}",
            f"batch {setup.batch}, {setup.timer.source}; ceilings: {ceilings}",
        ]
    return [*lines, "us measured, the median; ~ modelled, the op's least work over that time; bound modelled"]


def lines(results: Sequence[Result]) -> list[str]:
    """A line for each result of a case: case | provider | us | TFLOP/s | GB/s | bound | x vs best alternative."""
    return [f"{r.case:<50} {r.mode:<4}  {r.provider:<19}  {_figures(r)}".rstrip() for r in results]


def _figures(r: Result) -> str:
    if r.us.status == UNAVAILABLE:
        return f"unavailable: {r.us.source}"
    us, tflops, gb = (_figure(number) for number in (r.us, r.tflops_per_s, r.gb_per_s))
    return f"{us:>10}  {tflops:>8}  {gb:>8}  {r.bound or '-':<7}  {_against(r)}{_capped(r.power_capped_share)}"


def _capped(share: float | None) -> str:
    """The mark of samples under the power cap; empty where there were none."""
    return f", power cap in {share:.0%} of the samples" if share else ""


def header() -> str:
    """The names of the columns of `lines`."""
    us, tflops, gb, bound, against = COLUMNS
    return f"{'case':<50} {'':<4}  {'provider':<19}  {us:>10}  {tflops:>8}  {gb:>8}  {bound:<7}  {against}"


def _against(r: Result) -> str:
    if r.provider != OURS or r.speedup is None:
        return ""
    interval = f"[{r.speedup_low:.2f}, {r.speedup_high:.2f}]"
    unsure = "" if r.converged else ", not converged"
    return f"{r.speedup.value:.2f} {interval} {r.verdict} vs {r.best_alternative}{unsure}"


def fact_lines(facts: Sequence[KernelFacts]) -> list[str]:
    """A title, the names of the columns, and a line for each kernel."""
    title = (
        "kernels at batch 512, from their machine code; local memory takes spilled registers; "
        "blocks/SM modelled from the architecture's limits"
    )
    cells = [("case", "kernel", "for", "registers", "local B", "shared B", "blocks/SM", "instr/matrix step")]
    for f in facts:
        figures = [f"unavailable: {f.source}"]
        if f.status != UNAVAILABLE:
            counts = (f.registers, f.local_bytes, f.shared_bytes, f.blocks_per_sm)
            step = "-" if f.instructions_per_matrix_step is None else f"{f.instructions_per_matrix_step:.1f}"
            figures = [*("unknown" if n is None else f"{n:,}" for n in counts), step]
        cells.append((f.case, f.kernel, f.gpu, *figures))
    lines = (
        f"{case:<50} {kernel:<26} {gpu:<12}" + "".join(f"  {n:>9}" for n in rest) for case, kernel, gpu, *rest in cells
    )
    return [title, *lines]


def _figure(number: Number) -> str:
    figure = f"{number.value:,.1f}" if number.value >= 10 else f"{number.value:.3g}"
    return f"~{figure}" if number.status == MODELLED else figure
