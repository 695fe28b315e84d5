"""An experiment's folder and command line: results kept one by one, then a document, pictures and a page of them all.

An experiment is a list of keys, each with something to compute. What is computed is on the disk before the next key
begins, so that one that was killed goes on where it stopped, and ends with the same numbers.
"""

import datetime
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import Config
from model.errors import UsageError
from model.folder import hold
from model.presets import preset
from profiling.output.errors import ReportError
from profiling.output.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from profiling.output.terminal import Terminal
from profiling.report.plot import Chart

if TYPE_CHECKING:
    import train

HERE = Path(__file__).resolve().parent
VERSION = 1
STATUSES = ("measured", "modelled", "quoted", "unavailable", "")


@dataclass(frozen=True)
class Request:
    """The part of the command line that all experiments share, checked as far as that needs no torch."""

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
        self._require_possible()

    def _require_possible(self) -> None:
        """A wrong value is answered now, whatever the experiment starts from: it suits one of two kinds of presets."""
        try:
            self.configure(preset("article-297"))
        except UsageError:
            self.configure(preset("laptop"))

    def configure(self, base: Config) -> Config:
        """`base` with what the command line says on top."""
        seed = () if self.seed is None else (f"seed={self.seed}",)
        return base.with_settings([*self.settings, *seed])


@dataclass(frozen=True)
class Plot:
    """A chart for the page, and for OUT/key.svg and OUT/key.png; `caption` stands above it, and is the SVG's `desc`."""

    key: str
    title: str
    chart: Chart
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Cells are text. `statuses` are those of the columns' numbers: measured, modelled, quoted or "" for words.

    Without them the first column is words and the others are measured.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    statuses: Sequence[str] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row has not {len(self.columns)} cells, as there are columns")
        if self.statuses and (len(self.statuses) != len(self.columns) or not set(self.statuses) <= set(STATUSES)):
            raise ValueError(f"{self.title}: statuses {list(self.statuses)} are not one of {STATUSES} for each column")

    def status(self, column: int) -> str:
        """The status of a column's numbers."""
        if self.statuses:
            return self.statuses[column]
        return "measured" if column else ""


class Study:
    """The folder `out` of the experiment `name`.

    `settings` are JSON values that identify it: a folder of other settings is refused with UsageError, in words that
    name the difference, and so is one that another process works in. Of them finish() reads `device`, a torch device's
    name, and `data_identity`.
    """

    def __init__(self, name: str, out: Path, settings: dict[str, Any], terminal: Terminal):
        self.name, self.out, self.terminal = name, out, terminal
        self.settings = _as_read(settings)
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

    @property
    def _kept(self) -> Path:
        return self.out / "results.jsonl"

    def _claim(self) -> None:
        """Make the folder this experiment's. Raises UsageError where it is another's."""
        path, mine = self.out / "study.json", {"experiment": self.name, "settings": self.settings}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if path.exists():
                theirs = read_json(path)
                differences = _differences(theirs, mine)
                if differences:
                    raise UsageError(
                        f"--out {self.out} was begun with other settings ({'; '.join(differences)}); repeat them to "
                        "go on, or name a new folder"
                    )
                return
            if any(self.out.iterdir()):
                raise UsageError(f"--out {self.out} is not empty and no experiment's; name a new folder")
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
        data_identity: str | None = None,
        complete: bool = False,
    ) -> dict[str, Any]:
        """Write OUT/name.json, whole or not at all, of what there is until now; returns what it holds.

        `sentences`, `caveats` and `data_identity` are those of `finish`.
        """
        document = {
            "version": VERSION,
            "experiment": self.name,
            "complete": complete,
            "settings": self.settings,
            "environment": self._environment,
            "data_identity": data_identity or self.settings.get("data_identity"),
            "sentences": list(sentences),
            "caveats": list(caveats),
            "tables": [asdict(table) | {"statuses": _statuses(table)} for table in tables],
            "result": result,
        }
        document = _as_read(document)
        write_json(self.out / f"{self.name}.json", document)
        return document

    @cached_property
    def _environment(self) -> dict[str, Any]:
        import torch

        import train
        from profiling.device.environment import environment

        return environment(torch.device(self.settings.get("device", "cpu")), train.ROOT)

    def finish(
        self,
        result: dict[str, Any],
        plots: Sequence[Plot],
        sentences: Sequence[str],
        tables: Sequence[Table],
        caveats: Sequence[str] = (),
        data_identity: str | None = None,
    ) -> dict[str, Any]:
        """Write OUT/name.json, a picture of each plot as SVG and PNG, and OUT/name.html; print tables and sentences.

        The sentences are conclusions drawn from `result`, the first being the page's headline; a caveat limits them.
        `data_identity` is the settings' own where it is not given. Returns what the JSON holds.
        """
        document = self.save(result, sentences, tables, caveats, data_identity, complete=True)
        self._draw(plots)
        try:
            write_text(self.out / f"{self.name}.html", render(document, plots, tables))
            written = f"{self.name}.html"
        except ReportError as error:
            self.terminal.warn(str(error))
            written = f"{self.name}.json"
        for table in tables:
            self.terminal.table(table.title, table.columns, table.rows)
        for caveat in caveats:
            self.terminal.warn(caveat)
        for sentence in sentences:
            self.terminal.say(sentence)
        self.terminal.say(f"written to {self.out / written}")
        return document

    def _draw(self, plots: Sequence[Plot]) -> None:
        try:
            from experiments.study.picture import save
        except ImportError as error:
            self.terminal.warn(f"no PNG and SVG: {error}; pip install -e '.[experiments]' and run the command again")
            return
        for plot in plots:
            if plot.chart.data:
                save(plot.chart, plot.title, self.out / plot.key, plot.caption)


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


def render(document: dict[str, Any], plots: Sequence[Plot], tables: Sequence[Table]) -> str:
    """The page of an experiment's document: one file that asks the network for nothing."""
    from profiling.output.forms import clean
    from profiling.report import html

    document = clean(document)
    sentences = document["sentences"]
    asked = {name: value for name, value in document["settings"].items() if value is not None}
    facts = {**asked, **document["environment"]}
    return _template().render(
        **html.assets([plot.chart for plot in plots]),
        name=document["experiment"],
        headline=sentences[0] if sentences else "No conclusion can be drawn.",
        sentences=sentences[1:],
        caveats=document["caveats"],
        data_warning=html.data_warning({"run": document}),
        small=bool(document["settings"].get("small")),
        plots=plots,
        tables=tables,
        facts=_flat(facts),
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(HERE)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("study.html.jinja")


def _as_read(value: Any) -> Any:
    """What a reader of its JSON gets: the same, whether just computed or kept from before."""
    return json.loads(json.dumps(value))


def _statuses(table: Table) -> list[str]:
    return [table.status(i) for i in range(len(table.columns))]


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


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of the settings and the environment, for people."""
    from profiling.output.units import plain

    pairs = []
    for key, value in facts.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        pairs += _flat(value, f"{name} ") if isinstance(value, dict) else [(name, plain(value))]
    return pairs
