"""The pieces of the report's charts, which are plotly figures as plain data; `plotly.graph_objects` accepts them too.

Colours are CSS variables, `var(--name)`, which the page looks up when it draws, so that one figure serves light, dark
and paper. Texts in a figure are HTML to plotly: every text of the report is escaped on its way in.
"""

import html
import textwrap
from dataclasses import dataclass, field
from typing import Any

PAINT = {
    "ideal": "ideal",
    "ceiling_gap": "ceiling",
    "conv_bytes": "bytes",
    "conv_inefficiency": "convolution",
    "convolution": "convolution",
    "batch norm": "norm",
    "memory-bound": "memory",
    "layout and cast": "layout",
    "optimiser and loss": "optimiser",
    "augmentation and data": "augmentation",
    "communication": "communication",
    "unknown": "unknown",
    "idle": "idle",
}
"""Names of the colours of terms and categories of kernels; others are grey."""

CLEAR = "rgba(0,0,0,0)"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


@dataclass(frozen=True)
class Chart:
    """A figure `height` pixels tall. Without traces it is not drawn, for `reason`.

    `narrow` replaces parts of the layout on a phone; `groups` are the values of the traces' `meta` of which one at a
    time can be shown. `says` is what it shows, with its main figures, in a plain sentence for who cannot see it.
    """

    key: str
    title: str
    height: int = 0
    data: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    narrow: dict[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    reason: str = ""
    says: str = ""


def colour(name: str) -> str:
    """The page's colour of this name."""
    return f"var(--{name})"


def line(name: str, width: float, dash: str = "solid") -> dict[str, Any]:
    """A line of that colour."""
    return {"color": colour(name), "width": width, "dash": dash}


def trace(kind: str, **properties: Any) -> dict[str, Any]:
    """A trace that has a place in the legend only if it asks for one."""
    return {"type": kind, "showlegend": False, **properties}


def axis(title: str, **properties: Any) -> dict[str, Any]:
    """An axis with a faint grid; the title is markup, as plotly reads it."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": colour("rule"),
        "zeroline": False,
        "linecolor": colour("rule"),
        **properties,
    }


def margin(left: int = 0, right: int = 12, top: int = 8, bottom: int = 44) -> dict[str, int]:
    """Pixels around the plot; axes that need more take it."""
    return {"l": left, "r": right, "t": top, "b": bottom, "pad": 4}


def layout(**properties: Any) -> dict[str, Any]:
    """The layout that all charts share, with `properties`."""
    font = {"family": FONT, "size": 12}
    tip = {"bgcolor": colour("paper"), "bordercolor": colour("faint"), "align": "left"}
    return {
        "font": font | {"color": colour("soft")},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "hoverlabel": tip | {"font": font | {"color": colour("ink")}},
        "dragmode": False,
        "autosize": True,
        **properties,
    }


def escape(words: str, width: int = 52, limit: int = 300) -> str:
    """A text as plotly's HTML: nothing in it is markup or a template, long ones are broken into lines and cut."""
    lines = textwrap.wrap(cut(words, limit), width) or [""]
    return "<br>".join(html.escape(line, quote=False).replace("{", "&#123;") for line in lines)


def clip(words: str, length: int) -> str:
    """`escape` in one line, cut to `length` characters."""
    return escape(cut(words, length), width=10**6)


def cut(words: str, length: int) -> str:
    """The words as they are, to `length` characters."""
    return words if len(words) <= length else words[: length - 1] + "…"
