"""Mixup, CutMix and the loss of a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target

from skd.support.settings import MixingSettings


class Mixing:
    """timm's Mixup and CutMix, one draw per batch, and cross-entropy with label smoothing.

    The caller seeds NumPy: then the draw is a function of what it was seeded with.
    """

    def __init__(self, settings: MixingSettings, classes: int) -> None:
        self.classes, self.smoothing = classes, settings.smoothing
        self.mixup: Mixup | None = None
        if settings.prob and (settings.mixup or settings.cutmix):
            self.mixup = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=settings.prob,
                switch_prob=settings.switch_prob,
                num_classes=classes,
            )

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, ...) images and (B,) labels to mixed images and (B, classes) targets; labels as they are, if off.

        The images given are not changed.
        """
        if self.mixup is None:
            return images, labels
        images = images.clone()
        # Not Mixup's own call: it refuses a batch of odd size, whose middle image would mix with itself.
        lam = self.mixup._mix_batch(images)
        return images, mixup_target(labels, self.classes, lam)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
