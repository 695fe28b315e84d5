"""`python -m profiling device`: the ceilings of this device as measured, beside those of its data sheet."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from profiling.device.specifications import DTYPES, SPECIFICATIONS, Specification, specification
from profiling.output.errors import CommandError, NoDeviceError, OutOfMemoryError
from profiling.output.files import write_json
from profiling.output.numbers import Number, measured, quoted, unavailable
from profiling.output.units import show

if TYPE_CHECKING:
    import torch

    from profiling.device.ceilings import Ceiling, Ceilings
    from profiling.output.terminal import Terminal


@dataclass(frozen=True)
class Request:
    """The command line."""

    device: str = "auto"
    dtype: str | None = None
    seconds: float = 2.0
    out: Path | None = None
    json: bool = False
    listing: bool = False


class Row(NamedTuple):
    """One ceiling: by the data sheet, measured, and the share of its windows under the power cap."""

    label: str
    quoted: Number
    measured: Number
    power_capped_share: float | None = None


def run(request: Request, terminal: "Terminal") -> int:
    """Measure and show the ceilings, or list the specifications; returns the exit code. Raises CommandError."""
    _check(request)
    if request.listing:
        return _list(request, terminal)
    import torch  # a wrong command line has ended before this takes its second

    from profiling.device.ceilings import measure

    device = _device(request.device)
    dtype = _dtype(request.dtype, device)
    with terminal.out.status("measuring", spinner="line") as status:
        try:
            found = measure(device, dtype, request.seconds, say=status.update)
        except ValueError as error:
            raise CommandError(f"--dtype {request.dtype}: {error}") from None
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; end what else runs on the device, see `profiling doctor`") from None
        except RuntimeError as error:
            raise NoDeviceError(f"{device} cannot multiply {dtype}: {str(error).splitlines()[0]}") from None
    if request.out is not None:
        try:
            write_json(request.out, found.to_json())
        except OSError as error:
            raise CommandError(f"--out {request.out}: {error}") from None
    spec, reason = None, "a CPU has no entry in the table of specifications"
    if device.type == "cuda":
        spec = specification(found.device)
        reason = f"{found.device} is not in the table of specifications (--list); no other GPU stands in for it"
    _show(found, spec, reason, request.seconds, terminal)
    if request.json:
        terminal.put(json.dumps(document(found, spec, reason)))
    return 0


def _check(request: Request) -> None:
    if request.dtype not in (None, *DTYPES):
        raise CommandError(f"--dtype is {request.dtype!r}, expected {', '.join(DTYPES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", request.device):
        raise CommandError(f"--device is {request.device!r}, expected auto, cpu, cuda or cuda:N")
    if not (math.isfinite(request.seconds) and request.seconds > 0):
        raise CommandError(f"--seconds is {request.seconds}, expected a positive number")
    if request.out is not None and (request.out.is_dir() or not request.out.absolute().parent.is_dir()):
        raise CommandError(f"--out {request.out}: expected a file in a folder that exists")
    if request.listing and request.out is not None:
        raise CommandError("--list measures nothing; leave --out out")


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


def _dtype(name: str | None, device: "torch.device") -> "torch.dtype":
    """The dtype of this name; without one, a training's default on `device`."""
    import torch

    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def rows(found: "Ceilings", spec: Specification | None, reason: str) -> list[Row]:
    """Matrix products, the fastest convolution of each pass, copy and launch; without `spec` for the `reason` given."""

    def row(ceiling: "Ceiling", label: str) -> Row:
        source = f"best of {ceiling.samples} windows in {ceiling.seconds:.3g} s without a pause"
        seen = measured(ceiling.value, ceiling.unit, source)
        return Row(label, _quoted(ceiling, spec, reason), seen, ceiling.power_capped_share)

    fastest: dict[str, Ceiling] = {}
    for c in found.convolutions:
        fastest[c.name] = max(c, fastest.get(c.name, c), key=lambda c: c.value)
    return [
        *(row(c, f"{c.name} {c.shape}") for c in found.gemm),
        *(row(c, f"fastest {c.name} {_layer(c)}") for c in fastest.values()),
        row(found.copy, f"copy {found.copy.shape}"),
        row(found.launch, f"launch, {found.launch.shape}"),
    ]


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


def document(found: "Ceilings", spec: Specification | None, reason: str) -> dict[str, Any]:
    """The document of `--json`."""
    return {
        "version": 1,
        "specification": None if spec is None else asdict(spec),
        "figures": [
            {"label": row.label, "quoted": row.quoted.to_json(), "measured": row.measured.to_json()}
            for row in rows(found, spec, reason)
        ],
        "ceilings": found.to_json(),
    }


def _show(found: "Ceilings", spec: Specification | None, reason: str, seconds: float, terminal: "Terminal") -> None:
    title = f"{found.device}, {found.dtype}: each kept running for {seconds:g} s"
    cells = [_cells(row) for row in rows(found, spec, reason)]
    terminal.table(title, ("ceiling", "quoted", "measured", "of it", "power cap"), cells)
    if found.convolutions:
        _show_convolutions(found.convolutions, terminal)
    best = found.compute
    terminal.say(
        f"The roofs of a run here: {show(best.value, best.unit, 4)} ({best.name} {best.shape}), "
        f"{show(found.bytes_per_s, 'B/s', 4)} read plus written, {show(found.launch_s, 's')} a launch."
    )
    terminal.say(f"quoted: {f'unavailable, {reason}' if spec is None else f'{spec.source}; dense peaks'}")
    if found.sm_clock_mhz is not None:
        before, hot = ("unknown" if mhz is None else f"{mhz} MHz" for mhz in found.sm_clock_mhz)
        terminal.say(f"SM clock {before} before, {hot} hot")
    if found.reasons:
        terminal.warn(f"the device was held back by {', '.join(found.reasons)}: unhindered it may sustain more")
    for lack in found.lacks:
        terminal.warn(f"the library cannot run {lack}")


def _show_convolutions(convolutions: "Sequence[Ceiling]", terminal: "Terminal") -> None:
    passes = ("fprop", "dgrad", "wgrad")
    cells = []
    for layer, of_layer in groupby(convolutions, _layer):
        of = {c.name: f"{c.value / 1e12:.3g}" for c in of_layer}
        cells.append((layer, *(of.get(name, "unavailable") for name in passes)))
    batches = dict.fromkeys(c.shape.partition(", ")[2] for c in convolutions)
    title = f"library convolutions, channels_last, {' and '.join(batches)}: TFLOP/s measured"
    terminal.table(title, ("layer", *passes), cells)


def _layer(ceiling: "Ceiling") -> str:
    """The layer of "64x32x32-64x3x3-s1, batch 512"."""
    return ceiling.shape.partition(", ")[0]


def _cells(row: Row) -> tuple[str, ...]:
    promised, seen = row.quoted.value, row.measured.value
    known, of_it = "unavailable", ""
    if promised is not None:
        known, of_it = show(promised, row.quoted.unit, 4), f"{seen / promised:.0%}"
    capped = "" if row.power_capped_share is None else f"{row.power_capped_share:.0%}"
    return row.label, known, show(seen, row.measured.unit, 4), of_it, capped


def _list(request: Request, terminal: "Terminal") -> int:
    """The whole table of specifications."""
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
    if request.json:
        terminal.put(json.dumps([asdict(spec) for spec in SPECIFICATIONS]))
    return 0
