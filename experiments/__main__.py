"""The article's experiments: python -m experiments NAME.

Arguments are checked before torch is imported; every experiment is a module of its own, imported when it is asked for.
"""

import importlib
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

Small = Annotated[bool, typer.Option("--small", help="Sizes that two CPU cores finish in minutes.")]
Out = Annotated[
    Path | None,
    typer.Option(help="The experiment's folder; goes on with what it holds. Default: runs/<time>-<name>."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the CIFAR-10 binary files, or its parent. Never written to.")
]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="Use generated images.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting everywhere. Repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Of initialisation, order and augmentation.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly the result's JSON on stdout.")]


@app.callback()
def main() -> None:
    """The article's claims, rerun: what each step buys, why a larger batch works, what forgetting looks like."""


@app.command()
def ladder(
    small: Small = False,
    out: Out = None,
    data_dir: DataDir = None,
    synthetic: Synthetic = False,
    settings: Settings = None,
    seed: Seed = None,
    as_json: Json = False,
    epochs_per_rung: Annotated[
        int | None, typer.Option(help="Time so many epochs of each rung, and extrapolate. Default: 4.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train each rung to its end, and say its accuracy.")] = False,
    cutout: Annotated[int, typer.Option(help="Cut squares of so many pixels out, on every rung.")] = 0,
) -> None:
    """Time each of the article's steps, and this project's.

    From the entry of 341 s to the last of 256 s, and on to the fused kernels: all in turns, on one machine.
    """
    _experiment(
        "ladder",
        lambda: Request(small, out, data_dir, synthetic, tuple(settings or ()), seed, as_json),
        epochs_per_rung=epochs_per_rung,
        full=full,
        cutout=cutout,
    )


@app.command()
def lr_finder(
    small: Small = False,
    out: Out = None,
    data_dir: DataDir = None,
    synthetic: Synthetic = False,
    settings: Settings = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Sweep the learning rate over one epoch, and suggest one.

    It rises exponentially; two rules read the curve.
    """
    _experiment("lr_finder", lambda: Request(small, out, data_dir, synthetic, tuple(settings or ()), seed, as_json))


@app.command()
def forgetting(
    small: Small = False,
    out: Out = None,
    data_dir: DataDir = None,
    synthetic: Synthetic = False,
    settings: Settings = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """The article's two experiments on catastrophic forgetting."""
    _experiment("forgetting", lambda: Request(small, out, data_dir, synthetic, tuple(settings or ()), seed, as_json))


@app.command()
def batch_size(
    small: Small = False,
    out: Out = None,
    data_dir: DataDir = None,
    synthetic: Synthetic = False,
    settings: Settings = None,
    seed: Seed = None,
    as_json: Json = False,
    evidence: Annotated[
        Path | None, typer.Option(help="Folder of a finished forgetting: say what limits each batch.")
    ] = None,
) -> None:
    """Time, accuracy and loss at batch sizes of 128 to 1024.

    The learning rate is scaled linearly.
    """
    _experiment(
        "batch_size",
        lambda: Request(small, out, data_dir, synthetic, tuple(settings or ()), seed, as_json),
        evidence=evidence,
    )


@app.command()
def steps(
    small: Small = False,
    out: Annotated[Path | None, typer.Option(help="A folder for steps.json.")] = None,
    data_dir: DataDir = None,
    settings: Settings = None,
    seed: Seed = None,
    as_json: Json = False,
    preset: Annotated[str | None, typer.Option(help="What to train. Default: fused on a GPU, laptop on a CPU.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Default: 128, 512 and 2048. Repeatable.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="eager, compiled, captured or plain. Default: all but plain. Repeatable.")
    ] = None,
    count: Annotated[int, typer.Option("--steps", min=1, help="Steps of one sample.")] = 20,
) -> None:
    """Images per second of a training step, run in several ways.

    Eagerly, compiled and captured in turns, and the idle share of the GPU; plain is the loop that a user would write.
    Without --data-dir on generated images, which take the same time.
    """
    _experiment(
        "steps",
        lambda: Request(small, out, data_dir, False, tuple(settings or ()), seed, as_json),
        preset_name=preset,
        batches=tuple(batch or (128, 512, 2048)),
        modes=tuple(mode or ("eager", "compiled", "captured")),
        steps=count,
    )


@app.command()
def reproduce(
    stage: Annotated[
        str | None, typer.Option(help="smoke (230 s), numbers (440 s) or peers (560 s). Default: all, in this order.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds that it may take, if not the stage's own. More stretches every limit.")
    ] = None,
    pack: Annotated[
        Path | None, typer.Option(help="Keep an archive, .tar.gz, of the folder here, without weights and data.")
    ] = None,
    small: Small = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder; goes on with what it holds. Default: results/<date>-<device>.")
    ] = None,
    data_dir: DataDir = None,
    synthetic: Synthetic = False,
    settings: Settings = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Everything worth measuring on this GPU, in one command.

    The most valuable first: does it work, how fast is it, what do others offer.
    """
    _experiment(
        "reproduce",
        lambda: Request(small, out, data_dir, synthetic, tuple(settings or ()), seed, as_json),
        stage=stage,
        budget=budget,
        pack=pack,
    )


@app.command()
def predictions(
    gpu: Annotated[str | None, typer.Option(help="H100 or H200. Default: a page for each.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of a reproduce: what it measured, beside what was predicted.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the pages' folders predictions-<gpu>. Default: results.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict each kernel's time on an H100 and an H200.

    And a step's: by a model, and by the machine code that the compiler makes.
    """
    _experiment("predictions", lambda: Request(json=as_json), gpu=gpu, against=against, out=out)


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
