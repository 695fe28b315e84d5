"""What each step of the article, and of this project, buys on this device: the rungs timed in turns.

    python -m experiments ladder                 # four epochs of each rung, extrapolated to 35
    python -m experiments ladder --full          # and each trained to its end, with its accuracy
    python -m experiments ladder --small         # a narrow network on some images: ten minutes on two CPU cores

A turn is an epoch of every rung with its validation; turns go A B C, C B A, so that a drift of the machine does not
read as a gain. The first epoch of a rung is not counted, and behind it the making of its batches alone is timed once. A
rung's steps run as they do in training, captured on a GPU. A difference between two rungs is the median of their
differences turn by turn, with its interval. Every rung has a process of its own (`experiments.stand`), and after every
turn ladder.json has all that is known until then: the same command with the same --out goes on from there.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
from model.errors import NonFiniteError, UsageError
from model.interrupts import Interrupts

if TYPE_CHECKING:
    import train
    from profiling.output.terminal import Terminal

Row = dict[str, Any]

FEWEST = 4


class Sizes(NamedTuple):
    """How much a turn is, and how many there are. `turns` None: as many as there is time for; `widths` None: the
    article's network; `images` None: all of them."""

    turns: int | None
    widths: tuple[int, ...] | None = None
    images: int | None = None
    test_images: int | None = None


WHOLE = Sizes(FEWEST)
SMALL = Sizes(None, (8, 8, 8, 8), 2_048, 500)
"""The narrowest network there is, so that the host and the input weigh as much as they can."""
MOST = 32
"""Turns of `small`, of which `SMALL_S` leaves fewer on a slow machine."""
SMALL_S = 420.0
"""Seconds that the turns of `small` may take, of the ten minutes that it may: its processes start and warm up first."""


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

    rows = Measurement(
        study,
        session,
        rungs,
        lambda rung: rung.config(cutout, settings),
        sizes.turns,
        threads,
        lambda rows: study.save(*conclude(rows)),
        target,
    ).run()
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


@dataclasses.dataclass
class Measurement:
    """The turns of `rungs` by `session`, kept in `study`; `failed` says why a rung is left out of this call.

    A failure is not kept, so that the next call tries again; what cannot run on this device is. Without `turns` there
    are as many as SMALL_S has room for by the epochs that warm the rungs up, and the number is kept. `on_result` gets
    the rows after each set-up and each turn. `target` is what a rung's process runs, in `threads` threads.
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
        device = self.session.device.type
        for rung in self.rungs:
            if rung.needs_gpu and device == "cpu":
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
        """The turns that are missing, of rungs that run here, in their order."""
        keys = [(i, rung) for i in range(self.turns) for rung in (self.rungs if i % 2 == 0 else self.rungs[::-1])]
        return [key for key in keys if not self._refusal(key[1]) and _turn_key(*key) not in self.study.results]

    def _fitting(self, names: Iterable[str]) -> int:
        """How many turns of these rungs SMALL_S has room for, an even number from FEWEST to MOST."""
        turn_s = sum(self.study.results[f"set-up/{name}"]["epoch_s"] for name in names)
        turns = min(MOST, max(FEWEST, int(SMALL_S / max(turn_s, 1e-9)) // 2 * 2))
        self.session.terminal.say(f"{turns} turns of {turn_s:.1f} s each will take {turns * turn_s / 60:.0f} min")
        return turns

    def rows(self) -> list[Row]:
        """A row for each rung: its set-up, and the seconds of its turns until now; or the `reason` why it has none."""
        found = []
        for rung in self.rungs:
            kept = self.study.results.get(_set_up_key(rung), {"reason": "it was not begun yet"})
            reason = self.failed.get(rung.name, kept["reason"])
            taken = [_turn_key(i, rung) for i in range(self.turns or 0) if _turn_key(i, rung) in self.study.results]
            head = {**dataclasses.asdict(rung), "changes": dict(rung.changes)}
            found.append({**head, **kept, "reason": reason, "turns": [self.study.results[key] for key in taken]})
        return found

    def _set_up(self, company: Company) -> dict[str, float]:
        """Warm every rung up before one is timed, one after the other; the seconds that a turn of each may take."""
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
            self._attempt(rung, lambda worker=company.workers[rung.name]: worker.answer(START_S))
        for rung in begun:
            if rung.name not in self.failed:
                self.session.terminal.say(f"{rung.name}: {rung.what}; an epoch that is not counted")
                worker = company.workers[rung.name]
                facts = self._attempt(rung, lambda worker=worker: worker.ask("set-up", SET_UP_S[device.type]))
                if facts:
                    self.study.once(_set_up_key(rung), lambda facts=facts: {"reason": None, **facts})
                    limits[rung.name] = TURN_S + TURN_EPOCHS * facts["epoch_s"]
                self.on_result(self.rows())
        return limits

    def _take(self, left: Sequence[tuple[int, Rung]], company: Company, limits: dict[str, float]) -> None:
        total = self.turns * len(limits)
        with self.session.terminal.progress(total, total - len(left), "epochs") as meter:
            for i, rung in left:
                if rung.name not in self.failed:
                    worker, limit_s = company.workers[rung.name], limits[rung.name]
                    seconds = self._attempt(rung, lambda worker=worker, limit_s=limit_s: worker.ask("turn", limit_s))
                    if seconds:
                        self.study.once(_turn_key(i, rung), lambda seconds=seconds: seconds)
                    self.on_result(self.rows())
                meter.advance(1, f"turn {i + 1}/{self.turns}  {rung.name}")

    def _refusal(self, rung: Rung) -> str | None:
        return self.study.results.get(_set_up_key(rung), {}).get("reason")

    def _refuse(self, rung: Rung, reason: str) -> None:
        self.study.once(_set_up_key(rung), lambda: {"reason": reason})

    def _attempt(self, rung: Rung, ask: Callable[[], Row]) -> Row | None:
        try:
            return ask()
        except RungRefusedError as error:
            self._refuse(rung, str(error))
            reason = str(error)
        except RungFailedError as error:
            reason = str(error)
        self.failed[rung.name] = reason
        self.session.terminal.warn(f"{rung.name} is left out: {reason}")
        return None


PLAN = "plan"


def _set_up_key(rung: Rung) -> str:
    return f"set-up/{rung.name}"


def _turn_key(i: int, rung: Rung) -> str:
    return f"turn-{i:03d}/{rung.name}"


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
            summary = train.run(session, config, folder, found, require_ops=True)
        except NonFiniteError as error:
            session.interrupts.deferred = False
            summary = error.summary
        return {key: summary.get(key) for key in keep}

    return study.once(f"full/{name}", whole)
