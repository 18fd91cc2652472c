"""The moving average of the weights against timm's own, to the last bit."""

import pytest
import torch
from helpers import digit_net, raw_bytes
from timm.utils import ModelEmaV3

from skd.support.settings import AverageSettings
from skd.training.average import Average


def moved(net, step):
    """Change the weights, as a training step would; the same number gives the same weights."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(noise.to(parameter.dtype), alpha=0.1)


def bits(net):
    """The bytes of all tensors; bfloat16, which NumPy lacks, is converted to float32, which represents it exactly."""
    return raw_bytes({name: t.float() if t.dtype == torch.bfloat16 else t for name, t in net.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay, warmup", [(0.99996, False), (0.99996, True), (0.6, True), (0.3, False)])
def test_the_same_bits_as_timms(dtype, decay, warmup):
    """Decays on both sides of a half, which lerp computes in two ways; a warm-up that ends, and one that does not."""
    net = digit_net(dtype)
    own, theirs = Average(net, AverageSettings(decay, warmup)), ModelEmaV3(net, decay=decay, use_warmup=warmup)
    start = bits(own.module)
    for step in range(1, 8):
        moved(net, step)
        own.begin_step(step)
        own.update(net)
        theirs.update(net, step=step)
        assert bits(own.module) == bits(theirs.module)
    assert bits(own.module) != start


def test_the_decay_is_read_where_it_is():
    """What a capture keeps is `update`: the same call averages with the decay of whatever step was begun."""
    net = digit_net()
    average = Average(net, AverageSettings(0.5, False))
    average.begin_step(1)
    average.update(net)  # the first step is taken as it is
    for decay in (0.5, 0.5):
        before = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
        moved(net, 1)
        average.begin_step(2)
        average.update(net)
        for name, tensor in average.module.state_dict().items():
            torch.testing.assert_close(tensor, decay * before[name] + (1 - decay) * net.state_dict()[name])


def test_weights_that_are_loaded_are_averaged():
    """A run that is taken up loads its weights into the network that the average was made of."""
    net = digit_net()
    average = Average(net, AverageSettings(0.5, False))
    average.module.load_state_dict({name: torch.zeros_like(t) for name, t in net.state_dict().items()})
    net.load_state_dict({name: torch.ones_like(t) for name, t in net.state_dict().items()})
    average.begin_step(2)
    average.update(net)
    assert {float(value) for tensor in average.module.state_dict().values() for value in tensor.unique()} == {0.5}
