"""Passes of the method on DeiT, each against the plain way: calibration, sensitivities, extraction, training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from timm.models import VisionTransformer

import skd
from benchmarks import steps
from benchmarks.registry import PUBLISHED, covariance_published
from benchmarks.steps import PLAIN_LAYERS, Batch, Network, images_and_labels
from benchmarks.timing import CLOCK, Call, peak_of_process, report
from skd.convert import WpacStatistics, apply_transforms
from skd.evaluate import Top1
from skd.importance import _add_scores, _count_skips, score_buffers
from skd.support.taps import checked, frozen, objective, tapped
from skd.training.loop import train_epoch
from skd.training.run import Run, make_run
from skd.training.screen import Screen, Seconds
from skd.vit import Module, describe

pytestmark = pytest.mark.benchmark(timer=CLOCK.read)
BATCH = 16
STEPS = 3  # of the training loop
RECIPE = skd.TrainConfig(batch_size=BATCH, amp_dtype="float32")
BARE = replace(RECIPE, mixup=0.0, cutmix=0.0, smoothing=0.0, drop_path=0.0, model_ema=False)


def deit(size: str, device: str) -> VisionTransformer:
    return steps.deit(size, device).eval()


def batch(device: str) -> Batch:
    return images_and_labels(BATCH, device)


def describe_pass(benchmark: BenchmarkFixture, name: str, size: str) -> None:
    """For the table."""
    benchmark.extra_info.update({"pass": name, "model": size, "batch": BATCH})


def published_network(size: str, device: str) -> Network:
    return Network(deit(size, device), *PLAIN_LAYERS[PUBLISHED], compiler=None).eval()


def plain_step(supernet: skd.SuperNet, index: int, x: torch.Tensor, width: int) -> torch.Tensor:
    """`supernet.step` that computes all tokens in the last block too, as a plain forward pass does."""
    module = supernet.infos[index]
    block = supernet.model.blocks[module.block]
    return block.step(block.modules_in_order.index(module), x, width)


# Calibration ----------------------------------------------------------------------------------------


def convert_published(model: VisionTransformer, batches: Iterable[Batch]) -> skd.SuperNet:
    """`skd.convert(..., centering="batch")` as it was published: the same arithmetic, another way to get there.

    It keeps features and gradients of all layers until the backward pass is over, where ours are streamed, and has
    gradients of parameters that nobody reads. The clones are made in the backward pass, to its advantage.
    """
    network, converted = describe(model), copy.deepcopy(model)
    statistics = WpacStatistics("batch")
    kept: list[tuple[Module, torch.Tensor, torch.Tensor]] = []
    with tapped(converted, network.modules, lambda *tap: kept.append((tap[0], tap[1].clone(), tap[2].clone()))):
        converted.requires_grad_()
        for images, labels in checked(converted, batches):
            converted.zero_grad()
            objective(converted, converted(images), labels).backward()
            for module, feature, grad in kept:
                _add(statistics, module, feature, grad)
            kept.clear()
    apply_transforms(converted, network, statistics.transforms(network, converted))
    return skd.SuperNet(converted, copy=False, network=network)


def _add(statistics: WpacStatistics, module: Module, feature: torch.Tensor, grad: torch.Tensor) -> None:
    name = module.name
    if module.kind == "mlp":
        score = (feature * grad).square().flatten(0, -2).sum(0)
        statistics.importance[name] = statistics.importance.get(name, 0.0) + score
    else:
        x, g = feature.flatten(2, 3).flatten(0, 1), grad.flatten(2, 3).flatten(0, 1)
        statistics.covariances[name] = statistics.covariances.get(name, 0.0) + covariance_published(x, g).double()


WAYS: dict[str, Callable[[VisionTransformer, list[Batch]], object]] = {
    "load": lambda model, batches: None,
    "streamed": lambda model, batches: skd.convert(model, batches, centering="batch"),
    "published": convert_published,
}


def calibrate(way: str, size: str, device: str) -> None:
    """For `peak_of_process`: two batches."""
    WAYS[way](deit(size, device), [batch(device)] * 2)


@pytest.mark.parametrize("size", ["tiny"])
def test_calibration(benchmark: BenchmarkFixture, device: str, size: str) -> None:
    """`skd.convert` of one batch, against the published way; and the peak memory of both."""
    model, batches = deit(size, device), [batch(device)]
    contenders: dict[str, Call] = {
        "streamed": lambda: WAYS["streamed"](model, batches),
        "published": lambda: WAYS["published"](model, batches),
    }
    describe_pass(benchmark, "`skd.convert` as a whole", size)
    report(benchmark, contenders, rounds=3)
    peaks = {way: peak_of_process(calibrate, way, size, device) for way in WAYS}
    benchmark.extra_info["peak_mb_over_loading"] = {way: round(peaks[way] - peaks["load"]) for way in contenders}


# Other passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny"])
def test_backward_of_the_cost_with_frozen_parameters(benchmark: BenchmarkFixture, device: str, size: str) -> None:
    """Only gradients of activations, from the first block on, against all gradients of a plain pass.

    That pass with our layers, and with the published ones.
    """
    supernet, (images, labels) = skd.SuperNet(deit(size, device)), batch(device)
    network = published_network(size, device)

    def everything() -> None:
        x, _ = supernet.embed(images)
        for index, width in enumerate(supernet.widths()):
            x = plain_step(supernet, index, x, width)
        objective(supernet.model, supernet.head(x), labels).backward()
        supernet.zero_grad()

    def published_pass() -> None:
        objective(network.model, network(images, supernet.widths()), labels).backward()
        network.zero_grad()

    def activations_only() -> None:
        with frozen(supernet):
            x, _ = supernet.embed(images)
            x.requires_grad_()
            for index, width in enumerate(supernet.widths()):
                x = supernet.step(index, x, width)
            objective(supernet.model, supernet.head(x), labels).backward()

    describe_pass(benchmark, "backward of the cost, parameters frozen", size)
    report(benchmark, {"frozen": activations_only, "all gradients": everything, "published": published_pass})


@pytest.mark.parametrize("size", ["tiny"])
def test_sensitivities_with_prefix_reuse(benchmark: BenchmarkFixture, device: str, size: str) -> None:
    """One pass per module, from that module on, against one whole pass per module: our layers and published ones."""
    supernet, (images, labels) = skd.SuperNet(deit(size, device)), batch(device)
    network = published_network(size, device)
    widths = supernet.widths()
    with frozen(supernet):
        streams, shared, _ = _add_scores(supernet, widths, images, labels, score_buffers(supernet))

    def counted(top1: Top1) -> list[int]:
        return [top1.correct(info.name) for info in supernet.infos]

    def whole_passes() -> list[int]:
        top1 = Top1(headless=False)
        top1.start(None, labels, BATCH)
        with torch.no_grad():
            supernet(images)
            for skipped in supernet.infos:
                x, _ = supernet.embed(images)
                for index, info in enumerate(supernet.infos):
                    x = x if info is skipped else plain_step(supernet, index, x, widths[index])
                top1.add(skipped.name, supernet.head(x))
        return counted(top1)

    def published_passes() -> list[int]:
        top1 = Top1(headless=False)
        top1.start(None, labels, BATCH)
        with torch.no_grad():
            supernet(images)
            for index, skipped in enumerate(supernet.infos):
                top1.add(skipped.name, network(images, [*widths[:index], 0, *widths[index + 1 :]]))
        return counted(top1)

    def prefix_reuse() -> list[int]:
        top1 = Top1(headless=False)
        top1.start(None, labels, BATCH)
        _count_skips(supernet, widths, streams, shared, top1)
        return counted(top1)

    assert prefix_reuse() == whole_passes() == published_passes()
    contenders: dict[str, Call] = {"prefix reuse": prefix_reuse, "whole passes": whole_passes}
    contenders["published"] = published_passes
    describe_pass(benchmark, "sensitivities, each from its module on", size)
    report(benchmark, contenders, rounds=3)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_extraction(benchmark: BenchmarkFixture, device: str, size: str, fraction: float) -> None:
    """Time of one `skd.extract`, against copying as many bytes of parameters."""
    supernet = skd.SuperNet(deit(size, device))
    full = supernet.widths()
    supernet.dropout_list = skd.DropoutList(
        supernet.modules_in_order, [full, [int(width * fraction) for width in full]]
    )
    parameters = [torch.rand(p.shape, device=device) for p in skd.extract(supernet, entry=1).parameters()]
    contenders: dict[str, Call] = {
        "extract": lambda: skd.extract(supernet, entry=1),
        "copy": lambda: [parameter.clone() for parameter in parameters],
    }
    describe_pass(benchmark, f"`skd.extract`, {fraction:.0%} of the widths", size)
    report(benchmark, contenders, rounds=15)


def run_of(device: str, batches: list[Batch], config: skd.TrainConfig) -> Run:
    network = skd.SuperNet(deit("tiny", device))
    return make_run(network, batches, None, config, screen=Screen(Console(quiet=True)))


def test_training_loop(benchmark: BenchmarkFixture, device: str) -> None:
    """Three steps of DeiT-Tiny: the loop, the bare steps, and the loop with the whole recipe."""
    batches = [batch(device)] * STEPS
    loop, recipe = run_of(device, batches, BARE), run_of(device, batches, RECIPE)
    network = skd.SuperNet(deit("tiny", device)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, weight_decay=0.05)

    def bare_steps() -> None:
        for images, labels in batches:
            F.cross_entropy(network(images, entry=0), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    def epoch(run: Run) -> None:
        run.position.steps = 0
        train_epoch(run, Seconds())

    contenders: dict[str, Call] = {
        "loop": lambda: epoch(loop),
        "bare steps": bare_steps,
        "loop with Mixup, label smoothing and the average of the weights": lambda: epoch(recipe),
    }
    report(benchmark, contenders, rounds=7)
