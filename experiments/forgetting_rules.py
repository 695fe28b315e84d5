"""The limits of a constant learning rate, read off curves of final loss against rate by one rule for all of them.

A curve's lowest loss is what its best rate learned, and the loss of guessing, ln 10, is having learned nothing. Above
its best rate a curve *starts to rise* where it has given back a tenth of what lies between the two, and has *blown up*
where it has given back half. Between two tested rates the loss is taken as linear in the rate's logarithm.

The article's reading (Part 2): where all curves blow up together, curvature is the limit, which does not know how many
images there are; where a curve rises earlier the more images there are, forgetting is.

How the loss of past batches climbs with their age: loss = plateau - drop * exp(-age / memory), by least squares.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.errors import UsageError
from profiling.output.files import read_json

GUESSING = math.log(10)
"""The loss of ten equal probabilities."""
RISEN, BLOWN_UP = 0.1, 0.5
"""Shares of the learned loss that are given back."""
LEARNED = 0.05
"""A curve that ends less than this share below guessing has learned nothing."""
TOGETHER = 2.0
"""Curves that blow up within this factor, the distance of two tested rates, blow up together."""
APART = math.sqrt(2)
"""Rates further apart than this factor, half of that distance, differ."""


class Limits(NamedTuple):
    """The limits of one curve, in the units of its rates. A limit that the tested rates do not reach is None."""

    images: int
    best_rate: float
    best_loss: float
    rises: float | None
    blows_up: float | None

    @property
    def learned(self) -> bool:
        """Whether any rate got below guessing."""
        return self.best_loss < GUESSING * (1 - LEARNED)


def limits(images: int, rates: Sequence[float], losses: Sequence[float | None]) -> Limits:
    """The limits of a curve over rising `rates`; a loss of None is a run that blew up. Raises ValueError if all did."""
    capped = [2 * GUESSING if loss is None else min(loss, 2 * GUESSING) for loss in losses]
    if all(loss is None for loss in losses):
        raise ValueError(f"no run on {images:,} images has a loss; expected at least one")
    best = min(range(len(rates)), key=capped.__getitem__)
    found = Limits(images, rates[best], capped[best], None, None)
    if not found.learned:
        return found
    tail = list(zip(rates, capped, strict=True))[best:]
    rises, blows_up = (
        _crossing(tail, found.best_loss + share * (GUESSING - found.best_loss)) for share in (RISEN, BLOWN_UP)
    )
    return found._replace(rises=rises, blows_up=blows_up)


def _crossing(tail: Sequence[tuple[float, float]], level: float) -> float | None:
    """The rate at which the loss first reaches `level`, from the curve's lowest point on."""
    for (r0, l0), (r1, l1) in itertools.pairwise(tail):
        if l1 >= level:
            return r0 * (r1 / r0) ** ((level - l0) / (l1 - l0))
    return None


def curvature_limit(curves: Sequence[Limits]) -> float | None:
    """The rate at which all curves, two or more, blow up together (their geometric mean); None where they do not."""
    points = [c.blows_up for c in curves]
    if len(points) < 2 or any(p is None for p in points) or max(points) / min(points) > TOGETHER:
        return None
    return math.exp(sum(map(math.log, points)) / len(points))


def sentences(curves: Sequence[Limits]) -> list[str]:
    """The conclusions from curves of rising sizes, rates in multiples of the base rate."""
    unlearned = [c for c in curves if not c.learned]
    said = [
        f"On {c.images:,} images no rate learned anything to give back (lowest loss {c.best_loss:.2f})."
        for c in unlearned
    ]
    curves = [c for c in curves if c.learned]
    if not curves:
        return said
    return [_of_forgetting(curves), _of_curvature(curves), *said]


def _of_curvature(curves: Sequence[Limits]) -> str:
    if len(curves) < 2:
        return "Fewer than two curves learned anything: nothing can be said about curvature."
    common = curvature_limit(curves)
    reached = [c.blows_up for c in curves if c.blows_up is not None]
    quoted = "the article saw about 8 (quoted)"
    if common is not None:
        agrees = "as" if common / TOGETHER <= 8 <= common * TOGETHER else "where"
        return (
            f"All {len(curves)} curves blow up together, between {times(min(reached))} and {times(max(reached))} the "
            f"base rate, about {times(common)}: the mark of curvature, {agrees} {quoted}."
        )
    if len(reached) < len(curves):
        late = ", ".join(f"{c.images:,}" for c in curves if c.blows_up is None)
        return f"Not all curves blow up within the tested rates (on {late} images none did); {quoted}."
    listed = ", ".join(f"{times(c.blows_up)} on {c.images:,} images" for c in curves)
    return f"The curves do not blow up together ({listed}), so no limit is common to them all; {quoted}."


def _of_forgetting(curves: Sequence[Limits]) -> str:
    rising = [c for c in curves if c.rises is not None]
    if len(rising) < 2:
        return "Fewer than two curves start to rise within the tested rates: nothing can be said about forgetting."
    few, many = rising[0], rising[-1]
    both = f"at {times(few.rises)} the base rate on {few.images:,} images and at {times(many.rises)} on {many.images:,}"
    if few.rises / many.rises > APART:
        earlier = f"{few.rises / many.rises:.1f} times earlier"
        return f"Loss starts to rise {both}, {earlier}: the mark of forgetting, as the article saw."
    if many.rises / few.rises > APART:
        return (
            f"Loss starts to rise {both}: later with more images, the opposite of the forgetting that the article saw."
        )
    return f"Loss starts to rise {both}: no difference that these rates can tell, where the article saw forgetting."


def times(multiple: float) -> str:
    """A multiple of the base rate, for people."""
    return f"{multiple:.2g} times" if multiple < 10 else f"{multiple:.0f} times"


class Evidence(NamedTuple):
    """The limits that an earlier `forgetting` found for its largest set, at its batch size."""

    recipe: dict[str, Any]
    images: int
    batch: int
    forgetting: float | None
    curvature: float | None
    small: bool

    def headroom(self, batch: int, rate: float) -> tuple[float | None, float | None]:
        """(forgetting's, curvature's) limit over what a run takes, 1 where it is at the limit.

        Forgetting goes with what an image moves the weights by, rate / batch; curvature with the rate of a step.
        """
        forgetting = None if self.forgetting is None else self.forgetting / self.batch / (rate / batch)
        return forgetting, None if self.curvature is None else self.curvature / rate


def read_evidence(folder: Path) -> Evidence:
    """From the forgetting.json in `folder`. Raises UsageError where there is none or it is not one."""
    path = folder / "forgetting.json"
    try:
        document = read_json(path)
        result = document["result"]
        curves = [Limits(**curve) for curve in result["limits"]]
        base, largest = result["base_rate"], max(curves, key=lambda c: c.images)
        common = curvature_limit(curves)
        return Evidence(
            result["recipe"],
            largest.images,
            result["recipe"]["batch_size"],
            None if largest.rises is None else largest.rises * base,
            None if common is None else common * base,
            document["settings"]["small"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--evidence {folder} has no finished forgetting: {error}; name the --out of one, or leave it out"
        ) from None


CLEAR = 3.0
"""Standard errors that tell a drop from noise; more than two, since `memory` is chosen to make the drop large."""
LEAST = 8
"""Batches that a fit needs."""


class Climb(NamedTuple):
    """The loss climbs with age from `plateau - drop` to `plateau`, 63 % of the way in `memory` steps.

    `error` is the drop's standard error at that memory; `bounded` says that the memory is the longest that was tried.
    """

    plateau: float
    drop: float
    error: float
    memory: float
    bounded: bool

    @property
    def clear(self) -> bool:
        """Whether there is a climb at all."""
        return self.drop > CLEAR * self.error


def climb(losses: Sequence[float]) -> Climb:
    """Fit `losses` by age, the youngest first, each of one batch; memories from 1 step to as many as there are batches.

    For a given memory the model is linear; the memory is the best of sixty. Raises ValueError for fewer than LEAST.
    """
    n = len(losses)
    if n < LEAST:
        raise ValueError(f"{n} batches are too few for a climb; expected at least {LEAST}")
    age, y = np.arange(1, n + 1), np.asarray(losses, np.float64)
    fits = [(*_linear(age, y, memory), memory) for memory in np.geomspace(1, n, 60)]
    _, plateau, drop, error, memory = min(fits)
    return Climb(float(plateau), float(drop), float(error), float(memory), bool(math.isclose(memory, n)))


def _linear(age: np.ndarray, y: np.ndarray, memory: float) -> tuple[float, float, float, float]:
    """(sum of squares left, plateau, drop, the drop's standard error)."""
    design = np.stack([np.ones(len(y)), -np.exp(-age / memory)], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    left = float(((y - design @ coefficients) ** 2).sum())
    covariance = np.linalg.pinv(design.T @ design) * left / (len(y) - 2)
    return left, coefficients[0], coefficients[1], math.sqrt(max(covariance[1, 1], 0.0))


def curve(fit: Climb, ages: Sequence[float]) -> list[float]:
    """The fitted loss at these ages."""
    return [fit.plateau - fit.drop * math.exp(-age / fit.memory) for age in ages]


def smoothed(losses: Sequence[float], width: int) -> list[float]:
    """The mean of each loss and its neighbours, `width` in all where there are so many; as many values as `losses`."""
    half = width // 2
    return [float(np.mean(losses[max(i - half, 0) : i + half + 1])) for i in range(len(losses))]
