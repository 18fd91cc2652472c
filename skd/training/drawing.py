"""Which entry of the dropout list a step trains: a function of (seed, step), the same on every rank.

uniform     every entry alike, the last included (METHOD 2, step 5)
small       each in inverse proportion to its MACs
sandwich    the full network, the smallest and one at random take turns: the sandwich rule of slimmable networks (Yu,
            Huang, 2019), which trains the three in one step. Here a step trains one, so that it costs what other
            steps cost: one pass forward and backward, of (1 + s + m) / 3 of the full network's MACs on average, with
            s the smallest's share and m the mean of the list.
"""

from __future__ import annotations

import numpy as np

from skd.data.counted import generator
from skd.dropout_list import DropoutList


def draw(dropout_list: DropoutList, sampling: str, seed: int, step: int) -> int:
    """The entry of step `step`, counted from 0 over the whole run."""
    own, last = generator(seed, "entry", step), len(dropout_list) - 1
    if sampling == "sandwich" and step % 3 < 2:
        return 0 if step % 3 == 0 else last
    if sampling == "small":
        # Sums are taken one after the other, so that every processor rounds them alike.
        ends = np.cumsum(1 / dropout_list.macs)
        return min(int(np.searchsorted(ends, own.random() * ends[-1], side="right")), last)
    return int(own.integers(last + 1))


def frequencies(dropout_list: DropoutList, sampling: str) -> np.ndarray:
    """(entries,) float64: how often `draw` gives each entry, up to a common factor."""
    if sampling == "small":
        return np.asarray(1 / dropout_list.macs, dtype=np.float64)
    often = np.ones(len(dropout_list))
    if sampling == "sandwich":
        often[0] += len(dropout_list)
        often[-1] += len(dropout_list)
    return often
