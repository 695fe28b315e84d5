"""Train the article's network on CIFAR-10: the command line, and the run.

Arguments are read before torch is imported, so that a slip of the finger costs a moment and not seconds.
"""

# ruff: noqa: E402  the imports of torch stand below the reading of arguments

import os
import time

from model.interrupts import Interrupted, Interrupts, end_at_once, follow

if __name__ == "__main__":
    end_at_once()

import contextlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import typer

from model.errors import (
    CheckpointError,
    NonFiniteError,
    OutOfMemoryError,
    RunError,
    TargetMissedError,
    WorkerError,
)
from model.request import Request, command, require_empty
from profiling import ROOT
from profiling.output import command_line
from profiling.output.terminal import Terminal

STARTED_NS, PARENT = time.monotonic_ns(), os.getppid()


def command_of(perform: Callable[[Request], Any]) -> typer.Typer:
    """The command line: `perform(request)` is called for arguments in order; its int is the exit code."""

    def take(read: Callable[[], Request | str]) -> Any:
        asked = []
        speaks = not os.environ.get("RANK", "0").isdecimal() or _speaks()
        code = command_line.guarded(lambda: asked.append(read()), lambda error: speaks and Terminal().error(str(error)))
        if code:
            raise typer.Exit(code)
        if isinstance(asked[0], str):
            Terminal().put(asked[0])
            raise typer.Exit(0)
        if asked[0].profile_pass or "TORCHELASTIC_RUN_ID" in os.environ:
            follow(PARENT)
        Terminal(asked[0].json, _speaks()).say("loading PyTorch and the images ...")
        result = perform(asked[0])
        if isinstance(result, int):
            raise typer.Exit(result)
        return result

    app = typer.Typer(**command_line.MANNERS)
    app.command(help=__doc__.splitlines()[0])(command(take, _version))
    return app


def _speaks() -> bool:
    """Whether this process is the rank that prints."""
    return os.environ.get("RANK", "0") == "0"


def _version() -> str:
    from profiling.device.environment import commit  # which imports torch

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"{project['name']} {project['version']}, commit {commit(ROOT)[0] or 'unknown'}"


if __name__ == "__main__":
    REQUEST = command_line.run(command_of(lambda request: request))  # a slip of the finger ends here, before torch

import dataclasses
import datetime
import json
import math
import shlex
from pathlib import Path

import torch

from model import folder as run_folder
from model.checkpoint import Checkpoint, load
from model.config import Config
from model.distributed import leave, report
from model.memory import out_of_memory, peak
from model.presets import TARGET, preset
from model.session import (
    Session,
    find_checkpoint,
    open_session,
    other_images,
    own,
    prepare,
    require_batch,
    require_fit,
    restore,
    runnable,
    save,
)
from model.trainer import Trainer, build_network, choose_dtype, dtype_name, step_mode, triton_conv_share
from profile_pass import ceilings_for, profile, profile_pass
from profiling.account.work import flops_per_image
from profiling.device.environment import commit, device_name, environment
from profiling.output.files import read_json, write_json
from profiling.run.clock import Clock
from profiling.run.collect import Collection
from profiling.run.log import COLUMNS, RunLog, cells, closing_lines, counted
from profiling.run.repeats import aggregate, claim_in_words, unfit

_STATUS = {
    Interrupted: "interrupted",
    NonFiniteError: "non-finite",
    OutOfMemoryError: "out of memory",
    TargetMissedError: "target missed",
}


def run(
    session: Session,
    config: Config,
    out: Path,
    checkpoint: Checkpoint | None = None,
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
    ranks, device, ops_requested = session.ranks, session.device, config.ops
    config = runnable(session, config, require_ops)
    dtype = choose_dtype(config.dtype, device, config.ops)
    clock = Clock("set-up", started_ns)
    if device.type == "cuda":
        clock.synchronize = lambda: torch.cuda.synchronize(device)
    machine = environment(device, ROOT)
    facts = {
        "preset": config.preset,
        "data_identity": session.dataset.identity,
        "data_source": session.dataset.source,
        "device": device_name(device),
        "world_size": ranks.world,
        "dtype": dtype_name(dtype),
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
            collection = Collection(out, device, session.terminal.warn)
        try:
            trainer = prepare(session, config, dtype, checkpoint, clock.switch)
            log.facts["step"] = trainer.step_mode
            ranks.wait()
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
            clock.synchronize = lambda: None  # waiting for a device that has failed raises again
        clock.stop()
        if collection:
            collection.finish(clock)
        code = getattr(error, "exit_code", 1) if error else 0
        summary = log.finish(status, code, steps, images, *peak(device, recorded))
        if error:
            error.summary = summary
            raise error
        return summary


def _train(
    session: Session,
    trainer: Trainer,
    out: Path,
    log: RunLog,
    on_step: Callable[[int], None],
    collection: Collection | None,
) -> None:
    config, clock, ranks, interrupts = trainer.config, log.clock, session.ranks, session.interrupts
    session.terminal.header(COLUMNS)
    for row in log.history:
        session.terminal.row(cells(row), "dim")

    def keep(final: bool) -> None:
        clock.switch("checkpoint")
        save(session, trainer, out, log.state, final)

    def stop_if_asked() -> None:
        requested = ranks.any(interrupts.requested)
        if requested:
            keep(final=True)
            raise Interrupted(requested)

    def saved_without_workers(steps: Iterator[int]) -> Iterator[int]:
        try:
            yield from steps
        except WorkerError:
            if ranks.world == 1:  # of several, the others wait within the next step
                keep(final=False)
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
                keep(final=last)
                saved_ns = time.monotonic_ns()
    clock.switch("shutdown")
    interrupts.deferred = False


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
    counted = TARGET if target is None and session.dataset.identity == "official" else target
    summaries, summary = [], {}
    for i in range(runs):
        each, folder = dataclasses.replace(config, seed=config.seed + i), out / f"run-{i:03d}"
        session.terminal.say(f"run {i + 1} of {runs}, seed {each.seed}", "bold")
        checkpoint = find_checkpoint(session, None, folder) if resume else None
        if checkpoint:
            require_fit(session, checkpoint, each)
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


def evaluate(session: Session, config: Config, checkpoint: Checkpoint, target: float | None = None) -> dict[str, Any]:
    """The accuracy of a checkpoint on the test images, as a whole and by class.

    Raises NonFiniteError, with a summary that knows none, where the loss is not finite: nor is what decides the class.
    Raises TargetMissedError below the accuracy `target`, with the summary.
    """
    dataset = session.dataset
    if session.ranks.is_first and (other := other_images(session, checkpoint)):
        session.terminal.warn(other)
    config, trainer, dtype = restore(session, config, checkpoint)
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
        "device": device_name(session.device),
        "dtype": dtype_name(dtype),
        "ops": config.ops,
        "steps": checkpoint.step,
        "seed": config.seed,
        **(known if finite else dict.fromkeys(known)),
        "eval_s": eval_s,
        "git_sha": commit(ROOT)[0],
    }

    def failed(error: RunError) -> RunError:
        error.summary = summary | {"status": _STATUS[type(error)], "exit_code": error.exit_code}
        return error

    if not finite:
        raise failed(
            NonFiniteError(f"the test loss of {checkpoint.path} is {result.loss}; evaluate an earlier checkpoint")
        )
    rows = [[name, f"{accuracy:.2%}"] for name, accuracy in result.class_accuracy.items()]
    title = f"{checkpoint.path.name} on {trainer.test_count:,} test images ({dataset.identity})"
    session.terminal.table(title, ["class", "accuracy"], [*rows, ["all", f"{result.accuracy:.2%}"]])
    if target is not None and result.accuracy < target:
        raise failed(TargetMissedError(f"test accuracy {result.accuracy:.2%} is below the target of {target:.2%}"))
    return summary


def _perform(request: Request, terminal: Terminal, interrupts: Interrupts) -> dict[str, Any]:
    """Do what was asked; returns the summary."""
    config, found = request.configure(preset(request.preset or "laptop")), None
    if request.profile_pass:
        config = Config.from_json(read_json(request.profile_pass / "config.json"))
    session = open_session(terminal, interrupts, config.device, request.data_dir, request.download, request.synthetic)
    if request.profile_pass:
        profile_pass(session, request.profile_pass, request.ncu)
        return {}
    if request.evaluate:
        found = load(request.evaluate, terminal.warn)
        return evaluate(session, request.configure(found.state.config), found, request.target_accuracy)
    if request.preset is None and session.device.type == "cuda":
        config = request.configure(preset("fused"))
    out = request.out
    if out is None and request.resume:
        out = Path(request.resume) if Path(request.resume).is_dir() else Path(request.resume).parent
    first = session.ranks.is_first
    try:
        if request.resume not in (None, "auto"):
            found = load(Path(request.resume), terminal.warn)
        if out is None:
            out = Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{config.preset}"
            out = run_folder.make_new(out) if first else out
        with own(session, out):
            if first and not request.resume:  # somebody may have been here since the arguments were checked
                require_empty(out)
            return _perform_in(out, request, session, config, found)
    except CheckpointError as error:
        if "RANK" in os.environ and first:
            _record_refusal(out, error)
        raise


def _perform_in(
    out: Path, request: Request, session: Session, config: Config, named: Checkpoint | None
) -> dict[str, Any]:
    """Train in `out`, which this process owns, as was asked, from the checkpoint that was `named`."""
    terminal, found = session.terminal, None
    require_ops = any(setting.partition("=")[0].strip() == "ops" for setting in request.settings)
    if request.runs > 1:
        require_batch(session, config)
        return repeat(session, config, out, request.runs, request.target_accuracy, bool(request.resume), require_ops)
    if request.resume:
        found = find_checkpoint(session, named, out)
    if found:
        if request.preset is None:
            config = request.configure(found.state.config)
        require_fit(session, found, config)
    require_batch(session, config)
    ceilings = ceilings_for(request.ceilings, session, config) if request.ceilings else None
    dataset, ranks = session.dataset, session.ranks
    terminal.say(
        f"{config.preset}: {config.network} {'-'.join(map(str, config.widths))}, {counted(config.epochs, 'epoch')} of "
        f"{len(dataset.train_images):,} images at batch {config.batch_size}, on {session.device}"
        + (f" x {ranks.world}" if ranks.world > 1 else "")
        + f"; data: {dataset.identity} ({dataset.source})"
    )
    options = {"started_ns": STARTED_NS, "require_ops": require_ops, "collect": request.profile}
    try:
        summary = run(session, config, out, found, request.target_accuracy, **options)
    except Interrupted:
        terminal.say(request.go_on(out, ranks.world, dataset.identity))
        raise
    for line in (*closing_lines(summary), f"written to {out}"):
        terminal.say(line)
    if request.profile:
        again = request.data_arguments(dataset.identity)
        try:
            profile(session, config, out, again, request.ncu, ceilings)
        except Interrupted:
            command = ["python", "-m", "profiling", "collect", str(out), *again]
            terminal.say(f"stopped; the training is complete, and its profile is not: {shlex.join(command)}")
            raise
    return summary


def _record_refusal(out: Path, error: RunError) -> None:
    """A script cannot see an exit code behind torchrun, so summary.json tells it; that of a complete run stays."""
    path = out / "summary.json"
    with contextlib.suppress(OSError, ValueError):
        before = read_json(path) if path.exists() else {}
        if before.get("status") != "complete":
            write_json(path, {**before, "status": "failed", "exit_code": error.exit_code})


def perform(request: Request) -> int:
    """Do what was asked; the exit code. A failure is one line on stderr."""
    speaks = _speaks()
    terminal = Terminal(request.json, speaks)
    interrupts = Interrupts(_note if speaks else lambda text: None)
    interrupts.install()
    summary: dict[str, Any] = {}

    def tell(error: BaseException) -> None:
        interrupts.deferred = True  # torchrun ends the other ranks when one has failed: they may still say why
        summary.update(getattr(error, "summary", {}))
        if not speaks:
            report(error)
        elif not isinstance(error, Interrupted):
            terminal.error(str(error))

    try:
        code = command_line.guarded(lambda: summary.update(_perform(request, terminal, interrupts)), tell)
    finally:
        leave()
    if request.json and speaks and summary:
        terminal.put(json.dumps(summary, indent=2, allow_nan=False))
    return code


def _note(text: str) -> None:
    """To stderr from within a signal handler, which may have interrupted whoever was writing there."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


app = command_of(perform)

if __name__ == "__main__":
    sys.exit(perform(REQUEST))
