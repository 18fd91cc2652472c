"""Which entries are trained: how often each is drawn, and what decay makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import digit_net, nested

import skd
from skd.support.settings import SAMPLINGS
from skd.training.decay import ExpectedDecay, inclusion
from skd.training.drawing import draw, frequencies

ENTRIES = [[16, 12, 16, 24], [8, 12, 16, 8], [8, 0, 16, 0], [8, 0, 0, 0]]


def listed(*rows: list[int]) -> skd.DropoutList:
    return nested(digit_net(), *rows).dropout_list


def by_hand(macs: np.ndarray, sampling: str) -> np.ndarray:
    """The probability of each entry."""
    n = len(macs)
    if sampling == "small":
        return (1 / macs) / (1 / macs).sum()
    alike = np.ones(n) / n
    return alike if sampling == "uniform" else (alike + np.eye(n)[0] + np.eye(n)[-1]) / 3


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_entries_are_drawn_as_often_as_is_said(sampling: str) -> None:
    """Chi-square with 4 degrees of freedom: 18.5 is passed once in 1,000; the seed is fixed."""
    entries, steps = listed(*ENTRIES), 1500
    expected = by_hand(entries.macs, sampling)
    often = frequencies(entries, sampling)
    np.testing.assert_allclose(often / often.sum(), expected, rtol=1e-12)
    drawn = [draw(entries, sampling, 3, step) for step in range(steps)]
    assert drawn == [draw(entries, sampling, 3, step) for step in range(steps)], "a function of (seed, step)"
    assert sampling == "sandwich" or drawn != [draw(entries, sampling, 4, step) for step in range(steps)]
    counts = np.bincount(drawn, minlength=5)
    assert ((counts - steps * expected) ** 2 / (steps * expected)).sum() < 18.5


def test_the_sandwich_takes_turns() -> None:
    entries = listed(*ENTRIES)
    drawn = [draw(entries, "sandwich", 0, step) for step in range(300)]
    assert set(drawn[0::3]) == {0} and set(drawn[1::3]) == {4} and set(drawn[2::3]) == set(range(5))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_list_of_one(sampling: str) -> None:
    assert {draw(listed(), sampling, 0, step) for step in range(6)} == {0}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_inclusion_follows_the_draws(sampling: str) -> None:
    net = nested(digit_net(torch.float64), *ENTRIES)
    p = by_hand(net.dropout_list.macs, sampling)
    expected = np.array([sum(p[e] for e, width in enumerate([24, 12, 12, 0, 0]) if c < width) for c in range(24)])
    np.testing.assert_allclose(inclusion(net.dropout_list, 1, 24, sampling), expected, rtol=1e-12)
    weight = net.model.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    ExpectedDecay(net, [weight], 0.5, sampling).apply(0.1)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.05 * torch.from_numpy(expected))[:, None])
