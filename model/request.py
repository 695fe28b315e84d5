"""The command line of train.py: its options, and the `Request` that they make. Imports no torch."""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from model.config import Config, about_settings
from model.errors import CheckpointError, DataError, UsageError
from model.folder import is_empty
from model.presets import PRESETS, preset


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line, checked for contradictions as far as that needs no torch."""

    preset: str | None
    data_dir: Path | None
    download: bool
    synthetic: bool
    epochs: int | None
    runs: int
    seed: int | None
    out: Path | None
    resume: str | None
    evaluate: Path | None
    target_accuracy: float | None
    profile: bool
    ncu: bool
    ceilings: Path | None
    profile_pass: Path | None
    settings: list[str]
    json: bool

    def __post_init__(self) -> None:
        if self.synthetic and (self.data_dir or self.download):
            other = "--data-dir" if self.data_dir else "--download"
            raise UsageError(f"--synthetic and {other} contradict each other; give one of them")
        if self.runs < 1:
            raise UsageError(f"--runs {self.runs} is too small; it must be at least 1")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise UsageError(f"--target-accuracy {self.target_accuracy:g} is not a share in (0, 1], such as 0.94")
        if self.runs > 1 and self.resume not in (None, "auto"):
            raise UsageError("--runs continues with --resume auto; a single checkpoint belongs to a single run")
        if self.resume == "auto" and self.out is None:
            raise UsageError("--resume auto needs --out DIR: the folder of the run to go on with")
        for option, key in (("epochs", self.epochs), ("seed", self.seed)):
            if key is not None and any(s.partition("=")[0].strip() == option for s in self.settings):
                raise UsageError(f"--{option} and --set {option}= contradict each other; give one of them")
        if self.evaluate and (self.resume or self.runs > 1 or self.epochs or self.preset):
            raise UsageError(
                "--evaluate takes the network from its checkpoint: leave out --preset, --epochs, --runs, --resume"
            )
        if self.profile and (self.evaluate or self.resume or self.runs > 1):
            raise UsageError("--profile accounts for one whole run: leave out --evaluate, --resume and --runs")
        if self.ncu and not (self.profile or self.profile_pass):
            raise UsageError("--ncu adds counters to the report of a profiled run; give --profile too")
        if self.ceilings and not self.profile:
            raise UsageError("--ceilings takes the place of a measurement for the report; give --profile too")
        if self.profile and "RANK" in os.environ:
            raise UsageError("--profile accounts for one process; profile it without torchrun")
        # A wrong value is answered now, whatever the default will be.
        self.configure(preset("laptop" if self.preset is None else self.preset))
        self._require_paths()
        if self.out and not self.resume and self.out.exists():
            if not self.out.is_dir():
                raise UsageError(f"--out {self.out} is not a folder; name a new one")
            require_empty(self.out)
        _require_launch()

    def _require_paths(self) -> None:
        """Refuse paths that do not exist before anything is loaded or downloaded."""
        for checkpoint in (self.evaluate, None if self.resume == "auto" else self.resume):
            if checkpoint and not Path(checkpoint).exists():
                raise CheckpointError(f"{checkpoint} does not exist; name a checkpoint, or the folder of a run")
        if self.ceilings and not self.ceilings.exists():
            raise UsageError(f"--ceilings {self.ceilings} does not exist; profiling device --out FILE makes one")
        if self.data_dir and not self.data_dir.exists() and not self.download:
            raise DataError(f"--data-dir {self.data_dir} does not exist; name a folder with CIFAR-10, or --download")

    def configure(self, base: Config) -> Config:
        """`base` with what the command line says on top."""
        config = base.with_settings(self.settings)
        if self.epochs is not None:
            config = config.with_epochs(self.epochs)
        if self.seed is not None:
            config = dataclasses.replace(config, seed=self.seed)
        return config

    def data_arguments(self, identity: str) -> list[str]:
        """The words by which another process loads the same data, without asking the network for it."""
        if identity == "synthetic":
            return ["--synthetic"]
        return ["--data-dir", str((self.data_dir or Path("data")).absolute())]

    def go_on(self, out: Path, world: int, identity: str) -> str:
        """A sentence: what to type to go on with the stopped run in `out`, on the same data and processes."""
        if not any(out.glob("checkpoint-*.json")):
            return "stopped before anything was saved; start again with a new --out"
        words = ["torchrun", "--standalone", "--nproc-per-node", str(world)] if world > 1 else ["python"]
        words += ["train.py", "--out", str(out), "--resume", "auto"]
        if self.data_dir or identity == "synthetic":
            words += self.data_arguments(identity)
        return f"stopped; go on with: {shlex.join(words)}"


def require_empty(out: Path) -> None:
    """Raise UsageError if a run has written to `out`."""
    if not is_empty(out):
        raise UsageError(f"--out {out} is not empty; name a new folder, or go on with --resume auto")


def _require_launch() -> None:
    """Raise UsageError unless the environment is torchrun's, or has nothing of it."""
    given = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    for name, value in given.items():
        if not re.fullmatch("[0-9]{1,6}", value):
            raise UsageError(f"{name}={value!r} in the environment is no whole number; unset it, or start by torchrun")
    rank, world = given.get("RANK", "0"), given.get("WORLD_SIZE", "1000000")
    if int(rank) >= int(world):
        raise UsageError(
            f"RANK={rank} in the environment is not below WORLD_SIZE={world}; unset both, or start by torchrun"
        )


def presets_in_words(as_json: bool = False) -> str:
    """Every preset, with its first facts; as JSON, whole."""
    if as_json:
        return json.dumps({name: make().to_json() for name, make in PRESETS.items()}, indent=2)
    lines = []
    for name, make in PRESETS.items():
        c = make()
        lines += [
            f"{name:<12} {c.network} {'-'.join(map(str, c.widths))}, {c.epochs} epochs at batch {c.batch_size}, "
            f"peak rate {max(c.lr_values):g}, preprocess={c.preprocess}, workers={c.workers}",
            f"{'':<12} {make.__doc__.splitlines()[0]}",
        ]
    return "\n".join(lines)


def settings_in_words(config: Config) -> str:
    """Every setting with its value in `config`, and its meaning."""
    rows = [*about_settings(config), ("lr=PEAK", "scales lr_values to that peak")]
    return "\n".join(f"{assignment:<34} {about}" for assignment, about in rows)


def command(take: Callable[[Callable[[], Request | str]], Any], version: Callable[[], str]) -> Callable[..., Any]:
    """The function whose signature typer reads as the options. It returns `take(read)`.

    `read()` is the checked Request, or the text of a listing; it raises RunError. `version()` is the text of --version.
    """

    def main(
        preset_name: Annotated[
            str | None, typer.Option("--preset", help="What to train; --list shows them. Default: by the device.")
        ] = None,
        data_dir: Annotated[
            Path | None, typer.Option(help="Folder of the CIFAR-10 binary files, or its parent. Never written to.")
        ] = None,
        download: Annotated[bool, typer.Option("--download", help="Fetch the official archive there first.")] = False,
        synthetic: Annotated[bool, typer.Option("--synthetic", help="Use generated images.")] = False,
        epochs: Annotated[int | None, typer.Option(help="Stretch the schedule to so many epochs.")] = None,
        runs: Annotated[int, typer.Option(help="Train so many times, with consecutive seeds.")] = 1,
        seed: Annotated[int | None, typer.Option(help="Of initialisation, order and augmentation.")] = None,
        out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<time>-<preset>.")] = None,
        resume: Annotated[str | None, typer.Option(help="auto (newest checkpoint in --out), or a checkpoint.")] = None,
        evaluate: Annotated[Path | None, typer.Option(help="Only test this checkpoint.")] = None,
        target_accuracy: Annotated[float | None, typer.Option(help="Exit with 7 below this, such as 0.94.")] = None,
        profiled: Annotated[
            bool, typer.Option("--profile", help="Account for every second: report.html in the run's folder.")
        ] = False,
        counters: Annotated[
            bool, typer.Option("--ncu", help="With --profile: DRAM bytes and tensor activity by Nsight Compute.")
        ] = False,
        ceilings: Annotated[
            Path | None,
            typer.Option(help="With --profile: what profiling device --out measured here, not to do it again."),
        ] = None,
        profile_pass: Annotated[Path | None, typer.Option(hidden=True)] = None,
        settings: Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar="KEY=VALUE", help="Override a setting; --list-settings has them. Repeatable."
            ),
        ] = None,
        batch_size: Annotated[str | None, typer.Option(help="As --set batch_size=.")] = None,
        lr: Annotated[str | None, typer.Option(help="The schedule's peak: as --set lr=.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print exactly summary.json on stdout.")] = False,
        show_list: Annotated[bool, typer.Option("--list", help="Show the presets.")] = False,
        show_settings: Annotated[
            bool, typer.Option("--list-settings", help="Show every setting, of --preset if one is given.")
        ] = False,
        show_version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    ) -> Any:
        settings = settings or []
        settings += [f"{key}={value}" for key, value in (("batch_size", batch_size), ("lr", lr)) if value is not None]

        def read() -> Request | str:
            if show_list or show_settings or show_version:
                config = preset("laptop" if preset_name is None else preset_name).with_settings(settings)
                if show_list:
                    return presets_in_words(as_json)
                return settings_in_words(config) if show_settings else version()
            return Request(
                *(preset_name, data_dir, download, synthetic, epochs, runs, seed, out, resume, evaluate),
                *(target_accuracy, profiled, counters, ceilings, profile_pass, settings, as_json),
            )

        return take(read)

    return main
