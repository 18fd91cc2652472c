"""Counted randomness: random numbers depend on a seed and on counters, not on the numbers drawn before them.

The augmentation of a sample therefore depends only on (seed, epoch, sample); workers, ranks and a resumed run cannot
change it.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import mtrand
from torch.utils.data import get_worker_info

# A marker of its type precedes every counter, so that 0 and "0" differ, and also (1,) and (1, 0), which SeedSequence
# would treat as equal.
_INTEGER, _NAME = 1, 2


def generator(seed: int, *counters: int | str) -> np.random.Generator:
    """A NumPy generator of its own for one use.

    Args:
        seed: 0..2**64 - 1.
        counters: what distinguishes this use from others: integers 0..2**64 - 1, or names such as "order".

    Raises:
        ValueError: one of them is out of range.
    """
    return np.random.Generator(np.random.PCG64(_sequence(seed, counters)))


@contextmanager
def seeded(seed: int, *counters: int | str) -> Iterator[None]:
    """Inside the block the global generators of Python, NumPy and PyTorch (CPU) follow `generator`'s arguments.

    After the block their states are restored, except in a worker of a DataLoader: there nothing else uses them, and
    saving the states costs more than the seeding itself (70 us with it, 20 us without).

    Raises:
        ValueError: the seed or a counter is out of range.
    """
    sequence = _sequence(seed, counters)
    if get_worker_info() is not None:
        _seed(sequence)
        yield
        return
    python, pytorch = random.getstate(), torch.get_rng_state()
    legacy, numpy = mtrand.get_state(legacy=False), mtrand.get_bit_generator()
    _seed(sequence)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(pytorch)
        mtrand.set_bit_generator(numpy)  # its state has not changed in the block
        if legacy["has_gauss"]:  # NumPy held the second of a pair of normal numbers, and the exchange dropped it
            mtrand.set_state(legacy)


def _seed(sequence: np.random.SeedSequence) -> None:
    low, high, third = sequence.generate_state(3, np.uint64).tolist()
    random.seed(low | high << 64)
    # torch.manual_seed would seed the generator of every GPU too, which takes 140 us.
    torch.default_generator.manual_seed(third)
    # Exchanging the generator under NumPy's global functions is faster than seeding it in place.
    mtrand.set_bit_generator(np.random.PCG64(sequence))


def _sequence(seed: int, counters: tuple[int | str, ...]) -> np.random.SeedSequence:
    words: list[int] = []
    for counter in (seed, *counters):
        if isinstance(counter, str):
            words += (_NAME, zlib.crc32(counter.encode()))  # hash() differs from process to process
        else:
            words += (_INTEGER, counter)
    try:
        packed = struct.pack("<" + "IQ" * (len(words) // 2), *words)
    except struct.error:
        raise ValueError(f"seed and counters are {(seed, *counters)}; integers may be 0..2**64 - 1") from None
    return np.random.SeedSequence(np.frombuffer(packed, "<u4"))
