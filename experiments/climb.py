"""How the loss of past batches climbs with their age: loss = plateau - drop * exp(-age / memory), by least squares."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CLEAR = 3.0
"""A drop of so many standard errors is told from noise; more than two, since `memory` is chosen to make it large."""

LEAST = 8
"""Batches that a fit needs."""


class Climb(NamedTuple):
    """plateau: the loss of batches long past; drop: by how much the loss of the last one is below; memory in steps.

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
