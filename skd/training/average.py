"""The exponential moving average of the weights, in one pass whose factor is read on the device."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3

from skd.supernet import SuperNet
from skd.support.settings import AverageSettings


class Average:
    """``average += (1 - decay) * (weights - average)``, as timm's ModelEmaV3 computes it.

    timm passes the decay of a step to its kernels as a number, which would be constant in a CUDA graph. Here the
    factor is a tensor that `begin_step` fills with timm's value for the step, so `update` can be captured.

    Attributes:
        module: the network with the averaged weights, in evaluation mode.
        rounds_at_random: the module has bfloat16 weights, which timm rounds randomly with a generator on the host.
    """

    def __init__(self, supernet: SuperNet, settings: AverageSettings) -> None:
        self._timm = ModelEmaV3(supernet, decay=settings.decay, use_warmup=settings.warmup)
        self.module: SuperNet = self._timm.module
        self.rounds_at_random = has_bfloat16(supernet)
        self._step = 0
        # These tensors stay valid during the whole run, because loading weights into a network copies into them.
        pairs = list(zip(self.module.state_dict().values(), supernet.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        # A factor has the dtype and the device of the tensors that it multiplies.
        self._factors = {
            (average.device, average.dtype): torch.zeros((), device=average.device, dtype=average.dtype)
            for average, _ in self._averaged
        }

    def begin_step(self, number: int) -> None:
        """Prepare the average for step `number`, counted from 1: copy its decay to the device."""
        self._step = number
        for factor in self._factors.values():
            factor.fill_(1.0 - self._timm.get_decay(number))

    @torch.no_grad()
    def update(self, supernet: SuperNet) -> None:
        """Update the average with the weights of `supernet`, the network it was made from, after the current step."""
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
