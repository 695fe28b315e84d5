from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data.choices import Augmentation, draw_choices, draw_order, philox

WORD = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert philox(counter, key) == expected
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_is_the_same_on_integers_and_tensors(counter, key):
    assert philox(counter, key) == tuple(int(w) for w in philox(tuple(torch.tensor(c) for c in counter), key))


@pytest.mark.parametrize("flip", ["random", "alternating", "none"])
def test_an_image_s_choices_do_not_depend_on_who_draws_them(flip):
    what = Augmentation(4, flip, 8)
    drawn = draw_choices(what, seed=2**40 + 3, epoch=5, images=200)
    assert [tuple(row) for row in drawn.tolist()] == [what.choose(2**40 + 3, 5, i) for i in range(200)]
    assert torch.equal(draw_choices(what, 2**40 + 3, 5, 50), drawn[:50])


def test_choices_fill_their_ranges_evenly():
    choices = draw_choices(Augmentation(4, "random", 8), seed=1, epoch=0, images=20_000)
    for column, size in zip(choices.unbind(1), (9, 9, 2, 25, 25), strict=True):
        counts = torch.bincount(column, minlength=size)
        assert len(counts) == size
        expected = 20_000 / size
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < size + 5 * (2 * size) ** 0.5  # five standard deviations of chi-square


def test_choices_are_independent_of_each_other():
    choices = torch.cat([draw_choices(Augmentation(4, "random", 8), s, e, 5000) for s in (0, 1) for e in (0, 1)], 1)
    correlation = torch.corrcoef(choices.T.double()) - torch.eye(20)
    assert correlation.abs().max() < 5 / 5000**0.5


def test_seed_and_epoch_matter():
    what = Augmentation(4, "random", 0)
    a = draw_choices(what, 0, 0, 100)
    for seed, epoch in [(1, 0), (0, 1), (2**32, 0)]:
        assert not torch.equal(a, draw_choices(what, seed, epoch, 100))


def test_alternating_shows_both_orientations_in_two_epochs():
    what = Augmentation(2, "alternating", 0)
    flips = [draw_choices(what, 3, epoch, 1000)[:, 2] for epoch in range(4)]
    assert all(torch.equal(a + b, torch.ones(1000)) for a, b in pairwise(flips))
    assert 400 < flips[0].sum() < 600


def test_no_flip():
    assert not draw_choices(Augmentation(2, "none", 0), 3, 0, 1000)[:, 2].any()


def test_without_padding_nothing_is_shifted():
    assert not draw_choices(Augmentation(0, "random", 32), 0, 0, 100)[:, [0, 1, 3, 4]].any()


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 300))
def test_an_order_visits_each_image_once(seed, epoch, images):
    assert torch.equal(draw_order(seed, epoch, images).sort().values, torch.arange(images))


def test_orders_differ_and_repeat():
    a = draw_order(0, 0, 1000)
    assert torch.equal(a, draw_order(0, 0, 1000))
    for other in (draw_order(0, 1, 1000), draw_order(1, 0, 1000), torch.arange(1000)):
        assert (a == other).sum() < 20
