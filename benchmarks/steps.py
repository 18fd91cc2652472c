"""The ways to take one PIAD training step that are timed against each other.

published             masks gather the kept weights, attention is written out; PyTorch's AdamW, timm's first average
slices                slices of the weights, library attention, fused AdamW
torch.compile         `slices`, its block compiled for any widths
slices, graph         `slices` as a CUDA graph of one entry: the best that can be done by hand, but a graph per entry
torch.compile, graph  `torch.compile` likewise
ours                  `skd.train`'s step; on a GPU with the entry on the device
ours, compiled        the same, its block compiled; on a CPU too with the entry as a tensor: the full network's work
ours, graph           the same as one CUDA graph, which serves every entry
ours, scores          the first of ours (the graph on a GPU) while Taylor scores are added up for the importance

A step is forward, backward, update and average of the weights, with label smoothing and without Mixup, stochastic
depth or clipping. On a GPU all run under autocast to bfloat16.

python -m benchmarks.steps --model base --fraction 1.0 --fraction 0.25 --json profile.json

shows where the time of a step goes, kernel by kernel: of each contender and each share of the MACs the milliseconds
of a step by the wall clock, and of every kernel the milliseconds and the launches. On a CPU these are operators.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from timm.utils import ModelEma, ModelEmaV3
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import skd
import skd_kernels
from benchmarks import registry, timing
from benchmarks.op import Compiled
from benchmarks.registry import COMPILED, HEADS, PUBLISHED, SLICES
from benchmarks.result import Info
from benchmarks.table import profile_table
from benchmarks.timing import DEVICE, GPU, SIZES, Call
from skd.training.online import OnlineImportance
from skd.training.step import by_hand
from skd.vit import SuperBlock

Layer = Callable[..., torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels
SMALLEST = 0.125  # of the MACs, as METHOD's lists end
LR, DECAY, SMOOTHING = 1e-6, 0.9999, 0.1
WARM_UP = 5  # steps; `ours, graph` is captured at the fourth
OURS, OURS_COMPILED, OURS_GRAPH, OURS_SCORES = "ours", "ours, compiled", "ours, graph", "ours, scores"
# The masked layers of a network: attention and MLP.
PLAIN_LAYERS = {
    PUBLISHED: (registry.attention_published, registry.mlp_published),
    SLICES: (registry.attention_slices, registry.mlp_slices),
}
FIXED = {SLICES: "slices, graph", COMPILED: "torch.compile, graph"}  # by what is captured for one entry
RECIPE = skd.TrainConfig(
    mixup=0.0, cutmix=0.0, drop_path=0.0, lr=LR, warmup_epochs=0, smoothing=SMOOTHING, model_ema_warmup=False,
    model_ema_decay=DECAY,
)  # fmt: skip


# Networks -------------------------------------------------------------------------------------------


def deit(size: str, device: str) -> VisionTransformer:
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
        attention, mlp: as `registry.attention_published` and `registry.mlp_published`.
        compiler: takes the function of one block, and returns what all blocks call in its place.
    """

    def __init__(
        self, model: VisionTransformer, attention: Layer, mlp: Layer, compiler: Callable[[Layer], Layer] | None
    ) -> None:
        super().__init__()
        self.model = model

        def block(module: Block, x: torch.Tensor, k: int, m: int) -> torch.Tensor:
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

    def __init__(self, model: str, batch: Batch, device: str) -> None:
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

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")


class PlainStep(Step):
    """`published`, `slices` and `slices` under torch.compile."""

    def __init__(self, name: str, model: str, batch: Batch, device: str, backend: str) -> None:
        super().__init__(model, batch, device)
        layers = PLAIN_LAYERS[PUBLISHED if name == PUBLISHED else SLICES]

        def compiler(block: Callable[..., torch.Tensor]) -> Compiled:
            self.compiled = Compiled(block, backend=backend)
            return self.compiled

        self.plain = Network(deit(model, device), *layers, compiler if name == COMPILED else None).train()
        fused = name != PUBLISHED
        make = partial(torch.optim.AdamW, self.plain.parameters(), lr=LR, weight_decay=0.05)
        self.optimizer = make(fused=True, capturable=device == "cuda") if fused else make()
        self.average = (ModelEmaV3 if fused else ModelEma)(self.plain.model, decay=DECAY)

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

    def __init__(self, name: str, model: str, batch: Batch, device: str, backend: str) -> None:
        super().__init__(model, batch, device)
        supernet = skd.SuperNet(deit(model, device)).train()
        supernet.dropout_list = dropout_list(supernet)
        graph = name == OURS_GRAPH or (name == OURS_SCORES and device == "cuda")
        config = replace(RECIPE, batch_size=len(self.images), cuda_graph=graph)
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

    def _at(self, entry: int) -> int | torch.Tensor:
        return self.entry.fill_(entry) if self.on_device else entry

    def __call__(self, entry: int) -> None:
        self.step([(self.images, self.labels)], self._at(entry))
        if self.step.capture is not None and self.step.capture.failed:
            raise RuntimeError("the step could not be captured; a warning says why")


def names(device: str) -> list[str]:
    """The contenders that serve every entry, ours first; those that take long to be ready come last.

    On a GPU our step is measured as a graph; without a graph it would only measure how long the host takes.
    """
    if device == "cuda":
        return [OURS_GRAPH, OURS_SCORES, SLICES, PUBLISHED, COMPILED]
    return [OURS, OURS_SCORES, OURS_COMPILED, SLICES, PUBLISHED, COMPILED]


def make(name: str, model: str, batch: Batch, device: str, backend: str = timing.BACKEND) -> Step:
    kind = OwnStep if name.startswith(OURS) else PlainStep
    return kind(name, model, batch, device, backend)


def replayed(step: Step, entry: int) -> Callable[[], object]:
    """``step(entry)`` as a CUDA graph of its own; RuntimeError if a replay does not train."""
    try:
        graph = timing.captured(lambda: step(entry), warm_up=3)
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


def exact_gradient(model: str, batch: Batch, entry: int) -> torch.Tensor:
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


def two_steps(model: str, batch: int, name: str, device: str) -> None:
    """For `timing.peak_of_process`: two steps at full width."""
    step = make(name, model, images_and_labels(batch, device), device)
    for _ in range(2):
        step(0)


# The kernels of a step ------------------------------------------------------------------------------

ROUNDS = 3
WHAT = "Milliseconds and launches of each kernel of a training step, and milliseconds of the step."


def kernel_times(call: Call, rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """(milliseconds, launches) of one call by the name of each kernel, the longest first; a mean over `rounds`.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    call()
    timing.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            call()
        timing.synchronize()
    wanted = DeviceType.CUDA if GPU else DeviceType.CPU
    found = {}
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if GPU else event.self_cpu_time_total
        if event.device_type == wanted and microseconds > 0 and not event.is_user_annotation:
            found[event.key] = (round(microseconds / rounds / 1e3, 4), round(event.count / rounds, 2))
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def device_ms(call: Call) -> float:
    """Milliseconds that the kernels of one call take together on the GPU, whatever the host does meanwhile."""
    return round(sum(milliseconds for milliseconds, _ in kernel_times(call, rounds=1).values()), 3)


def profiles(model: str, names: list[str], fractions: list[float]) -> Info:
    """By contender and share of the MACs."""
    found = Info()
    batch = images_and_labels(SIZES.batch, DEVICE)
    for name in names:
        step = make(name, model, batch, DEVICE)
        step.reference.dropout_list = dropout_list(step.reference)
        for _ in range(WARM_UP):
            step(0)
        calls = {str(fraction): partial(step, entry_at(step.reference, fraction)) for fraction in fractions}
        found[name] = Info({fraction: profiled(call) for fraction, call in calls.items()})
    return found


def profiled(call: Call) -> Info:
    seconds = statistics.median(timing.wall(call) for _ in range(ROUNDS))
    kernels: dict[str, timing.JSON] = {name: list(pair) for name, pair in kernel_times(call).items()}
    return Info(step_ms=round(1e3 * seconds, 3), kernel_ms_per_step=Info(kernels))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description="Kernels of a training step.")
    parser.add_argument("--model", choices=HEADS, default="base")
    parser.add_argument("--contender", action="append", help=f"of {', '.join(names(DEVICE))}; default: two")
    parser.add_argument("--fraction", type=float, action="append", help="share of the MACs; default: 1.0 and 0.25")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    found = profiles(args.model, args.contender or [names(DEVICE)[0], SLICES], args.fraction or [1.0, 0.25])
    print("\n".join(profile_table(found)))
    document = {"what": WHAT, "model": args.model, "batch": SIZES.batch, **timing.provenance(), "results": found}
    timing.write_json(args.json, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
