"""What each step of the article, and of this project, buys on this device: the rungs timed in turns.

    python -m experiments ladder                 # four epochs of each rung, extrapolated to 35
    python -m experiments ladder --full          # and each trained to its end, with its accuracy
    python -m experiments ladder --small         # a narrow network on some images: minutes on two CPU cores

A turn is an epoch of every rung with its validation; turns go A B C, C B A, so that a drift of the machine does not
read as a gain. The first epoch of a rung is not counted, and behind it the making of its batches alone is timed once. A
rung's steps run as they do in training, captured on a GPU. A difference between two rungs is the median of their
differences turn by turn, with its interval. Every rung has a process of its own (`experiments.stand`), and after every
turn ladder.json has all that is known until then: the same command with the same --out goes on from there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.rungs import RUNGS, Rung, require_own
from experiments.stand import (
    SET_UP_S,
    START_S,
    TURN_EPOCHS,
    TURN_S,
    Assignment,
    Company,
    RungFailedError,
    RungRefusedError,
    serve,
)
from experiments.study import Request, Study, open_study
from model.config import Config
from model.errors import NonFiniteError, UsageError
from model.interrupts import Interrupts

if TYPE_CHECKING:
    import train
    from profiling.console import Terminal

Row = dict[str, Any]

FEWEST = 4


class Sizes(NamedTuple):
    """How much a turn is. `widths` None: the article's network; `images` None: all of them."""

    turns: int
    widths: tuple[int, ...] | None = None
    images: int | None = None
    test_images: int | None = None


WHOLE = Sizes(FEWEST)
SMALL = Sizes(32, (8, 8, 8, 8), 2_048, 500)
"""So narrow a network that making a batch takes a good part of the time: that is what half of the rungs are about."""


def check(request: Request, epochs_per_rung: int | None = None, full: bool = False, cutout: int = 0) -> None:
    """Raise UsageError for what cannot be asked."""
    require_own(request.settings)
    if epochs_per_rung is not None and (epochs_per_rung < FEWEST or epochs_per_rung % 2):
        raise UsageError(
            f"--epochs-per-rung {epochs_per_rung}: expected an even number of at least {FEWEST}, for turns A B B A"
        )
    RUNGS[0].config(cutout, request.settings)


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: Interrupts,
    epochs_per_rung: int | None = None,
    full: bool = False,
    cutout: int = 0,
    rungs: Sequence[Rung] = RUNGS,
    target: Callable[..., None] = serve,
) -> dict[str, Any]:
    """Measure and draw the ladder; returns what ladder.json holds. `target` is what a rung's process runs."""
    import train
    from experiments import ladder_chart, ladder_report

    sizes = SMALL if request.small else WHOLE
    sizes = sizes._replace(turns=epochs_per_rung or sizes.turns)
    threads = None
    if request.small:
        import torch

        threads = 1  # threads that wait for each other on a shared core are slower than the differences
        torch.set_num_threads(threads)
    device = request.configure(rungs[0].config()).device
    session = train.open_session(terminal, interrupts, device, request.data_dir, synthetic=request.synthetic)
    extra = {"cutout": cutout, "full": full, "turns": sizes.turns}
    study = open_study("ladder", request, session, extra)
    session = _cut(session, sizes)
    settings = list(request.settings)
    if sizes.widths and not any(s.partition("=")[0].strip() == "widths" for s in settings):
        settings.append(f"widths={','.join(map(str, sizes.widths))}")
    if request.seed is not None:
        settings.append(f"seed={request.seed}")

    def conclude(rows: Sequence[Row]) -> tuple[Any, ...]:
        ladder = ladder_report.analyse(rows, study.settings["device_name"])
        said, listed = ladder_report.sentences(ladder), ladder_report.tables(ladder)
        return ladder, said, listed, ladder_report.caveats(ladder, request.small, sizes.images)

    rows = measure(
        study,
        session,
        rungs,
        lambda rung: rung.config(cutout, settings),
        sizes.turns,
        threads,
        lambda rows: study.save(*conclude(rows)),
        target,
    )
    if full:
        for row in rows:
            if row["reason"] is None:
                row["full"] = train_whole(study, session, Config.from_json(row["config"]), row["name"])
    ladder, said, listed, limits = conclude(rows)
    return study.finish(ladder, ladder_chart.plots(ladder), said, listed, limits)


def _cut(session: "train.Session", sizes: Sizes) -> "train.Session":
    """The session with the first images only."""
    data = session.dataset
    fewer = dataclasses.replace(
        data,
        train_images=data.train_images[: sizes.images].clone() if sizes.images else data.train_images,
        train_labels=data.train_labels[: sizes.images],
        test_images=data.test_images[: sizes.test_images],
        test_labels=data.test_labels[: sizes.test_images],
    )
    return dataclasses.replace(session, dataset=fewer)


def measure(
    study: Study,
    session: "train.Session",
    rungs: Sequence[Rung],
    configure: Callable[[Rung], Config],
    turns: int,
    threads: int | None = None,
    on_result: Callable[[list[Row]], Any] = lambda rows: None,
    target: Callable[..., None] = serve,
) -> list[Row]:
    """A row for each rung: its set-up, and the seconds of each turn; or the `reason` why it cannot run here.

    A rung whose process failed has a reason too, and the turns it had; that is not kept, so that the next call tries
    again. `on_result` gets the rows after each turn. `target` is what a rung's process runs, in `threads` threads.
    """
    keys = [(turn, rung) for turn in range(turns) for rung in (rungs if turn % 2 == 0 else rungs[::-1])]
    failed: dict[str, str] = {}

    def rows() -> list[Row]:
        found = []
        for rung in rungs:
            head = {**dataclasses.asdict(rung), "changes": dict(rung.changes), "reason": None}
            row = head | study.results.get(_set_up(rung), {"reason": failed.get(rung.name, "it was not begun yet")})
            taken = [study.results[key] for turn in range(turns) if (key := _key(turn, rung)) in study.results]
            found.append({**row, "reason": row["reason"] or failed.get(rung.name), "turns": taken})
        return found

    def is_refused(rung: Rung) -> bool:
        return study.results.get(_set_up(rung), {}).get("reason") is not None

    def refuse(rung: Rung, reason: str) -> None:
        study.once(_set_up(rung), lambda: {"reason": reason})

    def attempt(rung: Rung, ask: Callable[[], Row]) -> Row | None:
        try:
            return ask()
        except RungRefusedError as error:
            refuse(rung, str(error))
            if not is_refused(rung):  # it ran here before
                failed[rung.name] = str(error)
        except RungFailedError as error:
            failed[rung.name] = str(error)
        session.terminal.warn(
            f"{rung.name} is left out: {failed.get(rung.name) or study.results[_set_up(rung)]['reason']}"
        )
        return None

    on_cpu = session.device.type == "cpu"
    for rung in rungs:
        if rung.needs_gpu and on_cpu:
            refuse(rung, "kernels and CUDA graphs need a CUDA GPU")
    able = [rung for rung in rungs if not is_refused(rung)]
    left = [(turn, rung) for turn, rung in keys if rung in able and _key(turn, rung) not in study.results]
    if not left:
        return rows()
    with Company(session.dataset, session.terminal.say, target) as company:
        for rung in able:
            try:
                config = configure(rung)
            except UsageError as error:
                refuse(rung, str(error))
                continue
            company.start(Assignment(rung.name, config, str(session.device), company.data, threads))
        begun = [rung for rung in able if rung.name in company.workers]
        begun = [r for r in begun if attempt(r, lambda r=r: company.workers[r.name].answer(START_S)) is not None]
        limits: dict[str, float] = {}
        for rung in begun:  # after an interruption too: all are warm before a turn is timed
            session.terminal.say(f"{rung.name}: {rung.what}; an epoch that is not counted")
            worker = company.workers[rung.name]
            facts = attempt(rung, lambda w=worker: w.ask("set-up", SET_UP_S[session.device.type]))
            if facts is not None:
                study.once(_set_up(rung), lambda facts=facts: {"reason": None, **facts})
                limits[rung.name] = TURN_S + TURN_EPOCHS * facts["epoch_s"]
            on_result(rows())
        left = [(turn, rung) for turn, rung in left if rung.name in limits]
        done = turns * len(limits) - len(left)
        with session.terminal.progress(turns * len(limits), done, "epochs") as meter:
            for turn, rung in left:
                if rung.name not in failed:
                    worker, limit_s = company.workers[rung.name], limits[rung.name]
                    seconds = attempt(rung, lambda w=worker, limit_s=limit_s: w.ask("turn", limit_s))
                    if seconds is not None:
                        study.once(_key(turn, rung), lambda seconds=seconds: seconds)
                    on_result(rows())
                meter.advance(1, f"turn {turn + 1}/{turns}  {rung.name}")
    return rows()


def _set_up(rung: Rung) -> str:
    return f"set-up/{rung.name}"


def _key(turn: int, rung: Rung) -> str:
    return f"turn-{turn:03d}/{rung.name}"


def train_whole(study: Study, session: "train.Session", config: Config, name: str) -> dict[str, Any]:
    """The summary of a whole run in OUT/<name>, which goes on from its checkpoint if it was killed."""
    import train
    from model import checkpoint

    def whole() -> dict[str, Any]:
        session.terminal.say(f"{name}: training to the end", "bold")
        folder = study.out / name
        found = checkpoint.newest(folder, session.terminal.warn) if folder.exists() else None
        keep = ("test_accuracy", "train_s", "eval_s", "train_plus_eval_s", "epochs", "status", "seed")
        try:
            summary = train.run(session, config, folder, found, insist=True)
        except NonFiniteError as error:
            session.interrupts.deferred = False
            summary = error.summary
        return {key: summary.get(key) for key in keep}

    return study.once(f"full/{name}", whole)
