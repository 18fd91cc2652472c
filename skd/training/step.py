"""A training step, the same function for every run, and `Stepper`, which counts the steps and seeds each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from skd.data.counted import seeded
from skd.supernet import SuperNet
from skd.support.ranks import others_alive
from skd.support.settings import TrainConfig
from skd.training.capture import Capture
from skd.training.optimizer import DeviceRates
from skd.training.state import StepState, make_state
from skd.training.types import Entry, Group, LabelledBatch


class Part(NamedTuple):
    """Images of one backward pass: mixed, with their targets and (branches, images) masks of stochastic depth."""

    images: torch.Tensor
    targets: torch.Tensor
    masks: torch.Tensor | None


def take_step(state: StepState, parts: Iterable[Part], images: int, entry: Entry) -> torch.Tensor:
    """Train one entry on one batch: forward and backward in parts, clipping, decay, update, average of the weights.

    Gradients are made and released inside of it, so none is left between steps. Nothing is read by the host, except
    in float16, whose scaler does.

    Args:
        state: what the step reads and writes.
        parts: of the batch, on the device; their gradients are those of the whole.
        images: in all parts.
        entry: index into the dropout list.

    Returns:
        The mean loss of this rank's images, 0-d, float64.
    """
    try:
        loss = _passes(state, parts, images, entry)
        _update(state)
    finally:  # the gradients of a failed step or capture are released too
        state.optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        state.average.update(state.supernet)
    return loss


def _passes(state: StepState, parts: Iterable[Part], images: int, entry: Entry) -> torch.Tensor:
    """Forward and backward of all parts; the gradients are then the means over the ranks."""
    loss, done = torch.zeros((), dtype=torch.float64, device=state.device), 0
    wrapped = state.forward if isinstance(state.forward, DistributedDataParallel) else None
    for part in parts:
        done += len(part.images)
        if state.paths is not None and part.masks is not None:
            state.paths.set(part.masks)
        # The ranks reduce their gradients only in the backward pass of the last micro-batch.
        with nullcontext() if wrapped is None or done == images else wrapped.no_sync():
            share = _loss(state, part, entry) * (len(part.targets) / images)
            state.scaler.scale(share).backward()
        loss += share.detach()
    if state.group is not None and wrapped is None:
        average_gradients(state.supernet, state.group)
    return loss


def _loss(state: StepState, part: Part, entry: Entry) -> torch.Tensor:
    """The mean loss of a part's images: of the labels, and where there is a teacher of its predictions too."""
    with state.autocast():
        taught = state.teacher(part.images, entry) if state.teacher is not None else []
        logits = state.forward(part.images, entry=entry)
        loss = state.mixing.loss(logits, part.targets)
        return loss if state.teacher is None else state.teacher.loss(loss, logits, taught, entry)


def _update(state: StepState) -> None:
    """Clipping, weight decay and the optimizer."""
    if state.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        clip_grad_norm_(state.supernet.parameters(), state.clip_grad)
    if state.decay is None:
        state.scaler.step(state.optimizer)
        state.scaler.update()
        return
    lr, scaled = state.optimizer.param_groups[0]["lr"], state.scaler.is_enabled()
    if not scaled:
        state.decay.apply(lr)
    scale = state.scaler.get_scale()  # the host waits for it
    state.scaler.step(state.optimizer)
    state.scaler.update()
    # float16: a scale that went down means that the gradients had overflowed and the step was left out.
    if scaled and state.scaler.get_scale() >= scale:
        state.decay.apply(lr)


@torch.no_grad()
def average_gradients(network: torch.nn.Module, group: Group) -> None:
    """The mean over the ranks, in one collective, where no DistributedDataParallel is around the network.

    DistributedDataParallel is not used here because it ties every parameter to the CUDA stream on which it was built,
    and a graph is captured on another stream.
    """
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = (flat / dist.get_world_size(group)).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class Stepper:
    """Takes the steps of a run, one after the other: what is random in each is a function of (seed, step).

    Attributes:
        step: how many are done.
        capture: the step as a CUDA graph; None: steps run one by one.
    """

    def __init__(self, state: StepState, config: TrainConfig) -> None:
        self.state, self.seed, self.step = state, config.seed, 0
        self.capture: Capture | None = None
        self._rates: DeviceRates | None = None
        self._compiled = config.torchcompile
        if state.graph_refusal is None:
            supernet = state.supernet
            self._rates = DeviceRates(state.optimizer, state.device)
            # With cuda_graph=None a batch of another size, such as the last one of an epoch, runs without the graph.
            self.capture = Capture(
                self._recorded,
                state.device,
                # The graph must be captured again when the width table is replaced (the list has outgrown it), and
                # when the collection of scores is switched on or off, since other kernels then run.
                reads=lambda: (supernet.width_table, supernet.scores),
                fixed=config.cuda_graph is True,
            )

    def __call__(self, batch: Sequence[LabelledBatch], entry: Entry) -> torch.Tensor:
        """Train one entry on one batch, given in parts: the loss, as of `take_step`."""
        state, images, masks = self.state, images_in(batch), None
        if state.paths is not None:  # of the whole batch; this rank has its rows rank, rank + world, ...
            masks = state.paths.masks(self.step, images * state.world)[:, state.rank :: state.world]
        if state.average is not None:
            state.average.begin_step(self.step + 1)
        if state.teacher is not None:
            state.teacher.begin_step()
        with others_alive(state.group), seeded(self.seed, "step", self.step):
            parts = self._mixed(batch, masks)
            if self.capture is None:
                # torch.compile would compile again for each new int, so a compiled step gets the entry as a tensor.
                loss = take_step(state, parts, images, self._on_device(entry) if self._compiled else entry)
            else:
                (part,) = parts
                inputs = {"images": part.images, "targets": part.targets, "entry": self._on_device(entry)}
                loss = self.capture(inputs if part.masks is None else inputs | {"masks": part.masks})
        self.step += 1
        return loss

    def _mixed(self, batch: Sequence[LabelledBatch], masks: torch.Tensor | None) -> Iterator[Part]:
        """One part at a time: mixing copies the images."""
        done = 0
        for images, labels in batch:
            own = None if masks is None else masks[:, done : done + len(images)]
            done += len(images)
            yield Part(*self.state.mixing(images, labels), own)

    def _on_device(self, entry: Entry) -> torch.Tensor:
        if isinstance(entry, torch.Tensor):
            return entry
        return torch.full((), entry, dtype=torch.int64, device=self.state.device)  # a copy would block the host

    def _recorded(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        part = Part(inputs["images"], inputs["targets"], inputs.get("masks"))
        return take_step(self.state, [part], len(part.images), inputs["entry"])

    def set_learning_rate(self, schedule: Callable[[int], None], position: int) -> None:
        """Set the learning rate that the scheduler's method `schedule` gives for `position`, an epoch or a step.

        A captured step reads the rate from the device, so the new rate is copied there.
        """
        schedule(position)
        if self._rates is not None:
            self._rates.take()

    def release(self) -> None:
        """Give the graph up. A group of processes cannot end while a graph holds its collectives."""
        if self.capture is not None:
            self.capture.release()


def by_hand(supernet: SuperNet, config: TrainConfig, group: Group = None) -> Stepper:
    """The steps of `skd.train` without its loop: no loaders, no files, and nothing is shown."""
    return Stepper(make_state(supernet, config, group), config)


def images_in(batch: Sequence[LabelledBatch]) -> int:
    """Of a step's batch, given in parts."""
    return sum(len(images) for images, _ in batch)
