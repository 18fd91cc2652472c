"""The exponential moving average of the weights, in one pass whose factor is read on the device."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3

from skd.supernet import SuperNet
from skd.support.settings import AverageSettings


class Average:
    """``average += (1 - decay) * (weights - average)``, as timm's ModelEmaV3 computes it.

    timm hands the decay of a step to its kernels as a number, which a CUDA graph would keep for ever. Here the factor
    is a tensor: `begin_step` fills it with what timm says of the step, and `update` can be captured.

    Attributes:
        module: the network with the averaged weights, in evaluation mode.
        rounds_at_random: it has bfloat16 weights, which timm rounds at random by a generator on the host.
    """

    def __init__(self, supernet: SuperNet, settings: AverageSettings) -> None:
        self._timm = ModelEmaV3(supernet, decay=settings.decay, use_warmup=settings.warmup)
        self.module: SuperNet = self._timm.module
        self.rounds_at_random = has_bfloat16(supernet)
        self._step = 0
        # The tensors stay for as long as the run: what loads weights into a network copies into them.
        pairs = list(zip(self.module.state_dict().values(), supernet.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        # A factor has the type and the device of what it multiplies.
        self._factors = {
            (average.device, average.dtype): torch.zeros((), device=average.device, dtype=average.dtype)
            for average, _ in self._averaged
        }

    def begin_step(self, number: int) -> None:
        """Step `number`, counted from 1, is the next to be averaged; its decay goes to the device."""
        self._step = number
        for factor in self._factors.values():
            factor.fill_(1.0 - self._timm.get_decay(number))

    @torch.no_grad()
    def update(self, supernet: SuperNet) -> None:
        """Take in the weights of `supernet`, the network that the average was made of, after the step begun last."""
        if self.rounds_at_random:
            self._timm.update(supernet, step=self._step)
            return
        averages, weights = ([pair[side] for pair in self._averaged] for side in (0, 1))
        factors = [self._factors[average.device, average.dtype] for average in averages]
        torch._foreach_lerp_(averages, weights, factors)
        for average, weight in self._copied:
            average.copy_(weight)


def has_bfloat16(module: torch.nn.Module) -> bool:
    return any(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
