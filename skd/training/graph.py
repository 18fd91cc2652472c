"""A whole training step as one CUDA graph: captured once, replayed for every entry of the dropout list.

The entry, the images, the targets and the masks of stochastic depth are tensors that stay where they are; widths are
looked up on the device. On an H100 one capture served every entry, and 1,000 steps of changing entries stayed finite.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

WARMUP = 3  # steps before the capture, so that everything is allocated and tuned


def refusal(trainer: Any) -> str | None:
    """Why this run cannot replay its steps as a CUDA graph; None: it can."""
    config = trainer.config
    reasons = {
        "the network is not on a GPU": trainer.device.type != "cuda",
        "float16 needs a gradient scaler, which reads the device in each step": trainer.amp_dtype == torch.float16,
        "grad_accum_steps is above 1": config.grad_accum_steps > 1,
        "grad_checkpointing is on": config.grad_checkpointing,
        "opt is not adamw": config.opt != "adamw",
        "decay='expected' changes its factors as the list grows": config.decay == "expected",
        "model_ema_warmup changes the decay in each step": config.model_ema and config.model_ema_warmup,
        "an average of bfloat16 weights is rounded at random": config.model_ema and _has_bfloat16(trainer.supernet),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_bfloat16(module: torch.nn.Module) -> bool:
    return any(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


@torch.no_grad()
def average_gradients(network: torch.nn.Module, group: Any) -> None:
    """The mean over the ranks, in one collective.

    DistributedDataParallel ties every parameter to the stream on which it is made, which is not that of the capture.
    """
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = (flat / dist.get_world_size(group)).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class StepGraph:
    """Forward, backward, clipping, optimizer and average of the weights, in one graph.

    Gradients are made and released inside of it, so none is left between steps. Importance and evaluation run between
    replays as they like: they change no tensor that the graph reads, except weights and the table of widths in place.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.calls = 0
        self.graph: Any = None
        self.reads: tuple[Any, Any] = (None, None)  # table of widths and buffers of scores, as the graph has them
        self.failed = False
        self.inputs: dict[str, torch.Tensor] = {}
        self.loss = torch.zeros((), dtype=torch.float64, device=trainer.device)
        self.stream = torch.cuda.Stream(trainer.device)
        self.rates = [torch.tensor(float(group["lr"]), device=trainer.device) for group in self._groups()]
        for group in self._groups():
            group["capturable"] = True
        self.set_learning_rate()

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.trainer.optimizer.param_groups
        return groups

    def set_learning_rate(self) -> None:
        """What the scheduler wrote as numbers goes to where the graph reads it."""
        for group, rate in zip(self._groups(), self.rates, strict=True):
            rate.fill_(float(group["lr"]))
            group["lr"] = rate

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One step.

        Args:
            inputs: images (B, ...), targets (B, classes) or (B,), entry (0-d int64), and masks (branches, B) where
                there is stochastic depth; the same shapes at every call.

        Returns:
            The loss, 0-d.

        Raises:
            ValueError: another shape or dtype.
        """
        # Streams and captures are of the current device, which need not be the network's.
        with torch.cuda.device(self.trainer.device):
            self._copy(inputs)
            self._run()
        self.calls += 1
        return self.loss.clone()

    def _copy(self, inputs: dict[str, torch.Tensor]) -> None:
        if not self.inputs:
            self.inputs = {name: value.to(self.trainer.device, copy=True) for name, value in inputs.items()}
        for name, value in inputs.items():
            there = self.inputs[name]
            if (value.shape, value.dtype) != (there.shape, there.dtype):
                shapes = f"{value.dtype} {tuple(value.shape)} after {there.dtype} {tuple(there.shape)}"
                raise ValueError(f"train_loader gives {name} of {shapes}; with cuda_graph they must not change")
            there.copy_(value, non_blocking=True)

    def _run(self) -> None:
        supernet = self.trainer.supernet
        reads = (supernet.width_table, supernet.scores)  # a list longer than its table has a new one
        changed = any(old is not new for old, new in zip(self.reads, reads, strict=True))
        if changed:  # with scores or without, other kernels take part: none may be compiled inside of a capture
            self.graph, self.reads = None, reads
        if self.calls < WARMUP or self.failed or changed:
            self._on_the_side()
            return
        if self.graph is None:
            self._capture()
        if self.graph is None:
            self._on_the_side()
        else:
            self.graph.replay()

    def release(self) -> None:
        """Give the graph up. A group of processes cannot end while a graph holds its collectives."""
        if self.graph is not None:
            torch.cuda.synchronize(self.trainer.device)
            self.graph.reset()
            self.graph = None

    def _capture(self) -> None:
        """Record a step, without taking it. Where that fails, steps run one by one from now on."""
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            # On the stream of the first steps, where the libraries have their workspaces. A loader's thread that
            # pins memory must not end the capture: hence not the mode "global".
            # The outer stream is the present one: PyTorch 2.11 does not come back to it from a capture that failed.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    self._step()
                except RuntimeError as error:
                    cause = error  # the end of the capture will fail too, and say less
                    raise
        except RuntimeError as error:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            self.failed = True
            reason = str(cause or error).partition("\n")[0]
            warnings.warn(f"cuda_graph: the steps run one by one, because the capture failed: {reason}", stacklevel=2)
        else:
            self.graph = graph

    def _on_the_side(self) -> None:
        """A capture wants its tensors to have been used on its own stream before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _step(self) -> None:
        trainer, inputs = self.trainer, self.inputs
        if trainer.paths is not None:
            trainer.paths.set(inputs["masks"])
        dtype = trainer.amp_dtype
        # A cache of casts would be filled outside of the graph and read inside of it.
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            logits = trainer.network(inputs["images"], entry=inputs["entry"])
            loss = trainer.mixing.loss(logits, inputs["targets"])
        loss.backward()
        if trainer.group is not None:
            average_gradients(trainer.supernet, trainer.group)
        if trainer.config.clip_grad is not None:
            clip_grad_norm_(trainer.supernet.parameters(), trainer.config.clip_grad)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.ema is not None:  # without warm-up the decay is a constant from the second step on
            trainer.ema.update(trainer.supernet, step=trainer.step + 1)
        self.loss.copy_(loss.detach())
