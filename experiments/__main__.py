"""The article's experiments: python -m experiments NAME.

Arguments are checked before torch is imported; every experiment is a module of its own, imported when it is asked for.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.study.folder import Request
from model.interrupts import Interrupted, Interrupts
from profiling.output import command_line
from profiling.output.terminal import Terminal

app = typer.Typer(**command_line.MANNERS, no_args_is_help=True)

SHARED: dict[str, tuple[Any, Any]] = {
    "small": (Annotated[bool, typer.Option("--small", help="Sizes that two CPU cores finish in minutes.")], False),
    "out": (
        Annotated[
            Path | None,
            typer.Option(help="The experiment's folder; goes on with what it holds. Default: runs/<time>-<name>."),
        ],
        None,
    ),
    "data_dir": (
        Annotated[
            Path | None, typer.Option(help="Folder of the CIFAR-10 binary files, or its parent. Never written to.")
        ],
        None,
    ),
    "synthetic": (Annotated[bool, typer.Option("--synthetic", help="Use generated images.")], False),
    "settings": (
        Annotated[
            list[str] | None,
            typer.Option("--set", metavar="KEY=VALUE", help="Override a setting everywhere. Repeatable."),
        ],
        None,
    ),
    "seed": (Annotated[int | None, typer.Option(help="Of initialisation, order and augmentation.")], None),
    "json": (Annotated[bool, typer.Option("--json", help="Print exactly the result's JSON on stdout.")], False),
}
"""Type and default of the options that experiments share: the fields of a Request."""
KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _experiment(*shared: str, **manners: Any) -> Callable[[Callable[..., None]], None]:
    """Register a function as the command of the experiment of its name; its parameters are the options of `run`.

    The command takes the options of `shared` too, declared in SHARED or, where they differ, by the function; they are
    the Request. The function's docstring is the command's help.
    """

    def register(command: Callable[..., None]) -> None:
        options = {
            name: inspect.Parameter(name, KEYWORD, default=SHARED[name][1], annotation=SHARED[name][0])
            for name in shared
        }
        own = inspect.signature(command).parameters
        options |= {name: parameter.replace(kind=KEYWORD) for name, parameter in own.items()}

        def called(**given: Any) -> None:
            asked = {name: given.pop(name) for name in shared}
            _run(command.__name__, asked, given)

        called.__doc__ = command.__doc__
        called.__signature__ = inspect.Signature(list(options.values()))
        called.__annotations__ = {name: parameter.annotation for name, parameter in options.items()}
        app.command(command.__name__.replace("_", "-"), **manners)(called)

    return register


@app.callback()
def main() -> None:
    """The article's claims, rerun: what each step buys, why a larger batch works, what forgetting looks like."""


@_experiment(*SHARED)
def ladder(
    epochs_per_rung: Annotated[
        int | None, typer.Option(help="Time so many epochs of each rung, and extrapolate. Default: 4.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train each rung to its end, and say its accuracy.")] = False,
    cutout: Annotated[int, typer.Option(help="Cut squares of so many pixels out, on every rung.")] = 0,
) -> None:
    """Time each of the article's steps, and this project's.

    From the entry of 341 s to the last of 256 s, and on to the fused kernels: all in turns, on one machine.
    """


@_experiment(*SHARED)
def lr_finder() -> None:
    """Sweep the learning rate over one epoch.

    It rises exponentially; two rules read the curve.
    """


@_experiment(*SHARED)
def forgetting() -> None:
    """The article's two experiments on forgetting."""


@_experiment(*SHARED)
def batch_size(
    evidence: Annotated[
        Path | None, typer.Option(help="Folder of a finished forgetting: say what limits each batch.")
    ] = None,
) -> None:
    """Time, accuracy and loss at batch 128 to 1024.

    The learning rate is scaled linearly.
    """


@_experiment(*SHARED)
def reproduce(
    out: Annotated[
        Path | None, typer.Option(help="The folder; goes on with what it holds. Default: results/<date>-<device>.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="smoke (230 s), numbers (480 s) or peers (560 s). Default: all, in this order.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds that it may take, if not the stage's own. More stretches every limit.")
    ] = None,
    pack: Annotated[
        Path | None, typer.Option(help="Keep an archive, .tar.gz, of the folder here, without weights and data.")
    ] = None,
) -> None:
    """Everything worth measuring on this GPU.

    The most valuable first: does it work, how fast is it, what do others offer.
    """


@_experiment("settings", "data_dir", "out", "json")
def steps(
    trained: Annotated[
        str | None,
        typer.Option("--preset", help="Train this preset. Default: fused on a GPU, laptop on a CPU."),
    ] = None,
    batches: Annotated[list[int], typer.Option("--batch", min=1, help="Batch size. Repeatable.")] = (128, 512, 2048),
    modes: Annotated[
        list[str],
        typer.Option("--mode", help="eager, compiled, captured or plain, a user's loop. Repeatable."),
    ] = ("eager", "compiled", "captured"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of one sample.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Few samples: a look, not a measurement to quote.")] = False,
    apart: Annotated[
        bool, typer.Option("--apart", help="Each mode twice in a process of its own, with its peak memory.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder for steps.json.")] = None,
) -> None:
    """Images per second of a training step.

    Eager, compiled, captured, or the loop that a user would write; the share of the time that a GPU is idle.
    """


@_experiment("json")
def collection_overhead(
    pairs: Annotated[int, typer.Option(min=3, help="Turns.")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a training.")] = 50,
) -> None:
    """The cost of collecting a timed run's records.

    Steps timed with the collection and without, in turns.
    """


@_experiment(context_settings={"ignore_unknown_options": True})
def longest_kernels(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)],
    data: Annotated[list[str], typer.Argument(help="train.py's words for its images, as --synthetic.")] = (),
) -> None:
    """The longest kernels of a run's step."""


@_experiment("json")
def machine_code(
    out: Annotated[
        Path | None, typer.Option(help="Write what the compiler says here, and leave docs/kernels.md as it is.")
    ] = None,
) -> None:
    """Registers, spills and instructions of every kernel.

    As the compiler makes them of each layer, beside those of the first generation.
    """


@_experiment("json")
def tritons(
    tritons: Annotated[
        list[str], typer.Argument(help="Versions, as 3.6.0, or folders that hold one.", show_default=False)
    ],
    architectures: Annotated[
        list[int], typer.Option("--arch", help="Only this architecture: 80, 90 or 100. Repeatable.")
    ] = (),
    out: Annotated[
        Path | None, typer.Option(help="The table's folder; goes on with what it holds. Default: results/tritons.")
    ] = None,
) -> None:
    """Compile every kernel with other versions of Triton.

    For each architecture; and interpret some.
    """


def _run(name: str, asked: dict[str, Any], options: dict[str, Any]) -> None:
    """Check the request, run `experiments.<name>.run(request, terminal, interrupts, **options)` and exit.

    A module's `check(request, **options)`, where it has one, raises UsageError before torch is imported. `run` returns
    what --json prints. Any failure is one line on stderr and its exit code.
    """
    ready = []

    def check() -> None:
        request = Request(**{**asked, "settings": tuple(asked.get("settings") or ())})
        module = importlib.import_module(f"experiments.{name}")
        if hasattr(module, "check"):
            module.check(request, **options)
        ready.extend((request, module))

    if code := command_line.guarded(check, lambda error: print(f"error: {error}", file=sys.stderr)):
        raise typer.Exit(code)
    request, module = ready
    interrupts, terminal, results = Interrupts(), Terminal(json=request.json), []
    interrupts.install()

    def tell(error: BaseException) -> None:
        interrupts.deferred = True
        if isinstance(error, Interrupted):
            terminal.say(f"{error}: what was done is kept; the same command with the same --out goes on")
        else:
            terminal.error(str(error))

    if code := command_line.guarded(lambda: results.append(module.run(request, terminal, interrupts, **options)), tell):
        raise typer.Exit(code)
    if request.json:
        terminal.put(json.dumps(results[0], indent=2, allow_nan=False))


if __name__ == "__main__":
    command_line.run(app)
