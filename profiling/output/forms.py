"""Forms of records: names, types and ranges, declared once and checked where a record is read.

A form is a type (`str`, `bool`), a `Number`, None, a literal ("complete", or a version's number), a list of one form, a
tuple of alternative forms, or a dict of forms by key. A key that ends in "?" may be missing or null; a dict's other
keys are dropped, or kept in the form under `str`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control and bidirectional characters, halves of surrogate pairs, and non-characters."""
LONGEST = 1000
"""Characters of a text that are kept."""


class Number(NamedTuple):
    """From `low` to `high`; a whole one has no fraction. True and false are not numbers."""

    low: float = -1e30
    high: float = 1e30
    whole: bool = False

    def __str__(self) -> str:
        return f"a {'whole ' * self.whole}number from {self.low:g} to {self.high:g}"

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number."""
        known = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        return known and (isinstance(value, int) or not self.whole)


COUNT = Number(0, 2**62, whole=True)
POSITIVE = Number(1, 2**62, whole=True)
SECONDS = Number(0, 1e9)
RATE = Number(1e-12, 1e24)
SHARE = Number(0, 1)
NUMBER = Number()
SCALAR = (str, bool, NUMBER, None)
FACT = (*SCALAR, [SCALAR], {str: (*SCALAR, [SCALAR])})
"""An entry of a description of a machine."""


def fit(value: Any, form: Any, where: str) -> Any:
    """A copy of `value` in `form`, cleaned. Raises ValueError naming the first misfit; `where` names `value`."""
    if isinstance(form, tuple) and not isinstance(form, Number):
        return _any_of(value, form, where)
    if isinstance(form, dict) and isinstance(value, dict):
        return _object(value, form, where)
    if isinstance(form, list) and isinstance(value, list):
        return [fit(item, form[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(form, type) and type(value) is form:
        return clean(value)
    if isinstance(form, Number) and form.holds(value):
        return value
    if type(value) is type(form) and not isinstance(form, dict | list | Number) and value == form:
        return value
    raise ValueError(f"{where} is {_shown(value)}, expected {_said(form)}")


def _any_of(value: Any, forms: tuple[Any, ...], where: str) -> Any:
    if isinstance(value, dict | list):  # then the error names the place inside it
        forms = tuple(form for form in forms if type(form) is type(value)) or forms
        if len(forms) == 1:
            return fit(value, forms[0], where)
    for form in forms:
        try:
            return fit(value, form, where)
        except ValueError:
            continue
    raise ValueError(f"{where} is {_shown(value)}, expected {' or '.join(map(_said, forms))}")


def _object(value: dict[str, Any], form: Mapping[Any, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, of in form.items():
        if key is str:
            continue
        name = key.removesuffix("?")
        if name in value and not (name != key and value[name] is None):
            found[name] = fit(value[name], of, f"{where}.{name}" if where else name)
        elif name == key:
            raise ValueError(f"{where or 'it'} has no {name}")
        else:
            found[name] = None
    if str in form:
        rest = {key: item for key, item in value.items() if key not in found}
        found |= {clean(key): fit(item, form[str], f"{where}.{clean(key)}") for key, item in rest.items()}
    return found


def clean(value: Any) -> Any:
    """A copy fit to be shown: texts cut, their control, bidirectional and surrogate characters replaced.

    A number that is not finite becomes None.
    """
    if isinstance(value, str):
        whole = value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"
        return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", whole)
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else clean(repr(value))
    return text if len(text) <= 60 else text[:59] + "…"


def _said(form: Any) -> str:
    words = {str: "a text", bool: "true or false", None: "null"}
    if isinstance(form, dict | list):
        return "an object" if isinstance(form, dict) else "a list"
    return words.get(form) or (str(form) if isinstance(form, Number) else repr(form))
