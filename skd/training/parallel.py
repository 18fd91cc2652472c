"""The super-network on several ranks: every rank trains the same entry on its rows of the batch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from skd.ranks import others_alive
from skd.supernet import SuperNet
from skd.taps import probe


def distributed(supernet: SuperNet, group: Any) -> DistributedDataParallel:
    """`supernet`, with rank 0's weights, in DistributedDataParallel: gradients are the mean over the ranks.

    Modules of width 0 have gradients of zero, so no parameter is ever unused.
    """
    with others_alive(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        network = DistributedDataParallel(
            supernet, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        _settle(network)
    return network


@torch.enable_grad()
def _settle(network: DistributedDataParallel) -> None:
    """One backward pass for nothing.

    After its first one DistributedDataParallel puts the gradients into other buckets, and where an element lies in
    its bucket decides in which order the ranks are added up. A resumed run must not add up its first step otherwise.
    """
    supernet: Any = network.module
    training = supernet.training
    network.eval()
    network(probe(supernet.model)).sum().backward()
    network.train(training)
    supernet.zero_grad(set_to_none=True)
