"""The profiler's command line: python -m profiling COMMAND.

Every command imports what it needs when it is called, so that a slip of the finger costs a moment and not seconds.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Where the time goes: micro-benchmarks of the kernels."""


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
) -> None:
    """Time every op at every layer shape of both networks, beside the best that PyTorch offers.

    Without a GPU PyTorch is timed on the CPU, and of the kernels what the compiler says is reported.
    """
    from profiling.bench_command import CommandError, Request, run
    from profiling.console import Terminal

    terminal = Terminal(json=json)
    try:
        code = run(Request(op, tuple(shape or ()), dtype, out, compare, json, tune, quick), terminal)
    except CommandError as error:
        terminal.error(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    app()
