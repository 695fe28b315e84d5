"""Train the article's network on CIFAR-10: the command line, and the run.

Arguments are checked before torch is imported, so that a slip of the finger costs a moment and not seconds.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from model.interrupts import Interrupted, Interrupts, end_at_once, follow

if __name__ == "__main__":
    end_at_once()

import typer

from model import folder as run_folder
from model.config import PRESETS, Config, about_settings, preset
from model.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    NonFiniteError,
    OutOfMemoryError,
    RunError,
    TargetMissedError,
    UsageError,
    WorkerError,
)
from profiling import ROOT
from profiling.output import command_line

if TYPE_CHECKING:
    import torch

    from model.checkpoint import Checkpoint
    from model.data.cifar10 import Dataset
    from model.distributed import Ranks
    from model.trainer import Trainer
    from profiling.device.ceilings import Ceilings
    from profiling.output.terminal import Terminal
    from profiling.run.collect import Collection
    from profiling.run.log import RunLog

STARTED_NS, PARENT = time.monotonic_ns(), os.getppid()
TARGET = 0.94
"""The accuracy that the article and DAWNBench train to."""
PROFILER_BYTES = 2 << 30
"""Memory that a profiled pass on a CPU may come to need besides the run's own."""

_STATUS = {
    Interrupted: "interrupted",
    NonFiniteError: "non-finite",
    OutOfMemoryError: "out of memory",
    TargetMissedError: "target missed",
}


@dataclasses.dataclass(frozen=True)
class Session:
    """What the runs of one process share: data, device, ranks, and whom to tell."""

    dataset: "Dataset"
    device: "torch.device"
    ranks: "Ranks"
    terminal: "Terminal"
    interrupts: Interrupts


def run(
    session: Session,
    config: Config,
    out: Path,
    checkpoint: "Checkpoint | None" = None,
    target: float | None = None,
    on_step: Callable[[int], None] = lambda number: None,
    started_ns: int | None = None,
    require_ops: bool = False,
    collect: bool = False,
) -> dict[str, Any]:
    """Train `config` in the folder `out`, from `checkpoint` if there is one; returns what summary.json holds.

    `on_step(number)` is called after each step; `started_ns` is when the run began on `time.monotonic_ns`, if not now.
    Where the kernels cannot run, the reference ops do, after a banner; with `require_ops` DeviceError is raised.
    With `collect` it leaves `profiling.run.collect`'s records of phases, steps and GPU, for `profile` to go on with.
    Raises Interrupted with the work saved, NonFiniteError, OutOfMemoryError, CheckpointError if the last checkpoint
    could not be written, TargetMissedError below the accuracy `target`; summary.json then says so too.
    """
    from model.memory import out_of_memory, peak
    from model.trainer import build_network, choose_dtype, step_mode, triton_conv_share, with_available_ops
    from profiling.account.work import flops_per_image
    from profiling.device.environment import device_name, environment
    from profiling.run.clock import Clock
    from profiling.run.log import RunLog

    ranks, device, ops_requested = session.ranks, session.device, config.ops
    config, reason = with_available_ops(config, device, session.terminal.say, ranks)
    if reason and require_ops:
        raise DeviceError(
            f"the kernels of ops={ops_requested} cannot run here: {reason}; use --set ops=reference, or another machine"
        )
    if reason:
        session.terminal.banner(
            f"REFERENCE OPS, NOT {ops_requested.upper()}",
            f"{config.preset} asks for ops={ops_requested}, and the kernels cannot run here: {reason}. "
            "The same network is trained with the library's convolutions and batch norm.",
        )
    dtype = choose_dtype(config.dtype, device, config.ops)
    clock = Clock("set-up", started_ns)
    if device.type == "cuda":
        import torch

        clock.synchronize = lambda: torch.cuda.synchronize(device)
    machine = environment(device, ROOT)
    facts = {
        "preset": config.preset,
        "data_identity": session.dataset.identity,
        "data_source": session.dataset.source,
        "device": device_name(device),
        "world_size": ranks.world,
        "dtype": str(dtype).removeprefix("torch."),
        "ops": config.ops,
        "ops_requested": ops_requested,
        "triton_conv_share": triton_conv_share(config, dtype, device),
        "step": None,
        "step_requested": step_mode(config, device),
        "seed": config.seed,
        "git_sha": machine["git_sha"],
    }
    log = RunLog(
        out,
        clock,
        facts,
        flops_per_image(lambda: build_network(dataclasses.replace(config, ops="reference", conv="table"))).training,
        checkpoint.state.to_json() if checkpoint else {},
        ranks.is_first,
        session.terminal.warn,
    )
    with own(session, out):
        log.begin(config.to_json(), machine)
        trainer, collection = None, None
        if collect:
            from profiling.run.collect import Collection

            collection = Collection(out, device, session.terminal.warn)
        try:
            trainer = _prepare(session, config, dtype, checkpoint, log)
            _train(session, trainer, out, log, on_step, collection)
            accuracy = log.history[-1]["test_accuracy"]
            if target is not None and accuracy < target:
                raise TargetMissedError(f"test accuracy {accuracy:.2%} is below the target of {target:.2%}")
            status, error = "complete", None
        except BaseException as raised:  # whatever it is, the summary says so before it goes on
            error = out_of_memory(raised, device, config.batch_size) or raised
            status = _STATUS.get(type(error), "failed")
        steps, images, recorded = 0, 0, 0
        if trainer:
            steps, images, recorded = trainer.step.number, trainer.images_seen(), trainer.recorded_bytes()
        if error:
            clock.synchronize = lambda: None  # a device that has failed raises again whoever waits for it
        clock.stop()
        if collection:
            collection.finish(clock)
        code = getattr(error, "exit_code", 1) if error else 0
        summary = log.finish(status, code, steps, images, *peak(device, recorded))
        if error:
            error.summary = summary
            raise error
        return summary


@contextlib.contextmanager
def own(session: Session, out: Path) -> Iterator[None]:
    """Make `out`, keep other processes from it, and clear it of what a killed one left. The first rank does, for all.

    Raises UsageError where `out` cannot be made, or is another process's.
    """
    if not session.ranks.is_first:
        yield
        return
    from model.checkpoint import clean

    run_folder.make(out)
    with run_folder.hold(out, session.terminal.warn):
        clean(out)
        yield


def _prepare(
    session: Session, config: Config, dtype: "torch.dtype", checkpoint: "Checkpoint | None", log: "RunLog"
) -> "Trainer":
    from model.data.batches import Batches
    from model.memory import forget_peak
    from model.trainer import Trainer

    dataset, ranks = session.dataset, session.ranks
    log.clock.switch("preprocessing")
    warn = session.terminal.warn if ranks.is_first else lambda text: None
    batches = Batches(
        dataset.train_images, dataset.train_labels, config, session.device, dtype, ranks.rank, ranks.world, warn
    )
    log.clock.switch("set-up")
    trainer = Trainer(batches, dataset, ranks)
    if not ranks.all_equal(json.dumps(checkpoint.state.to_json(), sort_keys=True) if checkpoint else ""):
        raise CheckpointError("the processes found different checkpoints; put --out where all of them can read it")
    if checkpoint:
        trainer.restore(checkpoint.tensors, checkpoint.step)
    if session.device.type == "cuda" or trainer.step_requested != "eager":
        log.clock.switch("warm-up")
        reason = trainer.warm_up(session.terminal.say)
        if reason:
            warn(f"the training step runs eagerly, not {trainer.step_requested}: {reason}")
        log.clock.switch("set-up")
    forget_peak(session.device)
    log.facts["step"] = trainer.step_mode
    ranks.wait()
    return trainer


def _train(
    session: Session,
    trainer: "Trainer",
    out: Path,
    log: "RunLog",
    on_step: Callable[[int], None],
    collection: "Collection | None",
) -> None:
    from profiling.run.log import COLUMNS, cells

    config, clock, ranks, interrupts = trainer.config, log.clock, session.ranks, session.interrupts
    session.terminal.header(COLUMNS)
    for row in log.history:
        session.terminal.row(cells(row), "dim")

    def stop_if_asked() -> None:
        requested = ranks.any(interrupts.requested)
        if requested:
            _save(session, trainer, out, log, final=True)
            raise Interrupted(requested)

    def saved_without_workers(steps: Iterator[int]) -> Iterator[int]:
        try:
            yield from steps
        except WorkerError:
            if ranks.world == 1:  # of several, the others wait within the next step
                _save(session, trainer, out, log, final=False)
            raise

    saved_ns = time.monotonic_ns()
    interrupts.deferred = True
    total = config.epochs * trainer.batches.count
    with session.terminal.progress(total, trainer.images_seen(), "images") as meter:
        for epoch in range(len(log.history), config.epochs):
            text = f"epoch {epoch + 1}/{config.epochs}"
            clock.switch("training")
            steps = saved_without_workers(trainer.train(epoch))
            for images in collection.steps.each(steps) if collection else steps:
                if session.device.type == "cpu":  # on a GPU a read would hold up the queue
                    trainer.check_finite()
                    text = f"epoch {epoch + 1}/{config.epochs}  {trainer.so_far()}"
                meter.advance(images, text)
                on_step(trainer.step.number)
                stop_if_asked()
            trainer.check_finite()
            training = trainer.epoch_result()
            clock.switch("evaluation")
            # Several ranks agree on stopping between steps; here each has its own number of batches.
            test = trainer.evaluate(stop_if_asked if ranks.world == 1 else lambda: None)
            trainer.check_loss("training", training[0])
            trainer.check_loss("test", test.loss)
            number = trainer.step.number
            rate = trainer.step.learning_rate(number)
            row = log.add_epoch(number, rate, trainer.batches.count, training, (test.loss, test.accuracy))
            session.terminal.row(cells(row))
            last = epoch + 1 == config.epochs
            if last or ranks.any(time.monotonic_ns() - saved_ns >= 1e9 * config.checkpoint_s):
                _save(session, trainer, out, log, final=last)
                saved_ns = time.monotonic_ns()
    clock.switch("shutdown")
    interrupts.deferred = False


def _save(session: Session, trainer: "Trainer", out: Path, log: "RunLog", final: bool) -> None:
    """Write a checkpoint. A failure is a warning, and for the `final` one a CheckpointError.

    Raises NonFiniteError for a gradient or a tensor that is not finite: it would take the place of a good one.
    """
    from model import checkpoint
    from model.run_state import RunState

    log.clock.switch("checkpoint")
    trainer.check_finite()
    tensors = trainer.tensors()
    if not session.ranks.is_first:
        return
    number = trainer.step.number
    state = RunState(trainer.config, session.dataset.fingerprint(), session.ranks.world, **log.state())
    try:
        checkpoint.save(out, number, tensors, state)
    except OSError as error:
        text = f"the checkpoint of step {number} could not be written to {out}: {error}; those before it are intact"
        if final:
            raise CheckpointError(f"{text}. Free some space and go on with --resume auto") from None
        session.terminal.warn(f"{text}, and training goes on")


def profile(
    session: Session,
    config: Config,
    out: Path,
    data: list[str],
    counters: bool = False,
    ceilings: "Ceilings | None" = None,
) -> None:
    """Account for the run in `out`, as `profiling.report.command.profile` does, whose arguments these are."""
    import torch

    from model.trainer import choose_dtype
    from profiling.report import command

    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = str(choose_dtype(config.dtype, session.device, config.ops)).removeprefix("torch.")
    command.profile(out, str(session.device), dtype, data, session.terminal, counters, ceilings)


def _profile_pass(session: Session, out: Path, counters: bool) -> None:
    """In a process of its own: profile steps of the run in `out`, or have their counters read; count their work."""
    import torch

    from model.data.batches import Batches
    from model.memory import preallocate
    from model.trainer import Trainer, choose_dtype
    from profiling.device.environment import environment
    from profiling.output.files import read_json, write_json
    from profiling.run.collect import RECORDS, WARM_UP_STEPS, record_trace

    dataset, device, folder = session.dataset, session.device, out / RECORDS
    config = Config.from_json(read_json(out / "config.json"))
    dtype = choose_dtype(config.dtype, device, config.ops)
    trainer = Trainer(
        Batches(dataset.train_images, dataset.train_labels, config, device, dtype), dataset, session.ranks
    )
    if device.type == "cuda" or trainer.step_requested != "eager":
        trainer.warm_up()
    if device.type == "cpu":
        preallocate(PROFILER_BYTES)
    steps = (images for epoch in itertools.count() for images in trainer.train(epoch))
    if counters:
        list(itertools.islice(steps, WARM_UP_STEPS))
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        next(steps)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return
    write_json(folder / "work.json", _work(config, dtype, config.epochs * len(dataset.train_images)))
    eagerly = trainer.step.eagerly if trainer.step_mode == "captured" else None
    record_trace(steps, device, folder, environment(device, ROOT), eagerly)


def _work(config: Config, dtype: "torch.dtype", images: int) -> dict[str, Any]:
    """records/work.json: what a step of this run does, by its own ops and by others', and what the article's did."""
    import torch

    from model.trainer import build_network, modelled_step
    from profiling.account import work
    from profiling.account.work import flops_per_image

    article = preset("article-256")
    variants = {
        "ops": (config, dtype),
        "reference": (dataclasses.replace(config, ops="reference", conv="table"), dtype),
        "article": (article, torch.float16),
    }
    with contextlib.suppress(UsageError):  # widths that the fused kernels do not take
        variants["fused"] = (dataclasses.replace(config, ops="fused"), dtype)
    counted = {name: work.work_of(*modelled_step(*variant)) for name, variant in variants.items()}

    def flops(c: Config) -> int:
        return flops_per_image(lambda: build_network(dataclasses.replace(c, ops="reference", conv="table"))).training

    return {
        "version": work.VERSION,
        "batch": config.batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "images": images,
        "flops_per_image": flops(config),
        "article_batch": article.batch_size,
        "article_flops_per_image": flops(article),
        **{name: [dataclasses.asdict(row) for row in rows] for name, rows in counted.items()},
    }


def repeat(
    session: Session,
    config: Config,
    out: Path,
    runs: int,
    target: float | None,
    resume: bool,
    require_ops: bool = False,
) -> dict[str, Any]:
    """Train `runs` times with consecutive seeds, in out/run-000, ...; returns what out/summary.json holds.

    That is written after each run, so that one that is killed leaves the figures of those before it. With `resume`,
    complete runs are kept and an unfinished one goes on. Without a `target` the runs that reach TARGET are counted, on
    the official images only, for which it was set. Raises what `run` raises, and TargetMissedError if the mean is below
    `target`.
    """
    from profiling.output.files import write_json
    from profiling.run.repeats import aggregate, claim_in_words

    counted = TARGET if target is None and session.dataset.identity == "official" else target
    summaries, summary = [], {}
    for i in range(runs):
        each, folder = dataclasses.replace(config, seed=config.seed + i), out / f"run-{i:03d}"
        session.terminal.say(f"run {i + 1} of {runs}, seed {each.seed}", "bold")
        checkpoint = _find_checkpoint(session, None, folder) if resume else None
        if checkpoint:
            _require_fit(session, checkpoint, each)
        done = _complete(session, folder / "summary.json", each, checkpoint.step) if checkpoint else None
        summaries.append(done or run(session, each, folder, checkpoint, require_ops=require_ops))
        wall_s = (time.monotonic_ns() - STARTED_NS) / 1e9
        summary = aggregate(summaries, runs, counted, required=target is not None, wall_s=wall_s)
        if session.ranks.is_first:
            write_json(out / "summary.json", summary)
    session.terminal.say(claim_in_words(summary), "bold")
    if summary["exit_code"]:
        raise TargetMissedError(
            f"mean test accuracy {summary['test_accuracy']:.2%} is below the target of {target:.2%}"
        )
    return summary


def _complete(session: Session, path: Path, config: Config, step: int) -> dict[str, Any] | None:
    """The summary at `path` of a complete run of `config` that ended with `step`; None where there is none.

    A damaged one is said to be, and none too: the run that goes on from its checkpoint leaves another.
    """
    from profiling.output.files import read_json
    from profiling.run.repeats import unfit

    try:
        summary = read_json(path)
        if isinstance(summary, dict) and summary.get("status") in ("failed", *_STATUS.values()):
            return None
        wanted = {"status": "complete", "seed": config.seed, "steps": step}
        reason = unfit(summary) or next((f"another {key}" for key in wanted if summary.get(key) != wanted[key]), None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason:
        session.terminal.warn(f"{path} is damaged ({reason}); it is written anew")
    return None if reason else summary


def evaluate(session: Session, config: Config, checkpoint: "Checkpoint", target: float | None = None) -> dict[str, Any]:
    """The accuracy of a checkpoint on the test images, as a whole and by class.

    Raises NonFiniteError, with a summary that knows none, where the loss is not finite: nor is what decides the class.
    Raises TargetMissedError below the accuracy `target`, with the summary.
    """
    from model.data.batches import Batches
    from model.trainer import Trainer, choose_dtype, require_network, with_available_ops
    from profiling.device.environment import commit, device_name

    dataset, ranks, device = session.dataset, session.ranks, session.device
    if ranks.is_first and (other := _other_images(session, checkpoint)):
        session.terminal.warn(other)
    require_network(config, checkpoint.tensors)
    config, _ = with_available_ops(config, device, session.terminal.say, ranks)
    # There is no training: whatever batches and schedule the checkpoint claims, they take no memory.
    config = dataclasses.replace(
        config.with_epochs(1), preprocess="on_device", draw="per_epoch", workers=0, batch_size=1
    )
    dtype = choose_dtype(config.dtype, device, config.ops)
    batches = Batches(dataset.train_images, dataset.train_labels, config, device, dtype, ranks.rank, ranks.world)
    trainer = Trainer(batches, dataset, ranks)
    trainer.restore(checkpoint.tensors, checkpoint.step)
    start_ns = time.monotonic_ns()
    result = trainer.evaluate()
    eval_s = (time.monotonic_ns() - start_ns) / 1e9
    finite = math.isfinite(result.loss)
    known = {"test_loss": result.loss, "test_accuracy": result.accuracy}
    known |= {f"test_accuracy_{name}": accuracy for name, accuracy in result.class_accuracy.items()}
    summary = {
        "status": "complete",
        "exit_code": 0,
        "preset": config.preset,
        "data_identity": dataset.identity,
        "data_source": dataset.source,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "ops": config.ops,
        "steps": checkpoint.step,
        "seed": config.seed,
        **(known if finite else dict.fromkeys(known)),
        "eval_s": eval_s,
        "git_sha": commit(ROOT)[0],
    }
    if not finite:
        error = NonFiniteError(f"the test loss of {checkpoint.path} is {result.loss}; evaluate an earlier checkpoint")
        error.summary = summary | {"status": _STATUS[NonFiniteError], "exit_code": error.exit_code}
        raise error
    rows = [[name, f"{accuracy:.2%}"] for name, accuracy in result.class_accuracy.items()]
    title = f"{checkpoint.path.name} on {trainer.test_count:,} test images ({dataset.identity})"
    session.terminal.table(title, ["class", "accuracy"], [*rows, ["all", f"{result.accuracy:.2%}"]])
    if target is not None and result.accuracy < target:
        error = TargetMissedError(f"test accuracy {result.accuracy:.2%} is below the target of {target:.2%}")
        error.summary = summary | {"status": _STATUS[TargetMissedError], "exit_code": error.exit_code}
        raise error
    return summary


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
            _require_empty(self.out)
        _require_launch()

    def _require_paths(self) -> None:
        """What is named must be there: nothing is loaded or downloaded for what will be refused."""
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


def _require_empty(out: Path) -> None:
    if not run_folder.is_empty(out):
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


def _find_checkpoint(session: Session, named: "Checkpoint | None", out: Path) -> "Checkpoint | None":
    """The checkpoint to go on from: the one `named`, else the newest in `out`; None where there is none."""
    from model import checkpoint

    newest = checkpoint.newest(out, session.terminal.warn if session.ranks.is_first else lambda text: None)
    if named is None:
        session.terminal.say(f"resuming from {newest.path}" if newest else f"no checkpoint in {out}: starting afresh")
        return newest
    if newest and newest.step > named.step:
        raise CheckpointError(
            f"{out} holds a later checkpoint than {named.path.name}: step {newest.step}. Go on from that with "
            "--resume auto, or name a new --out for a run that branches off here"
        )
    return named


def _require_batch(session: Session, config: Config) -> None:
    count = len(session.dataset.train_images)
    if config.batch_size > count:
        raise UsageError(f"batch_size={config.batch_size} is more than the {count:,} training images")


def _other_images(session: Session, checkpoint: "Checkpoint") -> str | None:
    """A sentence, unless the checkpoint was trained on the session's images."""
    data = session.dataset
    if checkpoint.state.data == data.fingerprint():
        return None
    return (
        f"{checkpoint.path} was trained on other images than these ({data.identity}: {data.source}); name its own, by "
        "--data-dir or --synthetic"
    )


def _require_fit(session: Session, checkpoint: "Checkpoint", config: Config) -> None:
    """Raise CheckpointError, with the difference, unless `config` on this data is what the checkpoint began."""
    from model.run_state import require_same
    from model.trainer import require_network

    state, name = checkpoint.state, checkpoint.path.name
    require_same(state.config.learned(), config.learned(), f"configuration ({name})")
    if other := _other_images(session, checkpoint):
        raise CheckpointError(other)
    require_same({"processes": state.world_size}, {"processes": session.ranks.world}, f"launch ({name})")
    require_network(config, checkpoint.tensors)
    try:
        state.require_step(checkpoint.step, -(-len(session.dataset.train_images) // config.batch_size))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}; name another, or start afresh in another folder") from None


def open_session(
    terminal: "Terminal",
    interrupts: Interrupts,
    device: str = "auto",
    data_dir: Path | None = None,
    download: bool = False,
    synthetic: bool = False,
) -> Session:
    """Load the data, choose the device, join torchrun's other processes.

    Raises DataError and DeviceError; falls back to synthetic images, with a banner, where no data was named.
    """
    from model.data import cifar10 as data
    from model.distributed import join
    from model.memory import keep_freed_memory
    from model.trainer import choose_device, search_convolutions

    keep_freed_memory()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    search_convolutions(chosen)
    if download and data_dir is None:
        data_dir = Path("data")
    with contextlib.ExitStack() as stack:
        meters = []

        def progress(done: int, total: int) -> None:
            if not meters:
                meters.append(stack.enter_context(terminal.progress(total, done, "bytes")))
            meters[0].advance(done - meters[0].done, "downloading CIFAR-10 (--synthetic does without)")

        dataset = data.load(data_dir, download=download, synthetic=synthetic, say=terminal.say, progress=progress)
    if dataset.reason:
        terminal.banner(
            "SYNTHETIC IMAGES, NOT CIFAR-10",
            f"{dataset.reason}\n\nTraining goes on with generated pictures of shapes, so that you can see everything "
            "work. No accuracy below says anything about CIFAR-10.",
        )
    ranks = join(chosen)
    if not ranks.all_equal(dataset.fingerprint()):
        raise DataError("the processes loaded different data; name a folder that all of them can read with --data-dir")
    return Session(dataset, chosen, ranks, terminal, interrupts)


def _perform(request: Request, terminal: "Terminal", interrupts: Interrupts) -> dict[str, Any]:
    """Do what was asked; returns the summary."""
    from model import checkpoint as checkpoints
    from profiling.output.files import read_json

    config, found = request.configure(preset(request.preset or "laptop")), None
    if request.profile_pass:
        config = Config.from_json(read_json(request.profile_pass / "config.json"))
    session = open_session(terminal, interrupts, config.device, request.data_dir, request.download, request.synthetic)
    if request.profile_pass:
        _profile_pass(session, request.profile_pass, request.ncu)
        return {}
    if request.evaluate:
        found = checkpoints.load(request.evaluate, terminal.warn)
        return evaluate(session, request.configure(found.state.config), found, request.target_accuracy)
    if request.preset is None and session.device.type == "cuda":
        config = request.configure(preset("fused"))
    out = request.out
    if out is None and request.resume:
        out = Path(request.resume) if Path(request.resume).is_dir() else Path(request.resume).parent
    first = session.ranks.is_first
    try:
        if request.resume not in (None, "auto"):
            found = checkpoints.load(Path(request.resume), terminal.warn)
        if out is None:
            out = Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{config.preset}"
            out = run_folder.make_new(out) if first else out
        with own(session, out):
            if first and not request.resume:  # somebody may have been here since the arguments were checked
                _require_empty(out)
            return _perform_in(out, request, session, config, found)
    except CheckpointError as error:
        if "RANK" in os.environ and first:
            _record_refusal(out, error)
        raise


def _perform_in(
    out: Path, request: Request, session: Session, config: Config, named: "Checkpoint | None"
) -> dict[str, Any]:
    """Train in `out`, which this process owns, as was asked, from the checkpoint that was `named`."""
    from profiling.run.log import closing_lines, counted

    terminal, found = session.terminal, None
    require_ops = any(setting.partition("=")[0].strip() == "ops" for setting in request.settings)
    if request.runs > 1:
        _require_batch(session, config)
        return repeat(session, config, out, request.runs, request.target_accuracy, bool(request.resume), require_ops)
    if request.resume:
        found = _find_checkpoint(session, named, out)
    if found:
        if request.preset is None:
            config = request.configure(found.state.config)
        _require_fit(session, found, config)
    _require_batch(session, config)
    ceilings = _ceilings(request.ceilings, session, config) if request.ceilings else None
    dataset, ranks = session.dataset, session.ranks
    terminal.say(
        f"{config.preset}: {config.network} {'-'.join(map(str, config.widths))}, {counted(config.epochs, 'epoch')} of "
        f"{len(dataset.train_images):,} images at batch {config.batch_size}, on {session.device}"
        + (f" x {ranks.world}" if ranks.world > 1 else "")
        + f"; data: {dataset.identity} ({dataset.source})"
    )
    try:
        summary = run(
            session,
            config,
            out,
            found,
            request.target_accuracy,
            started_ns=STARTED_NS,
            require_ops=require_ops,
            collect=request.profile,
        )
    except Interrupted:
        terminal.say(_how_to_go_on(request, session, out))
        raise
    for line in closing_lines(summary):
        terminal.say(line)
    terminal.say(f"written to {out}")
    if request.profile:
        again = request.data_arguments(dataset.identity)
        try:
            profile(session, config, out, again, request.ncu, ceilings)
        except Interrupted:
            command = ["python", "-m", "profiling", "collect", str(out), *again]
            terminal.say(f"stopped; the training is complete, and its profile is not: {shlex.join(command)}")
            raise
    return summary


def _how_to_go_on(request: Request, session: Session, out: Path) -> str:
    """What a person who has stopped the run in `out` types next: the same data, and as many processes."""
    if not any(out.glob("checkpoint-*.json")):
        return "stopped before anything was saved; start again with a new --out"
    ranks, identity = session.ranks, session.dataset.identity
    words = ["torchrun", "--standalone", "--nproc-per-node", str(ranks.world)] if ranks.world > 1 else ["python"]
    words += ["train.py", "--out", str(out), "--resume", "auto"]
    if request.data_dir or identity == "synthetic":
        words += request.data_arguments(identity)
    return f"stopped; go on with: {shlex.join(words)}"


def _ceilings(path: Path, session: Session, config: Config) -> "Ceilings":
    """What --ceilings names. Raises UsageError where it says nothing about this run."""
    from model.trainer import choose_dtype
    from profiling.device.ceilings import reread

    try:
        return reread(path, session.device, choose_dtype(config.dtype, session.device, config.ops))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--ceilings {path}: {error}; measure them with python -m profiling device --out FILE, or leave it out"
        ) from None


def _record_refusal(out: Path, error: RunError) -> None:
    """A script cannot see an exit code behind torchrun, so summary.json tells it; that of a complete run stays."""
    from profiling.output.files import read_json, write_json

    path = out / "summary.json"
    with contextlib.suppress(OSError, ValueError):
        before = read_json(path) if path.exists() else {}
        if before.get("status") != "complete":
            write_json(path, {**before, "status": "failed", "exit_code": error.exit_code})


def _list_presets(as_json: bool) -> None:
    from profiling.output.terminal import Terminal

    put = Terminal().put
    if as_json:
        put(json.dumps({name: make().to_json() for name, make in PRESETS.items()}, indent=2))
        return
    for name, make in PRESETS.items():
        c = make()
        line = f"{name:<12} {c.network} {'-'.join(map(str, c.widths))}, {c.epochs} epochs at batch {c.batch_size}, "
        put(f"{line}peak rate {max(c.lr_values):g}, preprocess={c.preprocess}, workers={c.workers}")
        put(f"{'':<12} {make.__doc__.splitlines()[0]}")


def _list_settings(config: Config) -> None:
    """Every setting with `config`'s value, and what it is."""
    from profiling.output.terminal import Terminal

    terminal = Terminal()
    for assignment, about in about_settings(config):
        terminal.put(f"{assignment:<34} {about}")
    terminal.put(f"{'lr=PEAK':<34} scales lr_values to that peak")


def _version() -> str:
    import tomllib

    from profiling.device.environment import commit

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"{project['name']} {project['version']}, commit {commit(ROOT)[0] or 'unknown'}"


app = typer.Typer(**command_line.MANNERS)


@app.command(help=__doc__.splitlines()[0])
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
        Path | None, typer.Option(help="With --profile: what profiling device --out measured here, not to do it again.")
    ] = None,
    profile_pass: Annotated[Path | None, typer.Option(hidden=True)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; --list-settings has them. Repeatable."),
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="As --set batch_size=.")] = None,
    lr: Annotated[str | None, typer.Option(help="The schedule's peak: as --set lr=.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly summary.json on stdout.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Show the presets.")] = False,
    show_settings: Annotated[
        bool, typer.Option("--list-settings", help="Show every setting, of --preset if one is given.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """The command line's own signature; `Request` checks what was given."""
    settings = settings or []
    settings += [f"{key}={value}" for key, value in (("batch_size", batch_size), ("lr", lr)) if value is not None]
    if show_list or show_settings or version:
        raise typer.Exit(_show(show_list, show_settings, preset_name, settings, as_json))
    given = (preset_name, data_dir, download, synthetic, epochs, runs, seed, out, resume, evaluate, target_accuracy)
    more = (profiled, counters, ceilings, profile_pass, settings, as_json)
    raise typer.Exit(_guarded(lambda: Request(*given, *more)))


def _show(presets: bool, settings: bool, name: str | None, changes: list[str], as_json: bool) -> int:
    """What was asked for instead of a training; the exit code."""
    from profiling.output.terminal import Terminal

    try:
        config = preset("laptop" if name is None else name).with_settings(changes)
    except UsageError as error:
        Terminal().error(str(error))
        return error.exit_code
    if presets:
        _list_presets(as_json)
    elif settings:
        _list_settings(config)
    else:
        Terminal().put(_version())
    return 0


def _guarded(read: Callable[[], Request]) -> int:
    """Check the request and perform it; any failure becomes one line on stderr and its exit code."""
    from profiling.output.terminal import Terminal

    speaks = os.environ.get("RANK", "0") == "0"
    try:
        request = read()
    except RunError as error:
        if speaks or not os.environ["RANK"].isdecimal():
            Terminal().error(str(error))
        return error.exit_code
    if request.profile_pass or "TORCHELASTIC_RUN_ID" in os.environ:
        follow(PARENT)
    terminal = Terminal(request.json, speaks)
    terminal.say("loading PyTorch and the images ...")
    from model.distributed import leave, report  # torch, while a signal still ends the process whatever it is doing

    interrupts = Interrupts(_note if speaks else lambda text: None)
    interrupts.install()
    code = 0
    try:
        summary = _perform(request, terminal, interrupts)
    except (RunError, Interrupted) as error:
        summary = getattr(error, "summary", None)
        interrupts.deferred = True  # torchrun ends the other ranks when one has failed: they may still say why
        if not speaks:
            report(error)
        elif isinstance(error, RunError):
            terminal.error(str(error))
        code = error.exit_code
    finally:
        leave()
    if request.json and speaks and summary:
        terminal.put(json.dumps(summary, indent=2, allow_nan=False))
    return code


def _note(text: str) -> None:
    """To stderr from within a signal handler, which may have interrupted whoever was writing there."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


if __name__ == "__main__":
    command_line.run(app)
