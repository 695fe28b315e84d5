"""What each step of the article, and of this project, buys on this device: the rungs timed in turns.

    python -m experiments ladder                 # four epochs of each rung, extrapolated to 35
    python -m experiments ladder --full          # and each trained to its end, with its accuracy
    python -m experiments ladder --small         # a narrow network on some images: minutes on two CPU cores

A turn is an epoch of every rung with its validation, and the making of its batches alone; turns go A B C, C B A, so
that a drift of the machine does not read as a gain. The first epoch of a rung is not counted. A difference between two
rungs is the median of their differences turn by turn, with its interval.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.rungs import RUNGS, Rung, require_own
from experiments.study import Request, Study, open_study
from model.config import Config
from model.errors import DeviceError, NonFiniteError, UsageError
from model.interrupts import Interrupts

if TYPE_CHECKING:
    import torch

    import train
    from model.trainer import Trainer
    from profiling.console import Terminal

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
) -> dict[str, Any]:
    """Measure and draw the ladder; returns what ladder.json holds."""
    import train
    from experiments import ladder_chart, ladder_report

    sizes = SMALL if request.small else WHOLE
    sizes = sizes._replace(turns=epochs_per_rung or sizes.turns)
    if request.small:
        import torch

        torch.set_num_threads(1)  # threads that wait for each other on a shared core are slower than the differences
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
    measured = measure(study, session, rungs, lambda rung: rung.config(cutout, settings), sizes.turns)
    if full:
        for row in measured:
            if row["reason"] is None:
                row["full"] = train_whole(study, session, Config.from_json(row["config"]), row["name"])
    ladder = ladder_report.analyse(measured, study.settings["device_name"])
    return study.finish(
        ladder,
        ladder_chart.plots(ladder),
        ladder_report.sentences(ladder),
        ladder_report.tables(ladder),
        ladder_report.caveats(ladder, request.small, sizes.images),
    )


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
) -> list[dict[str, Any]]:
    """A row for each rung: its set-up, and the seconds of each turn; or the `reason` why it cannot run here."""
    keys = [(turn, rung) for turn in range(turns) for rung in (rungs if turn % 2 == 0 else rungs[::-1])]
    kept = all(f"set-up/{rung.name}" in study.results for rung in rungs)
    left = [key for key in keys if _key(*key) not in study.results]
    ready: dict[str, Stand | None] = {}

    def stand(rung: Rung) -> Stand:
        if rung.name not in ready:
            session.terminal.say(f"{rung.name}: {rung.what}; an epoch that is not counted")
            ready[rung.name] = Stand(configure(rung), session)
        return ready[rung.name]

    def set_up(rung: Rung) -> dict[str, Any]:
        head = {**dataclasses.asdict(rung), "changes": dict(rung.changes), "reason": None}
        if rung.needs_gpu and session.device.type == "cpu":
            return head | {"reason": "kernels and CUDA graphs need a CUDA GPU"}
        try:
            return head | stand(rung).facts
        except (DeviceError, UsageError) as error:
            return head | {"reason": str(error)}

    rows = {rung.name: study.once(f"set-up/{rung.name}", lambda rung=rung: set_up(rung)) for rung in rungs}
    able = [rung for rung in rungs if rows[rung.name]["reason"] is None]
    left = [(turn, rung) for turn, rung in left if rung in able]
    if kept and left:
        for rung in able:  # after an interruption: all are warm before a turn is timed
            stand(rung)
    with session.terminal.progress(turns * len(able), turns * len(able) - len(left), "epochs") as meter:
        for turn, rung in left:
            study.once(_key(turn, rung), lambda rung=rung: stand(rung).turn())
            meter.advance(1, f"turn {turn + 1}/{turns}  {rung.name}")
    taken = {rung.name: [study.results[_key(turn, rung)] for turn in range(turns)] for rung in able}
    return [{**row, "turns": taken.get(name, [])} for name, row in rows.items()]


def _key(turn: int, rung: Rung) -> str:
    return f"turn-{turn:03d}/{rung.name}"


class Stand:
    """A rung ready to be timed, warmed up by an epoch. `facts` are what its row says of its set-up.

    Raises DeviceError where the rung cannot run on the session's device.
    """

    def __init__(self, config: Config, session: "train.Session"):
        from model.trainer import build_network, choose_dtype, with_available_ops
        from profiling.flops import flops_per_image

        self.session, self.device = session, session.device
        available, reason = with_available_ops(config, self.device, session.terminal.say)
        if reason:
            raise DeviceError(reason)
        dtype = choose_dtype(config.dtype, self.device, config.ops)
        start_s = time.monotonic()
        self.trainer = self._trainer(available, dtype)
        reason = self.trainer.warm_up() if self.device.type == "cuda" or config.step != "eager" else None
        if reason:
            raise DeviceError(f"the step cannot be {config.step}: {reason}")
        reference = dataclasses.replace(config, ops="reference", conv="table")
        loader = getattr(self.trainer.batches, "loader", None)
        self.epoch = 0
        self.facts = {
            "config": config.to_json(),
            "dtype": str(dtype).removeprefix("torch."),
            "workers": 0 if loader is None else loader.num_workers,
            "preprocessing_s": self.preprocessing_s,
            "images": self.trainer.batches.count,
            "test_images": self.trainer.test_count,
            "flops_per_image": flops_per_image(lambda: build_network(reference)).training,
        }
        self.turn()
        self.facts["set_up_s"] = time.monotonic() - start_s

    def _trainer(self, config: Config, dtype: "torch.dtype") -> "Trainer":
        from model.batches import Batches
        from model.trainer import Trainer

        data, start_s = self.session.dataset, time.monotonic()
        batches = Batches(data.train_images, data.train_labels, config, self.device, dtype)
        self._wait()
        self.preprocessing_s = time.monotonic() - start_s
        return Trainer(batches, data, self.session.ranks)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def turn(self) -> dict[str, Any]:
        """Seconds of an epoch's training, of its validation, and of making its batches without training."""
        train_s = self._seconds(lambda: list(self.trainer.train(self.epoch)))
        self.trainer.check_finite()
        eval_s = self._seconds(self.trainer.evaluate)
        input_s = self._seconds(self._only_batches)
        self.epoch += 1
        return {"train_s": train_s, "eval_s": eval_s, "input_s": input_s}

    def _only_batches(self) -> None:
        for batch in self.trainer.batches.epoch(self.epoch):
            self.trainer.batches.load(*batch)

    def _seconds(self, work: Callable[[], Any]) -> float:
        self._wait()
        start_s = time.monotonic()
        work()
        self._wait()
        return time.monotonic() - start_s


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
