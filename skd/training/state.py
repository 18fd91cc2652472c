"""All that one training step reads and writes, and how it is put together."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from skd.dropout_list import DropoutList
from skd.supernet import SuperNet
from skd.support.ranks import check_same, rank_of, size_of
from skd.support.settings import TrainConfig
from skd.training.average import Average, has_bfloat16
from skd.training.decay import ExpectedDecay
from skd.training.distillation import Teacher
from skd.training.dropping import DropPaths
from skd.training.mixing import Mixing
from skd.training.optimizer import make_optimizer
from skd.training.parallel import on_ranks
from skd.training.precision import amp_dtype
from skd.training.types import Forward, Group, Refusal


@dataclass
class StepState:
    """What a step needs, and nothing of the run around it.

    Attributes:
        supernet: the network that is trained.
        forward: what a step calls: the super-network, compiled where asked for, and on several ranks wrapped in
            DistributedDataParallel, unless a CUDA graph averages the gradients.
        average: of the weights; None: the weights themselves are evaluated and saved.
        scaler: of the loss, in float16; otherwise it does nothing.
        decay: where weight decay follows the dropout list; None: the optimizer does it.
        teacher: whose predictions are learned besides the labels; None: nobody's.
        precision: of autocast; float32: none.
        clip_grad: the largest norm of the gradient.
        graph_refusal: the reason why steps cannot be replayed as a CUDA graph, or None if they can.
        paths: stochastic depth, while it is in the network.
    """

    supernet: SuperNet
    forward: Forward
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: torch.amp.GradScaler
    decay: ExpectedDecay | None
    mixing: Mixing
    teacher: Teacher | None
    precision: torch.dtype
    clip_grad: float | None
    group: Group
    graph_refusal: Refusal | None
    paths: DropPaths | None = None

    @property
    def device(self) -> torch.device:
        return next(self.supernet.parameters()).device

    @property
    def rank(self) -> int:
        return rank_of(self.group)

    @property
    def world(self) -> int:
        return size_of(self.group)

    @property
    def averaged(self) -> SuperNet:
        """The network that is evaluated and saved."""
        return self.supernet if self.average is None else self.average.module

    @property
    def names(self) -> dict[int, str]:
        """Of the trained parameters, by their `id`."""
        return {id(parameter): name for name, parameter in self.supernet.model.named_parameters()}

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast for the forward pass.

        Its cache of cast weights is off, because a CUDA graph must not read it. That costs nothing where each weight
        is used once per pass, as it is unless activations are computed again.
        """
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled, cache_enabled=False)

    def use(self, dropout_list: DropoutList) -> None:
        """`dropout_list` from now on, in the trained network and in its average, on every rank."""
        check_same(dropout_list.to_json(), "the dropout list", self.group)
        self.supernet.dropout_list = dropout_list
        if self.average is not None:
            self.average.module.dropout_list = dropout_list
        if self.decay is not None:
            self.decay.update()


def make_state(supernet: SuperNet, config: TrainConfig, group: Group = None) -> StepState:
    """The state before the first step; on several ranks all of them call it, and get rank 0's weights.

    Raises:
        ValueError: settings that do not go together, or networks that are not alike on all ranks.
    """
    device = next(supernet.parameters()).device
    why = refuses_graph(supernet, config, device, group)
    if config.cuda_graph and why is not None:
        warnings.warn(f"cuda_graph: the steps run one by one, because {why}", stacklevel=2)
    alone: Forward = supernet
    if config.torchcompile:
        if device.type == "cpu":
            warnings.warn("torchcompile: on a CPU each compiled step does the full network's work", stacklevel=2)
        alone = torch.compile(supernet)  # once for every entry: widths are looked up on the device
    forward = alone if group is None else on_ranks(alone, supernet, group, replayed=why is None)
    precision = amp_dtype(config.amp_dtype, device)
    # These copies are made before stochastic depth is inserted, so that they do not contain it.
    average = None if config.average is None else Average(supernet, config.average)
    taught = config.distillation
    teacher = None if taught is None else Teacher(supernet, alone, taught, config.torchcompile)
    optimizer, decay = make_optimizer(supernet, config.optimizer)
    return StepState(
        supernet=supernet,
        forward=forward,
        optimizer=optimizer,
        average=average,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        decay=decay,
        mixing=Mixing(config.mixing, supernet.model.num_classes),
        teacher=teacher,
        precision=precision,
        clip_grad=config.optimizer.clip_grad,
        group=group,
        graph_refusal=why,
    )


def refuses_graph(supernet: SuperNet, config: TrainConfig, device: torch.device, group: Group) -> Refusal | None:
    """Why a run on `device` does not replay its steps as a CUDA graph; None: it does."""
    if config.cuda_graph is False:
        return Refusal("cuda_graph is off")
    if config.cuda_graph is None and group is not None:
        # DistributedDataParallel overlaps the all_reduce with the backward pass; a graph reduces only at its end.
        return Refusal("several ranks only do so if cuda_graph is on: which is faster depends on what connects them")
    return refusal(supernet, config, device)


def refusal(supernet: SuperNet, config: TrainConfig, device: torch.device) -> Refusal | None:
    """Why the steps of a run on `device` cannot be replayed; None: they can."""
    half = amp_dtype(config.amp_dtype, device) == torch.float16
    reasons = {
        "the network is not on a GPU": device.type != "cuda",
        "float16 needs a gradient scaler, which reads the device in each step": half,
        "grad_accum_steps is above 1": config.grad_accum_steps > 1,
        "grad_checkpointing is on": config.grad_checkpointing,
        "opt is not adamw": config.opt != "adamw",
        "decay='expected' changes its factors as the list grows": config.decay == "expected",
        "an average of bfloat16 weights is rounded at random": config.model_ema and has_bfloat16(supernet),
    }
    return next((Refusal(reason) for reason, holds in reasons.items() if holds), None)
