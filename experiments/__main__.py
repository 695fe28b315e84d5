"""The article's experiments: python -m experiments NAME.

Arguments are checked before torch is imported; every experiment is a module of its own, imported when it is asked for.
"""

import functools
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

app = typer.Typer(**command_line.MANNERS, no_args_is_help=True)

Out = Annotated[
    Path | None,
    typer.Option(help="The experiment's folder; goes on with what it holds. Default: runs/<time>-<name>."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the CIFAR-10 binary files, or its parent. Never written to.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting everywhere. Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly the result's JSON on stdout.")]
SHARED: dict[str, tuple[Any, Any]] = {
    "small": (Annotated[bool, typer.Option("--small", help="Sizes that two CPU cores finish in minutes.")], False),
    "out": (Out, None),
    "data_dir": (DataDir, None),
    "synthetic": (Annotated[bool, typer.Option("--synthetic", help="Use generated images.")], False),
    "settings": (Settings, None),
    "seed": (Annotated[int | None, typer.Option(help="Of initialisation, order and augmentation.")], None),
    "as_json": (Json, False),
}
"""Type and default of the options that trainings share."""


def _training(command: Callable[..., None]) -> Callable[..., None]:
    """`command(read, **own)` with the options SHARED before its own; `read()` makes the Request of them."""
    signature = inspect.signature(command)
    own = {name: parameter for name, parameter in signature.parameters.items() if name != "read"}

    @functools.wraps(command)
    def with_shared(**given: Any) -> None:
        shared = {name: given.pop(name) for name in SHARED}
        json_asked, settings = shared.pop("as_json"), tuple(shared.pop("settings") or ())
        command(lambda: Request(**shared, settings=settings, json=json_asked), **given)

    kind = inspect.Parameter.KEYWORD_ONLY
    added = {
        name: inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in SHARED.items()
    }
    whole = added | {name: parameter.replace(kind=kind) for name, parameter in own.items()}
    with_shared.__signature__ = signature.replace(parameters=list(whole.values()))
    with_shared.__annotations__ = {name: parameter.annotation for name, parameter in whole.items()}
    del with_shared.__wrapped__  # typer reads the types of what is wrapped
    return with_shared


@app.callback()
def main() -> None:
    """The article's claims, rerun: what each step buys, why a larger batch works, what forgetting looks like."""


@app.command()
@_training
def ladder(
    read: Callable[[], Request],
    epochs_per_rung: Annotated[
        int | None, typer.Option(help="Time so many epochs of each rung, and extrapolate. Default: 4.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train each rung to its end, and say its accuracy.")] = False,
    cutout: Annotated[int, typer.Option(help="Cut squares of so many pixels out, on every rung.")] = 0,
) -> None:
    """Time each of the article's steps, and this project's.

    From the entry of 341 s to the last of 256 s, and on to the fused kernels: all in turns, on one machine.
    """
    _experiment("ladder", read, epochs_per_rung=epochs_per_rung, full=full, cutout=cutout)


@app.command()
@_training
def lr_finder(read: Callable[[], Request]) -> None:
    """Sweep the learning rate over one epoch.

    It rises exponentially; two rules read the curve.
    """
    _experiment("lr_finder", read)


@app.command()
@_training
def forgetting(read: Callable[[], Request]) -> None:
    """The article's two experiments on forgetting."""
    _experiment("forgetting", read)


@app.command()
@_training
def batch_size(
    read: Callable[[], Request],
    evidence: Annotated[
        Path | None, typer.Option(help="Folder of a finished forgetting: say what limits each batch.")
    ] = None,
) -> None:
    """Time, accuracy and loss at batch 128 to 1024.

    The learning rate is scaled linearly.
    """
    _experiment("batch_size", read, evidence=evidence)


@app.command()
@_training
def reproduce(
    read: Callable[[], Request],
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
    _experiment("reproduce", read, stage=stage, budget=budget, pack=pack)


@app.command()
def steps(
    preset: Annotated[
        str | None, typer.Option(help="Train this preset. Default: fused on a GPU, laptop on a CPU.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size. Repeatable. Default: 128, 512 and 2048.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="eager, compiled, captured or plain, a user's loop. Repeatable. Default: the first three."),
    ] = None,
    count: Annotated[int, typer.Option("--steps", min=1, help="Steps of one sample.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Few samples: a look, not a measurement to quote.")] = False,
    apart: Annotated[
        bool, typer.Option("--apart", help="Each mode twice in a process of its own, with its peak memory.")
    ] = False,
    settings: Settings = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="The folder for steps.json.")] = None,
    as_json: Json = False,
) -> None:
    """Images per second of a training step.

    Eager, compiled, captured, or the loop that a user would write; the share of the time that a GPU is idle.
    """
    _experiment(
        "steps",
        lambda: Request(out=out, data_dir=data_dir, settings=tuple(settings or ()), json=as_json),
        trained=preset,
        batches=batch or (128, 512, 2048),
        modes=mode or ("eager", "compiled", "captured"),
        steps=count,
        quick=quick,
        apart=apart,
    )


@app.command("collection-overhead")
def collection_overhead(
    pairs: Annotated[int, typer.Option(min=3, help="Turns.")] = 30,
    count: Annotated[int, typer.Option("--steps", min=1, help="Steps of a training.")] = 50,
    as_json: Json = False,
) -> None:
    """The cost of collecting a timed run's records.

    Steps timed with the collection and without, in turns.
    """
    _experiment("collection_overhead", lambda: Request(json=as_json), pairs=pairs, steps=count)


@app.command("longest-kernels", context_settings={"ignore_unknown_options": True})
def longest_kernels(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)],
    data: Annotated[list[str] | None, typer.Argument(help="train.py's words for its images, as --synthetic.")] = None,
) -> None:
    """The longest kernels of a run's step."""
    _experiment("longest_kernels", Request, folder=folder, data=tuple(data or ()))


@app.command("machine-code")
def machine_code(
    out: Annotated[
        Path | None, typer.Option(help="Write what the compiler says here, and leave docs/kernels.md as it is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Registers, spills and instructions of every kernel.

    As the compiler makes them of each layer, beside those of the first generation.
    """
    _experiment("machine_code", lambda: Request(json=as_json), out=out)


@app.command()
def tritons(
    versions: Annotated[
        list[str], typer.Argument(help="Versions, as 3.6.0, or folders that hold one.", show_default=False)
    ],
    arch: Annotated[list[int] | None, typer.Option(help="Only this architecture: 80, 90 or 100. Repeatable.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The table's folder; goes on with what it holds. Default: results/tritons.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel with other versions of Triton.

    For each architecture; and interpret some.
    """
    _experiment("tritons", lambda: Request(json=as_json), tritons=versions, architectures=tuple(arch or ()), out=out)


def _experiment(name: str, read: Callable[[], Request], **options: Any) -> None:
    """Check the request, run `experiments.<name>.run(request, terminal, interrupts, **options)` and exit.

    A module's `check(request, **options)`, where it has one, raises UsageError before torch is imported. `run` returns
    what --json prints. Any failure is one line on stderr and its exit code.
    """
    asked = []

    def check() -> None:
        request, module = read(), importlib.import_module(f"experiments.{name}")
        if hasattr(module, "check"):
            module.check(request, **options)
        asked.extend((request, module))

    if code := command_line.guarded(check, lambda error: print(f"error: {error}", file=sys.stderr)):
        raise typer.Exit(code)
    from profiling.output.terminal import Terminal

    request, module = asked
    interrupts, terminal, results = Interrupts(), Terminal(json=request.json), []
    interrupts.install()

    def tell(error: BaseException) -> None:
        interrupts.deferred = True
        if isinstance(error, Interrupted):
            terminal.say(f"{error}: what was done is kept; the same command with the same --out goes on")
        else:
            terminal.error(str(error))

    code = command_line.guarded(lambda: results.append(module.run(request, terminal, interrupts, **options)), tell)
    if code:
        raise typer.Exit(code)
    if request.json:
        terminal.put(json.dumps(results[0], indent=2, allow_nan=False))


if __name__ == "__main__":
    command_line.run(app)
