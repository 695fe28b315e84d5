"""An experiment's page: conclusions, pictures, tables and settings in one file that asks the network for nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.study.drawing import COLOURS, Plot
from profiling.output.forms import clean
from profiling.output.units import plain

STATUSES = {
    "measured": "seen on this machine",
    "modelled": "calculated from what was measured",
    "quoted": "said by somebody else",
}
IMAGES = {
    "synthetic": "SYNTHETIC IMAGES. Accuracies say nothing about CIFAR-10.",
    "copy": "A COPY OF CIFAR-10, not the official files: accuracies are not comparable with published ones.",
}
"""The warning for images of this identity that are not the official ones."""
UNKNOWN_IMAGES = "IMAGES OF UNKNOWN ORIGIN. Accuracies are not comparable with published ones."

TEMPLATE = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
).get_template("study.html.jinja")


@dataclass(frozen=True)
class Table:
    """Cells are text. `statuses` are those of the columns' numbers, or "" for words.

    Without them the first column is words and the others are measured. Raises ValueError for rows or statuses that do
    not fit the columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    statuses: Sequence[str] = ()

    def __post_init__(self) -> None:
        statuses = self.statuses or ["", *["measured"] * (len(self.columns) - 1)]
        object.__setattr__(self, "statuses", list(statuses))
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row does not have {len(self.columns)} cells, one for each column")
        if len(statuses) != len(self.columns) or not set(statuses) <= {*STATUSES, ""}:
            raise ValueError(f"{self.title}: expected one of {[*STATUSES, '']} for each column, not {statuses}")


def render(document: dict[str, Any], plots: Sequence[Plot], tables: Sequence[Table], drawn: Mapping[str, str]) -> str:
    """The page of an experiment's document; `drawn` has the SVG of each plot's key that could be drawn."""
    document = clean(document)
    asked = {name: value for name, value in document["settings"].items() if value is not None}
    identity = document["data_identity"]
    return TEMPLATE.render(
        colours=COLOURS,
        name=document["experiment"],
        sentences=document["sentences"] or ["No conclusion can be drawn."],
        caveats=document["caveats"],
        images=None if identity == "official" else IMAGES.get(identity, UNKNOWN_IMAGES),
        small=bool(asked.get("small")),
        plots=plots,
        drawn=drawn,
        tables=tables,
        facts=_flat({**asked, **document["environment"]}),
        statuses=STATUSES,
    )


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of settings and environment, for people."""
    pairs = []
    for key, value in facts.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        pairs += _flat(value, f"{name} ") if isinstance(value, dict) else [(name, plain(value))]
    return pairs
