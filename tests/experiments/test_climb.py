import numpy as np
import pytest

from experiments.climb import LEAST, climb, curve, smoothed


def losses(n: int, drop: float, memory: float, noise: float = 0.0) -> list[float]:
    age = np.arange(1, n + 1)
    return list(1 - drop * np.exp(-age / memory) + noise * np.random.default_rng(0).standard_normal(n))


@pytest.mark.parametrize("memory", [3, 20, 60])
def test_a_climb_is_found(memory):
    fit = climb(losses(100, 0.3, memory))
    assert fit.clear
    assert fit.memory == pytest.approx(memory, rel=0.1)
    assert fit.drop == pytest.approx(0.3, rel=0.1)
    assert fit.plateau == pytest.approx(1, rel=0.05)
    assert curve(fit, [1, 50]) == pytest.approx([losses(100, 0.3, memory)[i] for i in (0, 49)], abs=0.01)


def test_a_climb_is_found_in_the_noise_of_batches():
    fit = climb(losses(100, 0.3, 20, noise=0.08))
    assert fit.clear
    assert 10 < fit.memory < 40


def test_noise_alone_is_no_climb():
    """Of a hundred series, though the memory is chosen to make the drop large."""
    generator = np.random.default_rng(1)
    assert sum(climb(list(generator.standard_normal(60))).clear for _ in range(100)) <= 5


def test_a_loss_that_falls_with_age_is_no_climb():
    assert not climb(losses(100, -0.3, 20, noise=0.01)).clear


def test_a_straight_climb_is_bounded():
    assert climb([0.01 * age for age in range(100)]).bounded


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match=f"expected at least {LEAST}"):
        climb([1.0] * (LEAST - 1))


def test_smoothing_keeps_the_length_and_the_mean_of_a_line():
    assert smoothed([1, 2, 3, 4, 5], 3) == pytest.approx([1.5, 2, 3, 4, 4.5])
