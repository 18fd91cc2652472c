"""Knowledge distillation: a sub-network is also trained to predict what a teacher predicts (Hinton et al., 2015).

The loss of timm's ``LogitDistillationTask`` on the images of the step, after Mixup and CutMix. Here the teacher may
also be a part of the network that is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F

from skd.dropout_list import DropoutList
from skd.supernet import SuperNet
from skd.support.settings import DistillationSettings
from skd.training.types import Entry, Forward

NOTCH = 1 / 12  # of the full network's MACs: how much more than its student the next larger entry has


class Teacher:
    """Predictions that a step's sub-network is trained on besides the labels; see `TrainConfig.kd_teacher`.

    A teacher predicts in evaluation mode, without stochastic depth, and without a gradient. Everything that changes
    from step to step is read from tensors, so that a step can be a CUDA graph.

    Attributes:
        original: a copy of the network as it was before the first step; None: the original is no teacher.
    """

    def __init__(self, supernet: SuperNet, forward: Forward, settings: DistillationSettings, compiled: bool) -> None:
        """
        Args:
            supernet: with the weights that training begins with, the same on all ranks.
            forward: `supernet`, or it compiled; not wrapped for several ranks, which would wait for its gradients.
            compiled: whether to compile the original too.
        """
        self.supernet, self.settings, self._forward = supernet, settings, forward
        self.original: SuperNet | None = None
        if settings.original:
            self.original = deepcopy(supernet).eval().requires_grad_(False)
            self._of_original: Forward = torch.compile(self.original) if compiled else self.original
        self._shares = _shares(settings).to(supernet.width_table.device)
        self._list: DropoutList | None = None
        self._found: list[int] = []  # of each entry the next larger one, on the host and on the device
        self._larger = torch.empty(0, dtype=torch.int64)
        self.begin_step()

    def begin_step(self) -> None:
        """Follow the dropout list where it has changed: which entry teaches which."""
        present = self.supernet.dropout_list
        if not self.settings.larger or present is self._list:
            return
        self._list, self._found, table = present, larger_entries(present), self.supernet.width_table
        if len(self._larger) != len(table):  # the table of widths is another one too, and a graph is captured anew
            self._larger = torch.zeros(len(table), dtype=torch.int64, device=table.device)
        self._larger[: len(present)] = torch.tensor(self._found)
        self._larger[len(present) :] = self._found[-1]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, entry: Entry) -> list[torch.Tensor]:
        """The (B, classes) logits of each teacher for these images, to be called under the step's autocast."""
        logits = [self._of_original(images)] if self.original is not None else []
        if self.settings.larger:
            with _evaluating(self.supernet):
                logits.append(self._forward(images, entry=self._larger_than(entry)))
        return logits

    def loss(
        self, task: torch.Tensor, logits: torch.Tensor, taught: list[torch.Tensor], entry: Entry
    ) -> torch.Tensor:
        """The loss of the labels, `task`, and the divergences from what the teachers predict, in their shares."""
        shares = self._shares_of(entry)
        apart = torch.stack([divergence(logits, teacher, self.settings.temperature) for teacher in taught])
        return (1 - shares.sum()).to(task.dtype) * task + (shares.to(apart.dtype) * apart).sum()

    def _larger_than(self, entry: Entry) -> Entry:
        if isinstance(entry, torch.Tensor):
            return self._larger.index_select(0, entry.reshape(1).clamp(0, len(self._larger) - 1))[0]
        return self._found[entry]

    def _shares_of(self, entry: Entry) -> torch.Tensor:
        if isinstance(entry, torch.Tensor):
            return self._shares.index_select(0, entry.reshape(1).clamp(0, 1))[0]
        return self._shares[min(entry, 1)]

    def state(self) -> dict[str, torch.Tensor]:
        """The weights that a resumed run cannot get from anywhere else."""
        return {} if self.original is None else self.original.state_dict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore them in place.

        Raises:
            RuntimeError: they are of another network.
        """
        if self.original is not None:
            self.original.load_state_dict(state)


def divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of predictions softened by the temperature T, mean over the images, as timm has it.

    The factor keeps the size of the gradient about the same at every temperature (Hinton et al., 2015).

    Args:
        logits, teacher: (B, classes); computed in float32 at least.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student, taught = ((each.to(dtype) / temperature).log_softmax(-1) for each in (logits, teacher))
    return F.kl_div(student, taught, reduction="batchmean", log_target=True) * temperature**2


def larger_entries(dropout_list: DropoutList) -> list[int]:
    """For each entry the smallest that has at least `NOTCH` of the full network's MACs more; the full one at most."""
    macs = dropout_list.macs
    enough = macs[None, :] >= macs[:, None] + NOTCH * macs[0]
    found: list[int] = (enough.sum(1) - 1).clip(min=0).tolist()  # the MACs fall along the list
    return found


def _shares(settings: DistillationSettings) -> torch.Tensor:
    """(2, teachers) float64: the share of each teacher in the loss, of the full network and of all other entries.

    No entry is larger than the full network, so that this teacher's share is the labels' there, or the original's.
    """
    rest = 1 - settings.task_share
    if settings.original and settings.larger:
        rows = [[rest, 0.0], [rest / 2, rest / 2]]
    else:
        rows = [[rest if settings.original else 0.0], [rest]]
    return torch.tensor(rows, dtype=torch.float64)


@contextmanager
def _evaluating(network: SuperNet) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
