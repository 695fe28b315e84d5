"""An experiment's folder and command line: results kept one by one, then a document, pictures and a page of them all.

An experiment is a list of keys, each with something to compute. Each result is on the disk before the next key begins,
so that an experiment that was killed goes on where it stopped, and ends with the same numbers.
"""

import datetime
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study import drawing
from experiments.study.drawing import Plot
from experiments.study.page import Table, render
from model.config import Config
from model.errors import UsageError
from model.folder import hold
from model.presets import preset
from profiling import ROOT
from profiling.output.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from profiling.output.terminal import Terminal

if TYPE_CHECKING:
    import train

VERSION = 1


@dataclass(frozen=True)
class Request:
    """The options that all experiments share, checked as far as that needs no torch. Raises UsageError."""

    small: bool = False
    out: Path | None = None
    data_dir: Path | None = None
    synthetic: bool = False
    settings: tuple[str, ...] = ()
    seed: int | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.synthetic and self.data_dir:
            raise UsageError("--synthetic and --data-dir contradict each other; give one of them")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is not a folder; name a new one")
        try:  # a value is wrong if it suits neither of the two kinds of presets that experiments start from
            self.configure(preset("article-297"))
        except UsageError:
            self.configure(preset("laptop"))

    def configure(self, base: Config) -> Config:
        """`base` with the command line's settings and seed on top."""
        seed = () if self.seed is None else (f"seed={self.seed}",)
        return base.with_settings([*self.settings, *seed])


class Study:
    """The folder `out` of the experiment `name`.

    `settings` are JSON values that identify it: a folder of other settings is refused with UsageError, which names the
    difference, and so is one that another process works in. finish() reads two of them: `device`, a torch device's
    name, and `data_identity`.
    """

    def __init__(self, name: str, out: Path, settings: dict[str, Any], terminal: Terminal):
        self.name, self.out, self.terminal = name, out, terminal
        self.settings = _as_read(settings)
        self._kept = out / "results.jsonl"
        self._claim()
        self._held = ExitStack()  # until the process ends, or the study is forgotten
        self._held.enter_context(hold(out, terminal.warn))
        self.results: dict[str, dict[str, Any]] = {}
        if self._kept.exists():
            try:
                for row in read_jsonl(self._kept):
                    if not isinstance(row, dict) or not isinstance(row.get("result"), dict) or "key" not in row:
                        raise ValueError(f"{self._kept} has a line that is no key and result")
                    self.results[str(row["key"])] = row["result"]
            except (OSError, ValueError) as error:
                raise UsageError(f"--out {out} holds a damaged record: {error}; name a new folder") from None
            terminal.say(f"{out} holds {len(self.results)} results already: going on from there")

    def _claim(self) -> None:
        """Make the folder this experiment's. Raises UsageError where it is another's."""
        path, mine = self.out / "study.json", {"experiment": self.name, "settings": self.settings}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if path.exists():
                if differences := _differences(read_json(path), mine):
                    raise UsageError(
                        f"--out {self.out} was begun with other settings ({'; '.join(differences)}); repeat them to "
                        "go on, or name a new folder"
                    )
            elif any(self.out.iterdir()):
                raise UsageError(f"--out {self.out} is not empty and no experiment's; name a new folder")
            else:
                write_json(path, mine)
        except (OSError, ValueError) as error:
            raise UsageError(f"--out {self.out} cannot be used: {error}") from None

    def once(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result kept under `key`; computed and kept where there is none. Values are JSON's, tuples are lists."""
        if key not in self.results:
            result = _as_read(compute())
            append_jsonl(self._kept, {"key": key, "result": result})
            self.results[key] = result
        return self.results[key]

    def save(
        self,
        result: dict[str, Any],
        sentences: Sequence[str],
        tables: Sequence[Table],
        caveats: Sequence[str] = (),
        complete: bool = False,
    ) -> dict[str, Any]:
        """Write OUT/name.json, whole or not at all, from the results so far; returns its content. See `finish`."""
        document = {
            "version": VERSION,
            "experiment": self.name,
            "complete": complete,
            "settings": self.settings,
            "environment": self._environment,
            "data_identity": self.settings.get("data_identity"),
            "sentences": list(sentences),
            "caveats": list(caveats),
            "tables": [asdict(table) for table in tables],
            "result": result,
        }
        document = _as_read(document)
        write_json(self.out / f"{self.name}.json", document)
        return document

    @cached_property
    def _environment(self) -> dict[str, Any]:
        import torch

        from profiling.device.environment import environment

        return environment(torch.device(self.settings.get("device", "cpu")), ROOT)

    def finish(
        self,
        result: dict[str, Any],
        plots: Sequence[Plot],
        sentences: Sequence[str],
        tables: Sequence[Table],
        caveats: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Write OUT/name.json, each plot as SVG and PNG, and OUT/name.html; print tables, caveats and sentences.

        The sentences are conclusions drawn from `result`, the first being the page's headline; a caveat limits them.
        Returns the JSON's content.
        """
        document = self.save(result, sentences, tables, caveats, complete=True)
        try:
            drawn = {plot.key: drawing.save(plot, self.out) for plot in plots if not plot.reason}
        except ImportError as error:
            self.terminal.warn(f"no pictures: {error}; pip install -e '.[experiments]' and run the command again")
            drawn = {}
        write_text(self.out / f"{self.name}.html", render(document, plots, tables, drawn))
        for table in tables:
            self.terminal.table(table.title, table.columns, table.rows)
        for caveat in caveats:
            self.terminal.warn(caveat)
        for sentence in sentences:
            self.terminal.say(sentence)
        self.terminal.say(f"written to {self.out / self.name}.html")
        return document


def open_study(name: str, request: Request, session: "train.Session", extra: dict[str, Any] | None = None) -> Study:
    """The study of this command line on this session's data and device; `extra` are the experiment's own settings."""
    from profiling.device.environment import device_name

    out = request.out or Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    settings = {
        "small": request.small,
        "set": list(request.settings),
        "seed": request.seed,
        "device": str(session.device),
        "device_name": device_name(session.device),
        "data_identity": session.dataset.identity,
        "data_sha256": session.dataset.fingerprint(),
        **(extra or {}),
    }
    study = Study(name, out, settings, session.terminal)
    session.terminal.say(f"results go to {out}; after an interruption the same command with --out {out} goes on")
    return study


def _as_read(value: Any) -> Any:
    """`value` as a reader of its JSON gets it, so that a computed result equals a kept one."""
    return json.loads(json.dumps(value))


def _differences(theirs: Any, mine: dict[str, Any]) -> list[str]:
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs.get("experiment") != mine["experiment"]:
        return [f"experiment: {theirs.get('experiment')}, now {mine['experiment']}"]
    before, now = theirs.get("settings"), mine["settings"]
    before = before if isinstance(before, dict) else {}
    return [
        f"{key}: {before.get(key)!r}, now {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
