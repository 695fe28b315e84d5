"""`python -m profiling device`: the ceilings of this device as measured, beside those of its data sheet."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from profiling.device.specifications import DTYPES, SPECIFICATIONS, Specification, specification
from profiling.output.errors import CommandError, NoDeviceError, OutOfMemoryError
from profiling.output.files import write_json
from profiling.output.numbers import Number, measured, quoted, unavailable
from profiling.output.units import show

if TYPE_CHECKING:
    import torch

    from profiling.device.ceilings import Ceiling, Ceilings
    from profiling.output.terminal import Terminal


class Row(NamedTuple):
    """One ceiling: by the data sheet, measured, and the share of its windows under the power cap."""

    label: str
    quoted: Number
    measured: Number
    power_capped_share: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        promised, seen, capped = self.quoted.value, self.measured.value, self.power_capped_share
        known = "unavailable" if promised is None else show(promised, self.quoted.unit, 4)
        shares = ("" if share is None else f"{share:.0%}" for share in (promised and seen / promised, capped))
        return self.label, known, show(seen, self.measured.unit, 4), *shares


def run(
    device: str, dtype: str | None, seconds: float, out: Path | None, json: bool, listing: bool, terminal: "Terminal"
) -> int:
    """Measure and show the ceilings, or list the specifications; returns the exit code. Raises CommandError.

    The arguments are the options of the command line.
    """
    if dtype not in (None, *DTYPES):
        raise CommandError(f"--dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise CommandError(f"--device is {device!r}, expected auto, cpu, cuda or cuda:N")
    if not (math.isfinite(seconds) and seconds > 0):
        raise CommandError(f"--seconds is {seconds}, expected a positive number")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise CommandError(f"--out {out}: expected a file in a folder that exists")
    if listing and out is not None:
        raise CommandError("--list measures nothing; leave --out out")
    if listing:
        _list(json, terminal)
        return 0
    import torch  # a wrong command line has ended before this takes its second

    from profiling.device.ceilings import measure

    where = _device(device)
    kind = getattr(torch, dtype) if dtype else _default_dtype(where)
    with terminal.out.status("measuring", spinner="line") as status:
        try:
            found = measure(where, kind, seconds, say=status.update)
        except ValueError as error:
            raise CommandError(f"--dtype {dtype}: {error}") from None
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; end what else runs on the device, see `profiling doctor`") from None
        except RuntimeError as error:
            raise NoDeviceError(f"{where} cannot multiply {kind}: {str(error).splitlines()[0]}") from None
    if out is not None:
        try:
            write_json(out, found.to_json())
        except OSError as error:
            raise CommandError(f"--out {out}: {error}") from None
    spec, reason = None, "a CPU has no entry in the table of specifications"
    if where.type == "cuda":
        spec = specification(found.device)
        reason = f"{found.device} is not in the table of specifications (--list); no other GPU stands in for it"
    shown = list(rows(found, spec, reason))
    title = f"{found.device}, {found.dtype}: each kept running for {seconds:g} s"
    terminal.table(title, ("ceiling", "quoted", "measured", "of it", "power cap"), [row.cells() for row in shown])
    _show(found, f"unavailable, {reason}" if spec is None else f"{spec.source}; dense peaks", terminal)
    if json:
        figures = [{"label": r.label, "quoted": asdict(r.quoted), "measured": asdict(r.measured)} for r in shown]
        sheet = None if spec is None else asdict(spec)
        terminal.put(dumps({"version": 1, "specification": sheet, "figures": figures, "ceilings": found.to_json()}))
    return 0


def _device(name: str) -> "torch.device":
    import torch

    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise NoDeviceError(f"--device {name}: torch finds no CUDA GPU here; see `python -m profiling doctor`")
    index, count = int(name.partition(":")[2] or torch.cuda.current_device()), torch.cuda.device_count()
    if index >= count:
        there = "is one GPU, cuda:0" if count == 1 else f"are {count} GPUs, cuda:0 to cuda:{count - 1}"
        raise NoDeviceError(f"--device {name}: there {there}")
    return torch.device("cuda", index)


def _default_dtype(device: "torch.device") -> "torch.dtype":
    """The dtype of a training on `device`."""
    import torch

    if device.type == "cuda":
        return torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def rows(found: "Ceilings", spec: Specification | None, reason: str) -> Iterator[Row]:
    """Matrix products, the fastest convolution of each pass, copy and launch; without `spec` for the `reason` given."""
    fastest: dict[str, Ceiling] = {}
    for c in found.convolutions:
        fastest[c.name] = max(c, fastest.get(c.name, c), key=lambda c: c.value)
    for label, c in [
        *((f"{c.name} {c.shape}", c) for c in found.gemm),
        *((f"fastest {c.name} {_layer(c)}", c) for c in fastest.values()),
        (f"copy {found.copy.shape}", found.copy),
        (f"launch, {found.launch.shape}", found.launch),
    ]:
        source = f"best of {c.samples} windows in {c.seconds:.3g} s without a pause"
        yield Row(label, _quoted(c, spec, reason), measured(c.value, c.unit, source), c.power_capped_share)


def _quoted(ceiling: "Ceiling", spec: Specification | None, reason: str) -> Number:
    if ceiling.unit == "s":
        return unavailable("s", "data sheets do not say")
    if spec is None:
        return unavailable(ceiling.unit, reason)
    if ceiling.unit == "B/s":
        return quoted(spec.bytes_per_s, "B/s", spec.source)
    if ceiling.arithmetic not in spec.flops_per_s:
        return unavailable(ceiling.unit, f"{spec.name} has no unit for {ceiling.arithmetic}")
    return quoted(spec.flops_per_s[ceiling.arithmetic], ceiling.unit, f"{spec.source}; dense {ceiling.arithmetic}")


def _show(found: "Ceilings", source: str, terminal: "Terminal") -> None:
    """Every convolution, the roofs, the clocks, and what is missing."""
    if found.convolutions:
        passes, cells = ("fprop", "dgrad", "wgrad"), []
        for layer, of_layer in groupby(found.convolutions, _layer):
            of = {c.name: f"{c.value / 1e12:.3g}" for c in of_layer}
            cells.append((layer, *(of.get(name, "unavailable") for name in passes)))
        batches = dict.fromkeys(c.shape.partition(", ")[2] for c in found.convolutions)
        title = f"library convolutions, channels_last, {' and '.join(batches)}: TFLOP/s measured"
        terminal.table(title, ("layer", *passes), cells)
    best = found.compute
    terminal.say(
        f"The roofs of a run here: {show(best.value, best.unit, 4)} ({best.name} {best.shape}), "
        f"{show(found.bytes_per_s, 'B/s', 4)} read plus written, {show(found.launch_s, 's')} a launch."
    )
    terminal.say(f"quoted: {source}")
    if found.sm_clock_mhz is not None:
        before, hot = ("unknown" if mhz is None else f"{mhz} MHz" for mhz in found.sm_clock_mhz)
        terminal.say(f"SM clock {before} before, {hot} hot")
    if found.reasons:
        terminal.warn(f"the device was held back by {', '.join(found.reasons)}: unhindered it may sustain more")
    for lack in found.lacks:
        terminal.warn(f"the library cannot run {lack}")


def _layer(ceiling: "Ceiling") -> str:
    """The layer of "64x32x32-64x3x3-s1, batch 512"."""
    return ceiling.shape.partition(", ")[0]


def _list(json: bool, terminal: "Terminal") -> None:
    """Print the whole table of specifications."""
    kinds = ("float16", "bfloat16", "tf32", "float32")
    cells, by_source = [], {}
    for spec in SPECIFICATIONS:
        peaks = (f"{spec.flops_per_s[kind] / 1e12:g}" if kind in spec.flops_per_s else "-" for kind in kinds)
        cells.append((spec.name, *peaks, f"{spec.bytes_per_s / 1e9:,.0f}", f"{spec.l2_bytes / 2**20:g}"))
        by_source.setdefault(spec.source, []).append(spec.name)
    title = "specifications (quoted): dense TFLOP/s with fp32 sums, memory GB/s, L2 MiB"
    terminal.table(title, ("GPU", "fp16", "bf16", "tf32", "fp32", "GB/s", "L2"), cells)
    for source, names in by_source.items():
        terminal.say(f"{', '.join(names)}: {source}")
    if json:
        terminal.put(dumps([asdict(spec) for spec in SPECIFICATIONS]))
