"""How much the benchmarks measure: on a GPU, on a CPU, and in a rehearsal, which only shows that everything runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

REHEARSAL = os.environ.get("SKD_REHEARSAL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not REHEARSAL else "cpu"
GPU = DEVICE == "cuda"
BACKEND = "eager" if REHEARSAL else "inductor"  # of torch.compile


@dataclass(frozen=True)
class Sizes:
    """The sizes of one run of the benchmarks.

    Attributes:
        models: the DeiTs whose layers are timed.
        step_models: the DeiTs whose training steps are timed.
        batch: images of a masked layer and of a training step.
        statistics: (images, threads) of the statistics; "gpu" for threads leaves PyTorch's setting alone.
        pixels: height and width of the images of a step.
        depth: blocks of the network of a step.
        fractions: shares of the full width of a masked layer.
        step_fractions: shares of the MACs of a step.
        rounds: turns that each contender of a layer or a step has at least.
        averaged: entries that stand for a whole dropout list.
        ready: seconds that a contender of a step may take until it is ready, its compilations included.
        budget: seconds that the contenders of a statistic take turns for.
    """

    models: tuple[str, ...] = ("tiny", "small", "base")
    step_models: tuple[str, ...] = ("tiny", "small", "base")
    batch: int = 128
    statistics: tuple[tuple[int, int | str], ...] = ((128, "gpu"),)
    pixels: int = 224
    depth: int = 12
    fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.125)
    step_fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.125)
    rounds: int = 7
    averaged: int = 4
    ready: float = 600.0
    budget: float = 2.0


# A rented GPU is dear: a model's steps take less than a minute.
ON_GPU = Sizes(
    fractions=(1.0, 0.5, 0.25), step_fractions=(1.0, 0.5, 0.25), rounds=5, averaged=7, ready=30.0, budget=0.5
)
# The statistics of a small batch, where the cost of a call shows, and of the one that `skd convert` takes.
ON_CPU = Sizes(step_models=("tiny",), batch=16, statistics=((16, 1), (16, 2), (128, 2)))
IN_REHEARSAL = Sizes(
    models=("tiny",),
    step_models=("tiny",),
    batch=2,
    statistics=((1, 1),),
    pixels=32,
    depth=2,
    fractions=(0.5,),
    step_fractions=(1.0, 0.5),
    rounds=1,
    averaged=2,
    budget=0.0,
)
SIZES = IN_REHEARSAL if REHEARSAL else ON_GPU if GPU else ON_CPU
