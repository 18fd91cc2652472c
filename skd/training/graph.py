"""A whole training step as one CUDA graph: captured once, replayed for every entry of the dropout list.

The entry, the images, the targets and the masks of stochastic depth are tensors that stay where they are; widths are
looked up on the device. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
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
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class StepGraph:
    """Forward, backward, clipping, optimizer and average of the weights, in one graph."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.calls = 0
        self.graph: Any = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.loss = torch.zeros((), device=trainer.device)
        self.stream = torch.cuda.Stream()
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
            ValueError: another shape.
        """
        if not self.inputs:
            self.inputs = {name: value.to(self.trainer.device).clone() for name, value in inputs.items()}
        for name, value in inputs.items():
            if value.shape != self.inputs[name].shape:
                shapes = f"{tuple(value.shape)} after {tuple(self.inputs[name].shape)}"
                raise ValueError(f"train_loader gives {name} of shape {shapes}; with cuda_graph they must not change")
            self.inputs[name].copy_(value, non_blocking=True)
        if self.calls < WARMUP:
            self._on_the_side()
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._step()
            self.graph.replay()
        self.calls += 1
        return self.loss.clone()

    def _on_the_side(self) -> None:
        """A capture wants its tensors to have been used on another stream first."""
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
            logits = trainer.supernet(inputs["images"], entry=inputs["entry"])
            loss = trainer.mixing.loss(logits, inputs["targets"])
        loss.backward()
        if trainer.config.clip_grad is not None:
            clip_grad_norm_(trainer.supernet.parameters(), trainer.config.clip_grad)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.ema is not None:
            averages, weights = list(trainer.ema.module.parameters()), list(trainer.supernet.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - trainer.config.model_ema_decay)
        self.loss.copy_(loss.detach())
