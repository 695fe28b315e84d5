"""`python -m profiling device`: what this device should do by its data sheet beside what it was measured to sustain."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from profiling.device.specifications import DTYPES
from profiling.output.errors import CommandError, NoDeviceError, OutOfMemoryError
from profiling.output.numbers import Number, measured, quoted, unavailable

if TYPE_CHECKING:
    import torch

    from profiling.device.ceilings import Ceiling, Ceilings
    from profiling.device.specifications import Specification
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
    """One ceiling, by the data sheet and as measured; the share of its windows that were under the power cap."""

    label: str
    quoted: Number
    measured: Number
    power_capped_share: float | None = None


def run(request: Request, terminal: "Terminal") -> int:
    """Do what was asked; the exit code. Raises CommandError."""
    _check(request)
    if request.listing:
        return _list(request, terminal)
    import torch

    from profiling.device.ceilings import measure
    from profiling.device.specifications import specification
    from profiling.output.files import write_json

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
    spec = specification(found.device) if device.type == "cuda" else None
    reason = _why_no_specification(device.type, found.device)
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
    """The one asked for, or the one that a training takes by itself."""
    import torch

    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _why_no_specification(device_type: str, name: str) -> str:
    if device_type != "cuda":
        return "a CPU has no entry in the table of specifications"
    return f"{name} is not in the table of specifications (--list); no other GPU stands in for it"


def rows(found: "Ceilings", spec: "Specification | None", reason: str) -> list[Row]:
    """Matrix products, the fastest convolution of each pass, copy and launch; without `spec` for the `reason` given."""

    def row(ceiling: "Ceiling", label: str) -> Row:
        source = f"best of {ceiling.samples} windows in {ceiling.seconds:.3g} s without a pause"
        figures = _quoted(ceiling, spec, reason), measured(ceiling.value, ceiling.unit, source)
        return Row(label, *figures, ceiling.power_capped_share)

    best = [
        max((c for c in found.convolutions if c.name == name), key=lambda c: c.value)
        for name in dict.fromkeys(c.name for c in found.convolutions)
    ]
    return [
        *(row(ceiling, f"{ceiling.name} {ceiling.shape}") for ceiling in found.gemm),
        *(row(ceiling, f"fastest {ceiling.name} {_layer(ceiling)}") for ceiling in best),
        row(found.copy, f"copy {found.copy.shape}"),
        row(found.launch, f"launch, {found.launch.shape}"),
    ]


def _quoted(ceiling: "Ceiling", spec: "Specification | None", reason: str) -> Number:
    if ceiling.unit == "s":
        return unavailable("s", "data sheets do not say")
    if spec is None:
        return unavailable(ceiling.unit, reason)
    if ceiling.unit == "B/s":
        return quoted(spec.bytes_per_s, "B/s", spec.source)
    peak = spec.flops_per_s.get(ceiling.arithmetic)
    if peak is None:
        return unavailable(ceiling.unit, f"{spec.name} has no unit for {ceiling.arithmetic}")
    return quoted(peak, ceiling.unit, f"{spec.source}; dense {ceiling.arithmetic}")


def document(found: "Ceilings", spec: "Specification | None", reason: str) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "version": 1,
        "specification": None if spec is None else asdict(spec),
        "figures": [
            {"label": row.label, "quoted": row.quoted.to_json(), "measured": row.measured.to_json()}
            for row in rows(found, spec, reason)
        ],
        "ceilings": found.to_json(),
    }


def _show(found: "Ceilings", spec: "Specification | None", reason: str, seconds: float, terminal: "Terminal") -> None:
    from profiling.device.ceilings import in_words

    title = f"{found.device}, {found.dtype}: each kept running for {seconds:g} s"
    cells = [_cells(row) for row in rows(found, spec, reason)]
    terminal.table(title, ("ceiling", "quoted", "measured", "of it", "power cap"), cells)
    if found.convolutions:
        _show_convolutions(found.convolutions, terminal)
    best = found.compute
    terminal.say(
        f"The roofs of a run here: {in_words(best.value, best.unit)} ({best.name} {best.shape}), "
        f"{in_words(found.bytes_per_s, 'B/s')} read plus written, {in_words(found.launch_s, 's')} a launch."
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
    by_layer: dict[str, dict[str, Ceiling]] = {}
    for ceiling in convolutions:
        by_layer.setdefault(_layer(ceiling), {})[ceiling.name] = ceiling
    batches = dict.fromkeys(ceiling.shape.partition(", ")[2] for ceiling in convolutions)
    passes = ("fprop", "dgrad", "wgrad")
    terminal.table(
        f"library convolutions, channels_last, {' and '.join(batches)}: TFLOP/s measured",
        ("layer", *passes),
        [
            (layer, *(f"{of[name].value / 1e12:.3g}" if name in of else "unavailable" for name in passes))
            for layer, of in by_layer.items()
        ],
    )


def _layer(ceiling: "Ceiling") -> str:
    """Of "64x32x32-64x3x3-s1, batch 512", the layer."""
    return ceiling.shape.partition(", ")[0]


def _cells(row: Row) -> tuple[str, ...]:
    from profiling.device.ceilings import in_words

    promised, seen = row.quoted.value, row.measured.value
    known = "unavailable" if promised is None else in_words(promised, row.quoted.unit)
    of_it = "" if promised is None else f"{seen / promised:.0%}"
    capped = "" if row.power_capped_share is None else f"{row.power_capped_share:.0%}"
    return row.label, known, in_words(seen, row.measured.unit), of_it, capped


def _list(request: Request, terminal: "Terminal") -> int:
    """The whole table of specifications."""
    from profiling.device.specifications import SPECIFICATIONS

    kinds = ("float16", "bfloat16", "tf32", "float32")
    terminal.table(
        "specifications (quoted): dense TFLOP/s with fp32 sums, memory GB/s, L2 MiB",
        ("GPU", "fp16", "bf16", "tf32", "fp32", "GB/s", "L2"),
        [
            (
                spec.name,
                *(f"{spec.flops_per_s[kind] / 1e12:g}" if kind in spec.flops_per_s else "-" for kind in kinds),
                f"{spec.bytes_per_s / 1e9:,.0f}",
                f"{spec.l2_bytes / 2**20:g}",
            )
            for spec in SPECIFICATIONS
        ],
    )
    for source, names in _by_source(SPECIFICATIONS).items():
        terminal.say(f"{', '.join(names)}: {source}")
    if request.json:
        terminal.put(json.dumps([asdict(spec) for spec in SPECIFICATIONS]))
    return 0


def _by_source(specifications: "Sequence[Specification]") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for spec in specifications:
        found.setdefault(spec.source, []).append(spec.name)
    return found
