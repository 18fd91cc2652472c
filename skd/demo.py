"""The whole method in minutes, on a CPU, without a download: `skd demo`.

A small Vision Transformer trained on scikit-learn's digits stands in for a pre-trained one. Each stage is one
function below; `run_demo` runs them in order and writes the files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import CosineLRScheduler
from torch import nn

from skd import demo_report as report
from skd.baselines import METHODS, reordered
from skd.convert import convert
from skd.data import PREPROCESSING, Batches, Split, batched, digits, shifted
from skd.dropout_list import DropoutList
from skd.evaluate import evaluate
from skd.extract import choose_entry, extract
from skd.files import save
from skd.outputs import output_folder, replacing, write_json
from skd.planning import plan
from skd.supernet import SuperNet
from skd_kernels import build_info

EPOCHS = 50
BATCH, LEARNING_RATE, WARMUP_EPOCHS = 128, 1e-3, 3
CALIBRATION_IMAGES = 1024
KEPT = (0.75, 0.5, 0.25)  # of every width, in the table of knowledge concentration
RANDOM_DRAWS = 5
BUDGETS = tuple(percent / 100 for percent in range(100, 10, -5))  # of the full network's MACs
SAVED = {"sub-75.safetensors": 0.75, "sub-50.safetensors": 0.5, "sub-25.safetensors": 0.25}
FILES = ("summary.json", "curve.png", "supernet.safetensors", *SAVED)


class Data(NamedTuple):
    """Training images, and batches to calibrate with (training images again) and to test with."""

    train: Split
    calibration: Batches
    test: Batches


def run_demo(
    out: str | os.PathLike[str] = "skd-demo",
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    progress: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a stand-in, convert it, size it, cut sub-networks out and measure them.

    Args:
        out: folder for `FILES`; created if need be. Files of those names are replaced, others left alone.
        seed: of everything random; on one kind of processor two runs with the same seed differ in nothing but
            "seconds".
        epochs: of the stand-in's training.
        progress: show progress bars.
        console: where tables go; None: standard output.

    Returns:
        What is written to ``summary.json``.

    Raises:
        ValueError: `out` cannot be written to, seed outside 0..2**32 - 1, epochs < 1.
    """
    folder = _checked(out, seed, epochs)
    console = Console() if console is None else console
    bar = partial(track, console=console, disable=not (progress and console.is_terminal), transient=True)
    clock = report.Clock(console)
    with reproducible(seed):
        return _run(folder, seed, epochs, console, bar, clock)


def _run(folder: Path, seed: int, epochs: int, console: Console, bar: Any, clock: report.Clock) -> dict[str, Any]:
    """The stages, in order."""
    with clock("data"):
        data = prepare_data(seed)
    with clock("train"):
        model = train_stand_in(data, seed, epochs, bar)
    with clock("convert"):
        supernet = convert(model, data.calibration, progress=partial(bar, description="Converting"))
        errors = function_errors(model, supernet, data)
    report.print_conversion(console, model, evaluate(model, data.test), errors)
    with clock("knowledge_concentration"):
        concentration = knowledge_concentration(model, data, seed, bar)
    report.print_concentration(console, concentration, RANDOM_DRAWS)
    with clock("plan"):
        supernet.dropout_list = plan(supernet, data.calibration, progress=partial(bar, description="Planning"))
    with clock("evaluate"):
        entries = entries_to_measure(supernet)
        rows = measure(supernet, entries, data.test, bar)
        original = measure(SuperNet(copy.deepcopy(model), supernet.dropout_list), entries, data.test, bar)
    report.print_subnetworks(console, rows, original, len(supernet.dropout_list))
    with clock("write"):
        files = save_networks(supernet, folder)
        with replacing(folder / "curve.png") as temporary:
            report.draw_curve(temporary, rows, original)

    summary = {
        "function_error": errors["fp32"],
        "function_error_fp64": errors["fp64"],
        "full": {key: value for key, value in rows[0].items() if key != "entry"},
        "subnetworks": rows,
        "original_order": original,
        "knowledge_concentration": concentration,
        "files": files,
        "dropout_list_entries": len(supernet.dropout_list),
        "images": {"train": len(data.train.labels), "test": sum(len(labels) for _, labels in data.test)},
        "seconds": {**clock.seconds, "total": clock.total()},
        "seed": seed,
        "epochs": epochs,
        "versions": {name: build_info()[name] for name in ("skd", "python", "torch", "timm")},
    }
    write_json(folder / "summary.json", summary)
    report.print_end(console, folder, FILES, clock)
    return summary


def _checked(out: str | os.PathLike[str], seed: int, epochs: int) -> Path:
    """All that a user may have got wrong, before minutes of work."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it may be 0..2**32 - 1")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1")
    folder = output_folder(out)
    for name in FILES:
        if (folder / name).is_dir():
            raise ValueError(f"out is {str(folder)!r}; {name} in it is a folder, it would be replaced by a file")
    return folder


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Inside the block PyTorch's random numbers follow `seed` and it computes in one thread; both restored after it.

    With one thread the results do not depend on the number of cores. Tensors this small lose little by it: a second
    core saves a third of the time when it is idle, and costs several times as much when something else is busy on it.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def prepare_data(seed: int) -> Data:
    """Digits, and the calibration images: the first of the (shuffled) training images, un-augmented."""
    train, test = digits(seed)
    calibration = Split(train.images[:CALIBRATION_IMAGES], train.labels[:CALIBRATION_IMAGES])
    return Data(train, batched(calibration), batched(test))


def build_model() -> VisionTransformer:
    """A Vision Transformer for 8x8 digits: 16 tokens, 6 blocks, 3 heads of 32, MLPs of 384; freshly initialised."""
    model = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=6,
        num_heads=3,
        global_pool="avg",
        class_token=False,
        weight_init="jax",
    )
    # timm's 0.02 suits patches of 16x16x3 pixels; beside those of 2x2x1 it drowns, and training takes far longer.
    nn.init.trunc_normal_(model.pos_embed, std=0.5)
    model.pretrained_cfg = dict(PREPROCESSING)
    return model


def train_stand_in(data: Data, seed: int, epochs: int, bar: Any) -> VisionTransformer:
    """The network that takes the part of a pre-trained one: AdamW, cosine, label smoothing, shifts by a pixel."""
    model = build_model()
    generator = torch.Generator().manual_seed(seed)
    train, steps = data.train, -(-len(data.train.labels) // BATCH)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs * steps, warmup_t=WARMUP_EPOCHS * steps, lr_min=1e-5, t_in_epochs=False
    )
    model.train()
    for epoch in bar(range(epochs), description="Training the stand-in"):
        order = torch.randperm(len(train.labels), generator=generator)
        for step, batch in enumerate(order.split(BATCH)):
            scheduler.step_update(epoch * steps + step)
            optimizer.zero_grad()
            loss(model(shifted(train.images[batch], generator)), train.labels[batch]).backward()
            optimizer.step()
    return model.eval()


def function_errors(model: VisionTransformer, supernet: SuperNet, data: Data) -> dict[str, float]:
    """Largest change of a logit by conversion, relative to the largest logit; in float32, and again in float64."""
    double = copy.deepcopy(model).double()
    return {
        "fp32": _logit_error(model, supernet, data.test),
        "fp64": _logit_error(double, convert(double, data.calibration), data.test),
    }


@torch.no_grad()
def _logit_error(model: nn.Module, converted: nn.Module, batches: Batches) -> float:
    dtype = next(model.parameters()).dtype
    before = torch.cat([model(images.to(dtype)) for images, _ in batches])
    after = torch.cat([converted(images.to(dtype)) for images, _ in batches])
    return float((after - before).abs().max() / before.abs().max())


def knowledge_concentration(model: VisionTransformer, data: Data, seed: int, bar: Any) -> dict[str, dict[str, float]]:
    """Top-1 with the leading 3/4, 2/4 and 1/4 of every width, by the order of the coordinates; no training."""
    table = {}
    for method in bar(METHODS, description="Comparing orders"):
        draws = RANDOM_DRAWS if method == "random" else 1
        nets = [reordered(model, data.calibration, method, seed=seed + draw) for draw in range(draws)]
        top1 = [_top1_at(net, KEPT, data.test) for net in nets]
        mean = [sum(values) / draws for values in zip(*top1, strict=True)]
        table[method] = dict(zip(map(str, KEPT), mean, strict=True))
    return table


def _top1_at(supernet: SuperNet, shares: Iterable[float], batches: Batches) -> list[float]:
    """Top-1 with the same share of every width."""
    full = supernet.widths()
    widths = [full, *([round(width * share) for width in full] for share in shares)]
    supernet.dropout_list = DropoutList(supernet.modules_in_order, widths)
    top1: list[float] = evaluate(supernet, batches, entries=range(1, len(widths)))
    return top1


def entries_to_measure(supernet: SuperNet) -> list[int]:
    """The largest sub-network within each budget, and the smallest of all."""
    return list(dict.fromkeys(_within(supernet, budget) for budget in (*BUDGETS, 0.0)))


def _within(supernet: SuperNet, budget: float) -> int:
    """The largest sub-network with this share of the MACs, or the smallest there is."""
    macs = supernet.dropout_list.macs
    if macs[-1] > budget * macs[0]:
        return len(macs) - 1
    return choose_entry(supernet, macs=budget)


def measure(supernet: SuperNet, entries: list[int], test: Batches, bar: Any) -> list[dict[str, Any]]:
    """Cost and test accuracy of sub-networks, each extracted to a plain timm model first."""
    widths = supernet.dropout_list.widths[entries]
    macs, linear = supernet.costs.macs(widths), supernet.costs.macs(widths, "linear")
    params = supernet.costs.params(widths)
    full = int(supernet.dropout_list.macs[0])
    return [
        {
            "entry": entry,
            "macs": int(macs[row]),
            "macs_fraction": int(macs[row]) / full,
            "macs_linear": int(linear[row]),
            "params": int(params[row]),
            "top1": evaluate(extract(supernet, entry=entry), test),
        }
        for row, entry in enumerate(bar(entries, description="Evaluating sub-networks"))
    ]


def save_networks(supernet: SuperNet, folder: Path) -> dict[str, int]:
    """Write the super-network and the sub-networks of `SAVED`; the entry in each file of a sub-network."""
    save(supernet, folder / "supernet.safetensors")
    entries = {name: _within(supernet, budget) for name, budget in SAVED.items()}
    for name, entry in entries.items():
        save(extract(supernet, entry=entry), folder / name)
    return entries
