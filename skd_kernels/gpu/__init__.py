"""The Triton kernels of the masked operations and of the norm. Importing this package does not import Triton.

mlp.py, attention.py     the operators that PyTorch sees, and the sequence of their kernels
packing.py               casts weights, and puts their kept coordinates side by side
products.py              all matrix products but the gradients of weights: one kernel
epilogues.py             what that kernel does with its accumulator tiles
weight_gradient.py       the gradients of weights: products over tokens, split-K
flash.py                 attention's core, softmax(q k^T) v; flash_backward.py its gradient
sums.py                  gradients of biases and Taylor scores, from the partial sums of other kernels
norm.py                  the kernels of residual_norm, whose operators are in skd_kernels/residual_norm.py
tiles.py, activations.py functions that kernels share
layout.py                where coordinates lie in weights and activations
entry.py, buffers.py     arguments and memory
launch.py                how kernels are started, watched, and recorded to be compiled without a GPU
"""

from __future__ import annotations

import importlib
from typing import Any

# Modules with kernels; each has `examples()`, see launch.py.
MODULES: tuple[str, ...] = ("mlp", "attention", "norm")


def launches(architecture: int, *, quick: bool = False, deit: bool = False) -> list[Any]:
    """Every distinct `launch.Launch` that the modules' examples reach on `architecture`.

    Args:
        architecture: 10 * major + minor of the compute capability, one of `launch.RECORDED_DEVICES`.
        quick: only the examples whose label starts with "quick".
        deit: only those with DeiT in their label: the shapes of its three sizes, in bfloat16.
    """
    from skd_kernels.gpu.launch import record

    distinct: dict[str, Any] = {}
    with record(architecture) as recorder:
        for module in MODULES:
            for label, call in importlib.import_module(f"skd_kernels.gpu.{module}").examples():
                if (quick and not label.startswith("quick")) or (deit and "DeiT" not in label):
                    continue
                recorder.label = label
                call()
    for item in recorder.launches:
        distinct.setdefault(item.key(), item)
    return list(distinct.values())
