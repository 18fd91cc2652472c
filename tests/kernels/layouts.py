"""The same values at different places in memory, of tensors with two dimensions or more."""

from __future__ import annotations

import torch

LAYOUTS = {
    "contiguous": lambda x: x,
    "sliced": lambda x: torch.cat([x, x], dim=-2)[..., : x.shape[-2], :],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided along D": lambda x: x.mT.contiguous().mT,
    "zero stride": lambda x: x[:1].expand(x.shape),
    "unaligned": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(x.shape),
}
