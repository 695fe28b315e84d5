"""The state of a run in its checkpoint: every name, type and range is checked as it is read, and nothing after that."""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import Config
from model.errors import CheckpointError, UsageError

TIMED = ("preprocessing", "warm-up", "training", "evaluation")
"""Phases whose seconds a resumed run goes on counting."""

_COUNT, _POSITIVE, _SHARE = "a whole number from 0 to 2^53", "a number from 0 on", "a number from 0 to 1"
_MOST = {
    _COUNT: 2**53,  # beyond it a float, as which a schedule computes with a step, is not every whole number
    _POSITIVE: sys.float_info.max,
    _SHARE: 1,
}
ROW = {
    "epoch": _COUNT,
    "step": _COUNT,
    "learning_rate": _POSITIVE,
    "epoch_train_s": _POSITIVE,
    "epoch_eval_s": _POSITIVE,
    "train_loss": _POSITIVE,
    "train_accuracy": _SHARE,
    "test_loss": _POSITIVE,
    "test_accuracy": _SHARE,
    "images_per_s": _POSITIVE,
    "train_s": _POSITIVE,
    "eval_s": _POSITIVE,
}
"""The values of each epoch and their kinds. Losses are means over images, times are in seconds."""


@dataclass(frozen=True)
class RunState:
    """The run of a checkpoint, after the epochs of `history` and perhaps a part of the next.

    data        sha256 of all images and labels, see `Dataset.fingerprint`
    world_size  processes that the run was split over
    history     a row of the log for each epoch, with the keys of ROW
    seconds     time spent in each phase of TIMED
    """

    config: Config
    data: str
    world_size: int
    history: list[dict[str, Any]]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"config": self.config.to_json()}

    @staticmethod
    def from_json(values: Any, step: Any) -> "RunState":
        """The state that a checkpoint of `step` holds as JSON values.

        Raises ValueError naming what is missing, unknown, of another type, out of range, or contradicts `step`.
        """
        values = _record(values, [f.name for f in dataclasses.fields(RunState)], "state")
        try:
            config = Config.from_json(_record(values["config"], [f.name for f in dataclasses.fields(Config)], "config"))
        except UsageError as error:
            raise ValueError(str(error)) from None
        if not (isinstance(values["data"], str) and re.fullmatch("[0-9a-f]{64}", values["data"])):
            raise ValueError("data is not a sha256")
        if _require(_COUNT, values["world_size"], "world_size") < 1:
            raise ValueError("world_size is less than 1")
        for name, value in _record(values["seconds"], TIMED, "seconds").items():
            _require(_POSITIVE, value, f"seconds.{name}")
        history = values["history"]
        if not isinstance(history, list):
            raise ValueError("history is not a list")
        for number, row in enumerate(history, start=1):
            for name, value in _record(row, ROW, f"row {number} of history").items():
                _require(ROW[name], value, f"{name} in row {number} of history")
        _require(_COUNT, step, "step")
        state = RunState(**{**values, "config": config})
        if history:
            state.require_step(step, history[0]["step"])
        return state

    def require_step(self, step: int, steps_per_epoch: int) -> None:
        """Raise ValueError unless the run can have done `step` steps after the epochs of `history`."""
        epochs, done = self.config.epochs, len(self.history)
        if any((row["epoch"], row["step"]) != (n, n * steps_per_epoch) for n, row in enumerate(self.history, start=1)):
            raise ValueError(f"history does not have every epoch after {steps_per_epoch:,} steps more, in order")
        if not (done <= epochs and done * steps_per_epoch <= step <= min(done + 1, epochs) * steps_per_epoch):
            raise ValueError(
                f"step {step:,} contradicts its history of {done:,} epochs of {steps_per_epoch:,} steps, in a run of "
                f"{epochs:,}"
            )


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError naming each key whose value differs between the checkpoint and the request.

    found    what the checkpoint's state says of `what` (say, "configuration"), as JSON values
    wanted   the same, as this run asks for it
    """
    differences = []
    for key in sorted(found.keys() | wanted.keys()):
        there, here = (json.dumps(values[key])[:200] if key in values else None for values in (found, wanted))
        if there is None:
            differences.append(f"{key}: missing in the checkpoint, {here} asked for")
        elif here is None:
            differences.append(f"{key}: {there} in the checkpoint, not asked for")
        elif found[key] != wanted[key]:
            differences.append(f"{key}: {there} in the checkpoint, {here} asked for")
    if differences:
        raise CheckpointError(
            f"the checkpoint is of another {what}: {'; '.join(differences)};"
            " ask for the same, or start afresh in another folder"
        )


def _record(value: Any, names: Any, what: str) -> dict[str, Any]:
    """`value`, a dict with exactly these keys."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a record")
    missing, unknown = [name for name in names if name not in value], [name for name in value if name not in names]
    if missing or unknown:
        raise ValueError(f"{what} {f'lacks {missing[0]}' if missing else f'has an unknown {ascii(unknown[0])[:40]}'}")
    return value


def _require(kind: str, value: Any, what: str) -> Any:
    """`value`, a number of this kind."""
    fits = isinstance(value, int if kind == _COUNT else int | float) and not isinstance(value, bool)
    if not (fits and 0 <= value <= _MOST[kind]):
        raise ValueError(f"{what} is not {kind}")
    return value
