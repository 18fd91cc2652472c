"""The super-network on several ranks: every rank trains the same entry on its rows of the batch."""

from __future__ import annotations

import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

from skd.supernet import SuperNet
from skd.support.ranks import check_same, others_alive, spread
from skd.training.types import Forward, Group
from skd.vit import probe


def on_ranks(forward: Forward, supernet: SuperNet, group: Group, *, replayed: bool) -> Forward:
    """`forward` (`supernet`, or it compiled) to be trained on every rank of `group`, from rank 0's weights on.

    A step averages the gradients itself where it is replayed as a CUDA graph; otherwise DistributedDataParallel does.

    Raises:
        ValueError, RuntimeError: the ranks' networks are not alike.
    """
    if not replayed:
        return distributed(forward, supernet, group)
    shapes = {name: tuple(tensor.shape) for name, tensor in supernet.state_dict().items()}
    check_same(shapes, "the shape of the network", group)
    spread(supernet, group)
    return forward


def distributed(forward: Forward, supernet: SuperNet, group: Group) -> DistributedDataParallel:
    """`forward` in DistributedDataParallel: gradients are the mean over the ranks.

    Every rank gets rank 0's weights. Modules of width 0 have gradients of zero, so no parameter is ever unused.
    """
    with others_alive(group), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        parallel = DistributedDataParallel(
            forward, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for this
            _settle(parallel, supernet)
    return parallel


@torch.enable_grad()
def _settle(network: DistributedDataParallel, supernet: SuperNet) -> None:
    """Run one backward pass and throw its gradients away, so that the first real step is already the usual one.

    After its first backward pass DistributedDataParallel regroups the gradients into buckets, and the buckets decide
    the order of summation over ranks. Without this, the first step after a resume would differ in its last bits.
    """
    training = supernet.training
    network.eval()
    network(probe(supernet.model)).sum().backward()
    network.train(training)
    supernet.zero_grad(set_to_none=True)
