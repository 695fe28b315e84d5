"""A number with its provenance: measured, modelled, quoted or unavailable."""

from dataclasses import asdict, dataclass
from typing import Any

MEASURED, MODELLED, QUOTED, UNAVAILABLE = STATUSES = ("measured", "modelled", "quoted", "unavailable")
TARGET_ACCURACY = 0.94
"""The article's 256 s are the time to it (quoted)."""


@dataclass(frozen=True)
class Number:
    """`value` in `unit`; if unavailable None, with the reason as `source`. Raises ValueError for a mixture."""

    value: float | int | None
    unit: str
    status: str
    source: str

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}, expected one of {', '.join(STATUSES)}")
        if (self.value is None) != (self.status == "unavailable"):
            raise ValueError(f"value {self.value} cannot be {self.status}: what is not known is None and unavailable")
        if not self.source:
            raise ValueError("a figure needs its source, or the reason why it is unavailable")

    def to_json(self, label: str | None = None) -> dict[str, Any]:
        """The record, with `label` if given."""
        return asdict(self) | ({} if label is None else {"label": label})


def measured(value: float | int, unit: str, source: str) -> Number:
    """Measured on this machine."""
    return Number(value, unit, "measured", source)


def modelled(value: float | int, unit: str, source: str) -> Number:
    """Calculated."""
    return Number(value, unit, "modelled", source)


def quoted(value: float | int, unit: str, source: str) -> Number:
    """Quoted from a source."""
    return Number(value, unit, "quoted", source)


def unavailable(unit: str, reason: str) -> Number:
    """Not known."""
    return Number(None, unit, "unavailable", reason)
