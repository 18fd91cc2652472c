"""The ways to take one PIAD training step that are timed against each other.

published             masks gather the kept weights, attention is written out; PyTorch's AdamW, timm's first average
slices                slices of the weights, library attention, fused AdamW
torch.compile         `slices`, its block compiled for any widths
slices, graph         `slices` as a CUDA graph of one entry: the best that can be done by hand, but a graph an entry
torch.compile, graph  `torch.compile` likewise
ours                  `skd.train`'s step; on a GPU with the entry on the device
ours, compiled        the same, its block compiled; on a CPU too with the entry as a tensor: the full network's work
ours, graph           the same as one CUDA graph, which serves every entry
ours, scores          the first of ours (the graph on a GPU) while Taylor scores are added up for the importance

A step is forward, backward, update and average of the weights, with label smoothing and without Mixup, stochastic
depth or clipping. On a GPU all run under autocast to bfloat16.

python -m benchmarks.steps --model tiny --batch 16 --contender slices       peak memory of one, in this process
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEma, ModelEmaV3
from torch import nn

import skd
import skd_kernels
from benchmarks import contenders
from benchmarks.contenders import COMPILED, PUBLISHED, SLICES, Compiled
from benchmarks.timing import BACKEND, SIZES, captured, peak_resident
from skd.training.online import OnlineImportance
from skd.training.step import by_hand
from skd.vit import SuperBlock

Layer = Callable[..., torch.Tensor]
SMALLEST = 0.125  # of the MACs, as METHOD's lists end
LR, DECAY, SMOOTHING = 1e-6, 0.9999, 0.1
WARM_UP = 5  # steps; `ours, graph` is captured at the fourth
OURS, OURS_COMPILED, OURS_GRAPH, OURS_SCORES = "ours", "ours, compiled", "ours, graph", "ours, scores"
# The masked layers of a network: attention and MLP.
PLAIN_LAYERS = {
    PUBLISHED: (contenders.attention_published, contenders.mlp_published),
    SLICES: (contenders.attention_slices, contenders.mlp_slices),
}
FIXED = {SLICES: "slices, graph", COMPILED: "torch.compile, graph"}  # by what is captured for one entry
SETTINGS: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "lr": LR, "warmup_epochs": 0}
SETTINGS |= {"smoothing": SMOOTHING, "model_ema_warmup": False, "model_ema_decay": DECAY}


# Networks -------------------------------------------------------------------------------------------


def deit(size: str, device: str) -> Any:
    """A DeiT with random weights, the same each time; drawn on the device, which is faster there."""
    torch.manual_seed(0)
    with torch.device(device):
        return timm.create_model(f"deit_{size}_patch16_224", img_size=SIZES.pixels, depth=SIZES.depth)


def dropout_list(supernet: skd.SuperNet, smallest: float = SMALLEST) -> skd.DropoutList:
    """A nested list down to `smallest` of the MACs: one group less per entry, the modules in a fixed random order.

    As in a planned list widths are multiples of a group and differ between modules; all modules narrow alike.
    """
    infos = supernet.infos
    order = np.repeat(np.arange(len(infos)), [-(-info.full_width // info.group_size) for info in infos])
    np.random.default_rng(0).shuffle(order)
    row = np.array(supernet.widths())
    full, rows = supernet.costs.macs(row), [row.copy()]
    for module in order:
        if supernet.costs.macs(row) <= smallest * full:
            break
        group = infos[module].group_size
        row[module] = (row[module] - 1) // group * group
        rows.append(row.copy())
    return skd.DropoutList(supernet.modules_in_order, rows)


def entry_at(supernet: skd.SuperNet, fraction: float) -> int:
    """The largest sub-network within a fraction of the MACs."""
    macs = supernet.dropout_list.macs
    return int(np.flatnonzero(macs <= fraction * macs[0])[0])


def spread(supernet: skd.SuperNet, count: int) -> list[int]:
    """Entries evenly over the list, both ends included: their mean stands for a uniform draw's."""
    return np.linspace(0, len(supernet.dropout_list) - 1, count).round().astype(int).tolist()


class Network(nn.Module):
    """``network(images, widths)``: a DeiT whose blocks call `attention` and `mlp` on the widths, ints.

    Args:
        attention, mlp: as `contenders.attention_published` and `contenders.mlp_published`.
        compiler: takes the function of one block, and returns what all blocks call in its place.
    """

    def __init__(self, model: Any, attention: Layer, mlp: Layer, compiler: Callable[[Layer], Layer] | None) -> None:
        super().__init__()
        self.model = model

        def block(module: Any, x: torch.Tensor, k: int, m: int) -> torch.Tensor:
            if k:
                own = module.attn
                weights = own.qkv.weight, own.qkv.bias, own.proj.weight, own.proj.bias
                x = x + attention(module.norm1(x), *weights, k, own.num_heads)
            if m:
                fc1, fc2 = module.mlp.fc1, module.mlp.fc2
                x = x + mlp(module.norm2(x), fc1.weight, fc1.bias, fc2.weight, fc2.bias, m)
            return x

        self.block = block if compiler is None else compiler(block)

    def forward(self, images: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for index, module in enumerate(model.blocks):
            x = self.block(module, x, widths[2 * index], widths[2 * index + 1])
        return model.forward_head(model.norm(x))


def gradient(network: nn.Module, forward: Callable[[], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """The gradient of the true classes' logits at all parameters, as one vector."""
    parameters = list(network.parameters())
    chosen = forward().float().gather(1, labels[:, None])
    found = torch.autograd.grad(chosen.sum(), parameters, allow_unused=True)
    zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
    return torch.cat([part.flatten().double() for part in zeros])


# Contenders -----------------------------------------------------------------------------------------


class Step:
    """One contender: ``step(entry)`` trains that sub-network on the batch.

    Attributes:
        compiled: what torch.compile made, where it takes part.
    """

    compiled: Compiled | None = None

    def __init__(self, model: str, batch: tuple[torch.Tensor, torch.Tensor], device: str) -> None:
        self.images, self.labels = batch
        self.device = device
        self.reference = skd.SuperNet(deit(model, "meta"))
        self.widths = dropout_list(self.reference).widths.tolist()

    def __call__(self, entry: int) -> None:
        raise NotImplementedError

    def logits(self, images: torch.Tensor, entry: int) -> torch.Tensor:
        raise NotImplementedError

    @property
    def network(self) -> nn.Module:
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


class PlainStep(Step):
    """`published`, `slices` and `slices` under torch.compile."""

    def __init__(self, name: str, model: str, batch: Any, device: str, backend: str) -> None:
        super().__init__(model, batch, device)
        layers = PLAIN_LAYERS[PUBLISHED if name == PUBLISHED else SLICES]

        def compiler(block: Callable[..., torch.Tensor]) -> Compiled:
            self.compiled = Compiled(block, backend=backend)
            return self.compiled

        self.plain = Network(deit(model, device), *layers, compiler if name == COMPILED else None).train()
        fused = name != PUBLISHED
        settings: dict[str, Any] = {"fused": True, "capturable": device == "cuda"} if fused else {}
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=LR, weight_decay=0.05, **settings)
        average: Any = ModelEmaV3 if fused else ModelEma
        self.average = average(self.plain.model, decay=DECAY)

    @property
    def network(self) -> nn.Module:
        return self.plain.model

    def logits(self, images: torch.Tensor, entry: int) -> torch.Tensor:
        with self.autocast():
            return self.plain(images, self.widths[entry])

    def __call__(self, entry: int) -> None:
        with self.autocast():
            logits = self.plain(self.images, self.widths[entry])
            loss = F.cross_entropy(logits.float(), self.labels, label_smoothing=SMOOTHING)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.plain.model)


class OwnStep(Step):
    """Ours, as `skd.train` takes it."""

    def __init__(self, name: str, model: str, batch: Any, device: str, backend: str) -> None:
        super().__init__(model, batch, device)
        supernet = skd.SuperNet(deit(model, device)).train()
        supernet.dropout_list = dropout_list(supernet)
        graph = name == OURS_GRAPH or (name == OURS_SCORES and device == "cuda")
        config = skd.TrainConfig(batch_size=len(self.images), cuda_graph=graph, **SETTINGS)
        self.step = by_hand(supernet, config)
        if name == OURS_SCORES:
            OnlineImportance(supernet).follow(True)
        self.on_device = device == "cuda" or name == OURS_COMPILED
        self.entry = torch.zeros((), dtype=torch.int64, device=device)
        if graph and self.step.capture is None:
            raise RuntimeError("skd refused to use a CUDA graph here")
        if name == OURS_COMPILED:
            self.compiled = Compiled(SuperBlock.forward, fullgraph=True, backend=backend)
            for block in supernet.model.blocks:
                block.forward = partial(self.compiled, block)

    @property
    def network(self) -> nn.Module:
        return self.step.state.supernet.model

    def logits(self, images: torch.Tensor, entry: int) -> torch.Tensor:
        with self.autocast():
            return self.step.state.supernet(images, entry=self._at(entry))

    def _at(self, entry: int) -> Any:
        return self.entry.fill_(entry) if self.on_device else entry

    def __call__(self, entry: int) -> None:
        self.step([(self.images, self.labels)], self._at(entry))
        if self.step.capture is not None and self.step.capture.failed:
            raise RuntimeError("the step could not be captured; a warning says why")


def names(device: str) -> list[str]:
    """The contenders that serve every entry, ours first; what takes long to be ready comes last.

    On a GPU our step is the graph; without one, it waits for the host and says nothing new.
    """
    if device == "cuda":
        return [OURS_GRAPH, OURS_SCORES, SLICES, PUBLISHED, COMPILED]
    return [OURS, OURS_SCORES, OURS_COMPILED, SLICES, PUBLISHED, COMPILED]


def make(name: str, model: str, batch: Any, device: str, backend: str = BACKEND) -> Step:
    kind = OwnStep if name.startswith(OURS) else PlainStep
    return kind(name, model, batch, device, backend)


def replayed(step: Step, entry: int) -> Callable[[], object]:
    """``step(entry)`` as a CUDA graph of its own; RuntimeError if a replay does not train."""
    try:
        graph = captured(lambda: step(entry), warm_up=3)
    except BaseException:
        step.network.zero_grad(set_to_none=True)  # they may lie in the memory of the graph that failed
        raise
    weight = next(step.network.parameters()).detach()
    before = weight.clone()
    graph.replay()
    if torch.equal(before, weight):
        raise RuntimeError("a replay of the captured step leaves the weights as they were")
    return graph.replay


def images_and_labels(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, SIZES.pixels, SIZES.pixels, generator=generator)
    return images.to(device), torch.randint(0, 1000, (batch,), generator=generator).to(device)


def exact_gradient(model: str, batch: tuple[torch.Tensor, torch.Tensor], entry: int) -> torch.Tensor:
    """By the float64 reference, on the first two images."""
    images, labels = (tensor[:2] for tensor in batch)
    net = skd.SuperNet(deit(model, str(images.device)), copy=False).double()
    net.dropout_list = dropout_list(net)
    with skd_kernels.use("reference"):
        return gradient(net.model, lambda: net(images.double(), entry=entry), labels)


def check(step: Step, exact: torch.Tensor, entry: int, tolerance: float) -> float:
    """Relative error of a contender's gradient on two images, before any step.

    Args:
        exact: `exact_gradient` of the same model and entry.

    Raises:
        RuntimeError: it is above `tolerance`.
    """
    found = gradient(step.network, lambda: step.logits(step.images[:2], entry), step.labels[:2])
    error = float((found - exact).norm() / exact.norm())
    if not error <= tolerance:
        raise RuntimeError(f"the gradient at entry {entry} is off by {error:.1e}")
    return error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description="Peak memory of one contender.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contender", default=OURS)
    args = parser.parse_args()
    step = make(args.contender, args.model, images_and_labels(args.batch, args.device), args.device)
    for _ in range(2):
        step(0)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_resident()
    print(json.dumps(round(peak / 1e6, 1)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
