"""The profiler's command line: python -m profiling COMMAND.

Each command imports its modules when it is called: a typo costs a moment and not the seconds of a torch import.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from profiling.bench import OPS
from profiling.device.specifications import DTYPES
from profiling.output import command_line

if TYPE_CHECKING:
    from profiling.output.terminal import Terminal

app = typer.Typer(**command_line.MANNERS, no_args_is_help=True)
CRASHED = 70
"""Exit code of an unforeseen failure (EX_SOFTWARE of sysexits.h); Python's own, 1, means a wrong kernel in `bench`."""


@app.callback()
def main() -> None:
    """Where the time goes: ceilings of the device, micro-benchmarks of the kernels, and what this machine lacks."""


@app.command()
def bench(
    op: Annotated[str | None, typer.Argument(help="One op; without it, all.", show_default=False)] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Only this layer, as 64x32x32-128x3x3-s2 or 64x32x32; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    out: Annotated[Path | None, typer.Option(help="Append the results to this file of JSON lines.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Compare with the results in this file; the same machine's only.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON; the table goes to stderr.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure tiles for the convolutions and refresh kernels/tiles.json.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A look: fewer samples, no max-autotune.")] = False,
    short: Annotated[
        bool,
        typer.Option("--short", help="As --quick, on a dozen cases that hold most of a training step's time: minutes."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the cases that --out holds of this machine and commit.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Time nothing: run each kernel once, on two images, on a GPU on 512 too, and hold it against float64.",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="With --check: processes at a time; 1 is this one alone, as compute-sanitizer needs it."),
    ] = None,
    images: Annotated[int | None, typer.Option(help="With --check: how many images.")] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="With --check: seconds without a result until a process is ended; 90, on a CPU 1800."),
    ] = None,
) -> None:
    """Time every op at every layer's shape, beside PyTorch's best.

    Without a GPU PyTorch is timed on the CPU, and of the kernels what the compiler says is reported.
    """
    from profiling.output.terminal import Terminal

    def run() -> int:
        command_line.require("op", op, OPS)
        command_line.require("--dtype", dtype, DTYPES)
        from profiling.bench.command import Request, run

        return run(Request(op, tuple(shape or ()), dtype, *options), terminal)

    terminal = Terminal(json=json)
    options = (out, compare, json, tune, quick, check, resume, short, jobs, images, limit)
    _end(run, terminal)


@app.command()
def device(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32; without it, what a training takes.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long each of some 25 candidates is kept running.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write the measured ceilings to this file, as JSON.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON; the tables go to stderr.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the table of specifications instead.")] = False,
) -> None:
    """Measure this device, beside its data sheet."""
    from profiling.device.command import run
    from profiling.output.terminal import Terminal

    terminal = Terminal(json=json)
    _end(lambda: run(device, dtype, seconds, out, json, listing, terminal), terminal)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON; the lines go to stderr.")] = False,
) -> None:
    """Check what this machine has and lacks for training and profiling.

    Each lack comes with its remedy. Always exits with 0.
    """
    from profiling.device.doctor import run
    from profiling.output.terminal import Terminal

    run(Terminal(json=json), json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run that train.py --profile wrote.")],
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with 9 if more than 2 % is unexplained, a part is missing, or it cannot be right."
        ),
    ] = False,
) -> None:
    """Account for a profiled run: report.html, .md and .json.

    Written into the run's folder, from its records.
    """
    from profiling.output.terminal import Terminal
    from profiling.report.command import run as make

    terminal = Terminal()
    _end(lambda: make(run, strict, terminal), terminal)


@app.command()
def collect(
    run: Annotated[Path, typer.Argument(help="Folder of a run that train.py wrote.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="The images that it was trained on; without it, data/ or generated ones.")
    ] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Take generated images.")] = False,
) -> None:
    """Profile a run that has ended, and report.

    One without records, or whose profiled pass was interrupted.
    """
    from profiling.output.terminal import Terminal
    from profiling.report.command import collect as profile

    terminal = Terminal()
    _end(lambda: profile(run, data_dir, synthetic, terminal), terminal)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of a profiled run, or its report.json.")],
    run_b: Annotated[Path, typer.Argument(help="Another.")],
    out: Annotated[Path | None, typer.Option(help="Draw the comparison as a page in this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two runs: each term's gain or loss from A to B."""
    from profiling.output.terminal import Terminal
    from profiling.report.compare import run

    terminal = Terminal(json=json)
    _end(lambda: run(run_a, run_b, out, json, terminal), terminal)


def _end(command: Callable[[], int], terminal: "Terminal") -> None:
    """Run `command` and exit; a failure is a line on stderr and its exit code."""
    try:
        code = command_line.guarded(command, lambda error: terminal.error(str(error)))
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = CRASHED
    sys.exit(code)


if __name__ == "__main__":
    command_line.run(app)
