"""Benchmarks on disk and in print: rows keyed by the machine that they were measured on.

A row is {"schema": 1, "kind": "timing" or "facts", "fingerprint", "machine", "git_sha", "git_dirty", "at", ...} with
the fields of `bench.Result` or `kernel_facts.KernelFacts`. Two timings are compared where their fingerprints are equal:
the same GPU under the same driver and libraries. The commit is not part of it, since that is what is compared.
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

    Raises ValueError where there are none, naming what differs, and for a file that this program did not write; OSError
    where it cannot be read.
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
    """The cases in `path` that a bench of this machine, commit, dtype and batch came to the end of.

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


def changes(then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[Change]:
    """What became of the timings that both have; of several, the last counts. Fingerprints must be equal already."""
    before = {_key(r): r for r in then if len(r["samples_us"]) >= FEWEST}
    return [
        Change(
            r["case"],
            r["provider"],
            r["mode"],
            before[_key(r)]["us"]["value"],
            r["us"]["value"],
            verdict(r["samples_us"], before[_key(r)]["samples_us"]),
        )
        for r in now
        if r["kind"] == "timing" and len(r["samples_us"]) >= FEWEST and _key(r) in before
    ]


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in KEY)


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
        c = setup.ceilings
        ceilings = (
            f"unavailable ({c.reason})"
            if c.gb_per_s is None
            else f"copy {c.gb_per_s:,.0f} GB/s, matrix product {c.tflops_per_s:,.0f} TFLOP/s "
            f"(measured{_capped(c.power_capped_share)})"
        )
        lines = [
            f"{gpu['name']}; {clocks}; driver {gpu['driver']}; {'; '.join(where)}",
            f"batch {setup.batch}, {setup.timer.source}; ceilings: {ceilings}",
        ]
    legend = "us measured, the median; ~ modelled, the least work that the op must do over that time; bound modelled"
    return [*lines, legend]


def lines(results: Sequence[Result]) -> list[str]:
    """A line for each result of a case: case | provider | us | TFLOP/s | GB/s | bound | x vs best alternative."""
    return [f"{r.case:<50} {r.mode:<4}  {r.provider:<19}  {_figures(r)}".rstrip() for r in results]


def _figures(r: Result) -> str:
    if r.us.status == UNAVAILABLE:
        return f"unavailable: {r.us.source}"
    us, tflops, gb = (_figure(number) for number in (r.us, r.tflops_per_s, r.gb_per_s))
    return f"{us:>10}  {tflops:>8}  {gb:>8}  {r.bound or '-':<7}  {_against(r)}{_capped(r.power_capped_share)}"


def _capped(share: float | None) -> str:
    """The mark of samples that were taken under the power cap; nothing where there were none."""
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
        "kernels at batch 512, from their machine code; local memory is where registers spill to; "
        "blocks/SM modelled from the architecture's limits"
    )
    names = ("case", "kernel", "for", "registers", "local B", "shared B", "blocks/SM", "instr/matrix step")
    return [title, _fact_cells(names), *(_fact_cells(_facts(f)) for f in facts)]


def _facts(f: KernelFacts) -> tuple[str, ...]:
    if f.status == UNAVAILABLE:
        return f.case, f.kernel, f.gpu, f"unavailable: {f.source}"
    counts = (f.registers, f.local_bytes, f.shared_bytes, f.blocks_per_sm)
    step = "-" if f.instructions_per_matrix_step is None else f"{f.instructions_per_matrix_step:.1f}"
    return f.case, f.kernel, f.gpu, *("unknown" if n is None else f"{n:,}" for n in counts), step


def _fact_cells(cells: Sequence[str]) -> str:
    case, kernel, gpu, *figures = cells
    return f"{case:<50} {kernel:<26} {gpu:<12}" + "".join(f"  {figure:>9}" for figure in figures)


def _figure(number: Number) -> str:
    figure = f"{number.value:,.1f}" if number.value >= 10 else f"{number.value:.3g}"
    return f"~{figure}" if number.status == MODELLED else figure
