"""Counted randomness: the same arguments give the same numbers, and nobody else's numbers change."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import mtrand

from skd.data.counted import generator, seeded


def draws() -> list[Any]:
    """One number from each global generator, through the functions that transforms use."""
    return [
        random.random(),
        float(mtrand.random()),
        float(mtrand.normal()),
        float(torch.rand(1)),
        int(mtrand.choice(9)),
    ]


def test_a_function_of_its_arguments() -> None:
    arguments = [(0,), (0, 0), (0, "0"), (0, 1), (1, 0), (2**32,), (0, "order", 1), (0, 1, "order"), (2**64 - 1,)]
    numbers = {generator(*each).bytes(8) for each in arguments}
    assert len(numbers) == len(arguments)
    assert generator(3, "order", 1).bytes(8) == generator(3, "order", 1).bytes(8)


def test_numbers_stay_the_same_in_later_versions() -> None:
    """A resumed run has to continue with what it began with."""
    assert generator(0, "order", 1).permutation(8).tolist() == [2, 7, 3, 0, 6, 4, 5, 1]
    with seeded(0, "augment", 1):
        numbers = (random.getrandbits(16), int(torch.randint(2**16, ())), mtrand.randint(2**16))
    assert numbers == (61749, 32865, 24122)


def test_seeds_all_three_whatever_came_before() -> None:
    with seeded(1, "augment", 2):
        first = draws()
    draws()
    with seeded(1, "augment", 2):
        assert draws() == first
    with seeded(1, "augment", 3):
        assert all(new != old for new, old in zip(draws()[:4], first[:4], strict=True))


@pytest.mark.parametrize("held_back", [False, True])
def test_puts_back_all_three(held_back: bool) -> None:
    """Also the second of a pair of normal numbers that NumPy holds back, and after an exception."""
    results = []
    for inside in (False, True):
        random.seed(1)
        torch.manual_seed(1)
        mtrand.seed(1)
        if held_back:
            mtrand.normal()
        if inside:
            with pytest.raises(KeyError), seeded(5, "x"):
                draws()
                raise KeyError
        results.append([mtrand.normal(), *draws()])
    assert results[0] == results[1]


def test_nested() -> None:
    with seeded(1):
        expected = draws() + draws()
    with seeded(1):
        first = draws()
        with seeded(2):
            draws()
        second = draws()
    # NumPy holds back a normal number across the inner block: that too comes back.
    assert first + second == expected


@pytest.mark.parametrize("counters", [(-1,), (0, -1), (0, 2**64)])
def test_out_of_range(counters: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.2\*\*64 - 1"):
        generator(*counters)
    with pytest.raises(ValueError, match=r"0\.\.2\*\*64 - 1"), seeded(*counters):
        pass


def test_numpy_integers_count_as_integers() -> None:
    assert generator(np.int64(4), np.uint8(2)).bytes(8) == generator(4, 2).bytes(8)
