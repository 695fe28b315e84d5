"""The gain by each step of the article, and of this project, on this device: the rungs timed in turns.

    python -m experiments ladder                 # four epochs of each rung, extrapolated to 35
    python -m experiments ladder --full          # and each trained to its end, with its accuracy
    python -m experiments ladder --small         # a narrow network on some images: ten minutes on two CPU cores

A turn is an epoch of every rung with its validation; turns go A B C, C B A, so that a drift of the machine does not
read as a gain. The first epoch of a rung is not counted; after it, the making of its batches alone is timed once. A
rung's steps run as they do in training, captured on a GPU. A difference between two rungs is the median of their
differences turn by turn, with its interval. Every rung has a process of its own (`experiments.stand`), and after every
turn ladder.json has everything known so far: the same command with the same --out goes on from there.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from experiments.ladder_rungs import RUNGS, Rung, require_own
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
from experiments.study.folder import Request, Study, open_study
from model.config import Config
from model.errors import UsageError

if TYPE_CHECKING:
    import train
    from model.data.cifar10 import Dataset
    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

Row = dict[str, Any]

FEWEST, MOST = 4, 32
"""Turns: without --epochs-per-rung the first number; `small` takes as many as it has time for."""
SMALL_S = 420.0
"""Seconds for the turns of `small`, of its ten minutes: its processes start and warm up first."""
SMALL_WIDTHS, SMALL_IMAGES = "widths=8,8,8,8", (2_048, 500)
"""The narrowest network, so that the host and the input weigh the most; images to train on and to validate by."""
FULL = ("test_accuracy", "train_s", "eval_s", "train_plus_eval_s", "epochs", "status", "seed")
"""Kept of the summary of a rung's whole run."""
PLAN = "plan"


def check(request: Request, epochs_per_rung: int | None = None, full: bool = False, cutout: int = 0) -> None:
    """Raise UsageError for options that contradict the rungs or each other."""
    require_own(request.settings)
    if epochs_per_rung is not None and (epochs_per_rung < FEWEST or epochs_per_rung % 2):
        raise UsageError(
            f"--epochs-per-rung {epochs_per_rung}: expected an even number of at least {FEWEST}, for turns A B B A"
        )
    RUNGS[0].config(cutout, request.settings)


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: "Interrupts",
    epochs_per_rung: int | None = None,
    full: bool = False,
    cutout: int = 0,
    rungs: Sequence[Rung] = RUNGS,
    target: Callable[..., None] = serve,
) -> dict[str, Any]:
    """Measure and draw the ladder; returns the content of ladder.json. A rung's process runs `target`."""
    import train
    from experiments import ladder_report

    turns, threads = epochs_per_rung or (None if request.small else FEWEST), None
    if request.small:
        import torch

        threads = 1  # threads that wait for each other on a shared core are slower than the differences
        torch.set_num_threads(threads)
    device = request.configure(rungs[0].config()).device
    session = train.open_session(terminal, interrupts, device, request.data_dir, synthetic=request.synthetic)
    study = open_study("ladder", request, session, {"cutout": cutout, "full": full, "turns": turns})
    settings = list(request.settings)
    if request.small:
        session = dataclasses.replace(session, dataset=first_images(session.dataset, *SMALL_IMAGES))
        if not any(setting.partition("=")[0].strip() == "widths" for setting in settings):
            settings.append(SMALL_WIDTHS)
    if request.seed is not None:
        settings.append(f"seed={request.seed}")

    def conclude(rows: Sequence[Row]) -> tuple[Any, ...]:
        ladder = ladder_report.analyse(rows, study.settings["device_name"])
        said, listed = ladder_report.sentences(ladder), ladder_report.tables(ladder)
        return ladder, said, listed, ladder_report.caveats(ladder, request.small)

    configure = partial(Rung.config, cutout=cutout, settings=settings)
    rows = Measurement(
        study, session, rungs, configure, turns, threads, lambda rows: study.save(*conclude(rows)), target
    ).run()
    for row in rows:
        if full and row["reason"] is None:
            row["full"] = study.once(f"full/{row['name']}", partial(train_whole, study, session, row))
    ladder, said, listed, limits = conclude(rows)
    return study.finish(ladder, ladder_report.plots(ladder), said, listed, limits)


def first_images(data: "Dataset", images: int, test_images: int) -> "Dataset":
    """The first images of the training and of the test set."""
    return dataclasses.replace(
        data,
        train_images=data.train_images[:images].clone(),
        train_labels=data.train_labels[:images],
        test_images=data.test_images[:test_images],
        test_labels=data.test_labels[:test_images],
    )


def train_whole(study: Study, session: "train.Session", row: Row) -> Row:
    """The summary of a rung's run to its end in OUT/<name>, which goes on from its checkpoint if it was killed."""
    from experiments.study import training

    session.terminal.say(f"{row['name']}: training to the end", "bold")
    config, folder = Config.from_json(row["config"]), study.out / row["name"]
    summary = training.train_whole(session, config, folder, require_ops=True)
    return {key: summary.get(key) for key in FULL}


@dataclasses.dataclass
class Measurement:
    """The turns of `rungs` by `session`, kept in `study`; `failed` says why a rung is left out of this call.

    A failure is not kept, so that the next call tries again; a rung that this device cannot run is. Without `turns`
    their number is chosen by the epochs that warm the rungs up, to fit SMALL_S, and kept. `on_result` gets the rows
    after each set-up and each turn. A rung's process runs `target` in `threads` threads.
    """

    study: Study
    session: "train.Session"
    rungs: Sequence[Rung]
    configure: Callable[[Rung], Config]
    turns: int | None
    threads: int | None = None
    on_result: Callable[[list[Row]], Any] = lambda rows: None
    target: Callable[..., None] = serve
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def run(self) -> list[Row]:
        """Take the turns that are missing; returns `rows`."""
        for rung in self.rungs:
            if rung.needs_gpu and self.session.device.type == "cpu":
                self._refuse(rung, "kernels and CUDA graphs need a CUDA GPU")
        if self.turns is None and PLAN in self.study.results:
            self.turns = self.study.results[PLAN]["turns"]
        if self.turns is None or self._left():
            with Company(self.session.dataset, self.session.terminal.say, self.target) as company:
                limits = self._set_up(company)
                if self.turns is None:
                    self.turns = self.study.once(PLAN, lambda: {"turns": self._fitting(limits)})["turns"]
                self._take([(i, rung) for i, rung in self._left() if rung.name in limits], company, limits)
        return self.rows()

    def _left(self) -> list[tuple[int, Rung]]:
        """The missing turns of the rungs that run here, in their order."""
        keys = [(i, rung) for i in range(self.turns) for rung in (self.rungs if i % 2 == 0 else self.rungs[::-1])]
        return [key for key in keys if not self._refusal(key[1]) and _turn_key(*key) not in self.study.results]

    def _fitting(self, names: Iterable[str]) -> int:
        """The number of turns of these rungs that fits SMALL_S: even, from FEWEST to MOST."""
        turn_s = sum(self.study.results[f"set-up/{name}"]["epoch_s"] for name in names)
        turns = min(MOST, max(FEWEST, int(SMALL_S / max(turn_s, 1e-9)) // 2 * 2))
        self.session.terminal.say(f"{turns} turns of {turn_s:.1f} s each will take {turns * turn_s / 60:.0f} min")
        return turns

    def rows(self) -> list[Row]:
        """A row for each rung: its set-up, and the seconds of its turns so far; or the `reason` why it has none."""
        found = []
        for rung in self.rungs:
            kept = self.study.results.get(f"set-up/{rung.name}", {"reason": "it was not begun yet"})
            reason = self.failed.get(rung.name, kept["reason"])
            taken = [_turn_key(i, rung) for i in range(self.turns or 0) if _turn_key(i, rung) in self.study.results]
            head = {**dataclasses.asdict(rung), "changes": dict(rung.changes)}
            found.append({**head, **kept, "reason": reason, "turns": [self.study.results[key] for key in taken]})
        return found

    def _set_up(self, company: Company) -> dict[str, float]:
        """Warm every rung up, one after the other, before one is timed; the seconds that a turn of each may take."""
        device, begun, limits = self.session.device, [], {}
        for rung in self.rungs:
            if self._refusal(rung):
                continue
            try:
                config = self.configure(rung)
            except UsageError as error:
                self._refuse(rung, str(error))
                continue
            company.start(Assignment(rung.name, config, str(device), company.data, self.threads))
            begun.append(rung)
        for rung in begun:
            self._attempt(rung, partial(company.workers[rung.name].answer, START_S))
        for rung in begun:
            if rung.name not in self.failed:
                self.session.terminal.say(f"{rung.name}: {rung.what}; an epoch that is not counted")
                facts = self._attempt(rung, partial(company.workers[rung.name].ask, "set-up", SET_UP_S[device.type]))
                if facts:
                    self.study.once(f"set-up/{rung.name}", partial(dict, {"reason": None, **facts}))
                    limits[rung.name] = TURN_S + TURN_EPOCHS * facts["epoch_s"]
                self.on_result(self.rows())
        return limits

    def _take(self, left: Sequence[tuple[int, Rung]], company: Company, limits: dict[str, float]) -> None:
        total = self.turns * len(limits)
        with self.session.terminal.progress(total, total - len(left), "epochs") as meter:
            for i, rung in left:
                if rung.name not in self.failed:
                    ask = partial(company.workers[rung.name].ask, "turn", limits[rung.name])
                    seconds = self._attempt(rung, ask)
                    if seconds:
                        self.study.once(_turn_key(i, rung), partial(dict, seconds))
                    self.on_result(self.rows())
                meter.advance(1, f"turn {i + 1}/{self.turns}  {rung.name}")

    def _refusal(self, rung: Rung) -> str | None:
        return self.study.results.get(f"set-up/{rung.name}", {}).get("reason")

    def _refuse(self, rung: Rung, reason: str) -> None:
        self.study.once(f"set-up/{rung.name}", lambda: {"reason": reason})

    def _attempt(self, rung: Rung, ask: Callable[[], Row]) -> Row | None:
        try:
            return ask()
        except (RungRefusedError, RungFailedError) as error:
            if isinstance(error, RungRefusedError):
                self._refuse(rung, str(error))
            self.failed[rung.name] = str(error)
            self.session.terminal.warn(f"{rung.name} is left out: {error}")
            return None


def _turn_key(i: int, rung: Rung) -> str:
    return f"turn-{i:03d}/{rung.name}"
