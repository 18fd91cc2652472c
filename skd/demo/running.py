"""The whole method in minutes, on a CPU, without a download: `skd demo`.

A small Vision Transformer trained on scikit-learn's digits stands in for a pre-trained one. Each stage is one
function below; `run_demo` runs them in order and writes the files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from skd.convert import convert
from skd.data import PREPROCESSING, Batches, Split, batched, digits, generator, shifted
from skd.demo import report
from skd.demo.baselines import METHODS, reordered
from skd.dropout_list import DropoutList
from skd.evaluate import evaluate
from skd.extract import choose_entry, extract
from skd.files import save
from skd.supernet import SuperNet
from skd.support.curve import Rows, sizes_of
from skd.support.outputs import output_folder, replacing, write_json
from skd.support.settings import DEMO_EPOCHS
from skd.support.types import Document
from skd.training import History, TrainConfig, finetune, finetune_config, train
from skd_kernels import build_info

_Item = TypeVar("_Item")

TRAIN_EPOCHS = 24
BATCH = 128
# Of both trainings; images so small bear little augmentation, and networks so small no stochastic depth.
RECIPE: dict[str, Any] = {
    "batch_size": BATCH,
    "lr": 1e-3,
    "min_lr": 1e-5,
    "sched_on_updates": True,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "model_ema": False,
}
CALIBRATION_IMAGES = 1024
KEPT = (0.75, 0.5, 0.25)  # of every width, in the table of knowledge concentration
RANDOM_DRAWS = 5
BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15)  # of the full network's MACs
SAVED = {"sub-75.safetensors": 0.75, "sub-50.safetensors": 0.5, "sub-25.safetensors": 0.25}
FILES = ("summary.json", "curve.png", "supernet.safetensors", *SAVED)


class Bar(Protocol):
    """Shows how many of the items are done."""

    def __call__(self, items: Iterable[_Item], /, *, description: str) -> Iterable[_Item]: ...


class Data(NamedTuple):
    """Training images, and batches to calibrate with (training images again) and to test with."""

    train: Split
    calibration: Batches
    test: Batches


def run_demo(
    out: str | os.PathLike[str] = "skd-demo",
    *,
    seed: int = 0,
    epochs: int = DEMO_EPOCHS,
    train_epochs: int = TRAIN_EPOCHS,
    progress: bool = True,
    console: Console | None = None,
) -> Document:
    """Train a stand-in, convert it, size it, cut sub-networks out and measure them.

    Args:
        out: folder for `FILES`; created if need be. Files of those names are replaced, others left alone.
        seed: of everything random; on one kind of processor two runs with the same seed differ in nothing but
            "seconds".
        epochs: of the stand-in's training.
        train_epochs: of the super-network's training.
        progress: show progress bars.
        console: where tables go; None: standard output.

    Returns:
        What is written to ``summary.json``.

    Raises:
        ValueError: `out` cannot be written to, seed outside 0..2**32 - 1, epochs < 1.
    """
    folder = _checked(out, seed, {"epochs": epochs, "train_epochs": train_epochs})
    console = Console() if console is None else console
    bar = partial(track, console=console, disable=not (progress and console.is_terminal), transient=True)
    clock = report.Clock(console)
    with reproducible(seed):
        return _run(folder, seed, epochs, train_epochs, console, bar, clock)


def _run(
    folder: Path, seed: int, epochs: int, train_epochs: int, console: Console, bar: Bar, clock: report.Clock
) -> Document:
    """The stages, in order."""
    with clock("data"):
        data = prepare_data()
    with clock("stand_in"):
        model = train_stand_in(data, seed, epochs, console)
    with clock("convert"):
        supernet = convert(model, data.calibration, progress=partial(bar, description="Converting"))
        errors = function_errors(model, supernet, data)
    before = evaluate(model, data.test)
    report.print_conversion(console, model, before, errors)
    with clock("knowledge_concentration"):
        concentration = knowledge_concentration(model, data, seed, bar)
    report.print_concentration(console, concentration, RANDOM_DRAWS)
    untrained = copy.deepcopy(supernet)
    with clock("train"):
        history = train_supernet(supernet, data, seed, train_epochs, console)
    with clock("evaluate"):
        entries = entries_to_measure(supernet)
        untrained.dropout_list = supernet.dropout_list
        unsorted = SuperNet(model, supernet.dropout_list)
        networks = {"trained": supernet, "converted": untrained, "original_order": unsorted}
        curves = {name: measure(network, entries, data.test, bar) for name, network in networks.items()}
    rows = curves["trained"]
    report.print_subnetworks(console, curves, len(supernet.dropout_list))
    with clock("write"):
        files = save_networks(supernet, folder)
        with replacing(folder / "curve.png") as temporary:
            report.draw_curve(temporary, curves, before)

    summary = {
        "function_error": errors["fp32"],
        "function_error_fp64": errors["fp64"],
        "full": {key: value for key, value in rows[0].items() if key != "entry"},
        "subnetworks": rows,
        "converted": curves["converted"],
        "original_order": curves["original_order"],
        "stand_in_top1": before,
        "training": [{key: row[key] for key in ("epoch", "loss", "lr", "entries")} for row in history.epochs],
        "knowledge_concentration": concentration,
        "files": files,
        "dropout_list_entries": len(supernet.dropout_list),
        "images": {"train": len(data.train.labels), "test": sum(len(labels) for _, labels in data.test)},
        "seconds": {**clock.seconds, "total": clock.total()},
        "seed": seed,
        "epochs": epochs,
        "train_epochs": train_epochs,
        "versions": {name: build_info()[name] for name in ("skd", "python", "torch", "timm")},
    }
    write_json(folder / "summary.json", summary)
    report.print_end(console, folder, FILES, clock)
    return summary


def _checked(out: str | os.PathLike[str], seed: int, epochs: dict[str, int]) -> Path:
    """Check everything that a user may have got wrong, before minutes of work."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it may be 0..2**32 - 1")
    for name, number in epochs.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
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


def prepare_data() -> Data:
    """Digits, and the calibration images: the first of the (shuffled) training images, un-augmented."""
    train, test = digits()
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


class ShiftedBatches:
    """Training batches in random order, each image moved a little: a function of (seed, epoch).

    Args:
        size: of a batch.
        steps: batches of an epoch; None: all whole ones.
        stream: what distinguishes these random numbers from others of the same seed.
        move: changes images (B, 1, height, width) by numbers of a generator.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        seed: int,
        *,
        steps: int | None = None,
        stream: str = "digits",
        move: Callable[[torch.Tensor, torch.Generator], torch.Tensor] = shifted,
    ) -> None:
        self.split, self.size, self.seed = split, size, seed
        self.steps = len(split.labels) // size if steps is None else steps
        self.stream, self.move = stream, move
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        seed = int(generator(self.seed, self.stream, self.epoch).integers(2**63))
        numbers = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.split.labels), generator=numbers)
        for index, batch in enumerate(order.split(self.size)[: self.steps]):
            images = self.move(self.split.images[batch], numbers)
            if index >= self.start:
                yield images, self.split.labels[batch]


def train_stand_in(data: Data, seed: int, epochs: int, console: Console) -> VisionTransformer:
    """Train the network that stands in for a pre-trained one."""
    model = build_model()
    config = finetune_config(epochs=epochs, warmup_epochs=min(3, epochs - 1), eval_every=epochs, seed=seed, **RECIPE)
    batches = ShiftedBatches(data.train, BATCH, seed)
    finetune(model, batches, data.test, config, console=console, verbose=False)
    return model.eval()


def train_supernet(supernet: SuperNet, data: Data, seed: int, epochs: int, console: Console) -> History:
    """PIAD training: the list grows in a third of the epochs. Only the last epoch is evaluated, so none is chosen."""
    config = TrainConfig(epochs=epochs, warmup_epochs=0, eval_every=epochs, seed=seed + 1, **RECIPE)
    batches = ShiftedBatches(data.train, BATCH, seed + 1)
    return train(supernet, batches, data.test, config, calibration=data.calibration, console=console, verbose=False)


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


def knowledge_concentration(model: VisionTransformer, data: Data, seed: int, bar: Bar) -> dict[str, dict[str, float]]:
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


def measure(supernet: SuperNet, entries: list[int], test: Batches, bar: Bar) -> Rows:
    """Cost and test accuracy of sub-networks, each extracted to a plain timm model first."""
    rows = sizes_of(supernet, entries)
    for row in bar(rows, description="Evaluating sub-networks"):
        row["top1"] = evaluate(extract(supernet, entry=row["entry"]), test)
    return rows


def save_networks(supernet: SuperNet, folder: Path) -> dict[str, int]:
    """Write the super-network and the sub-networks of `SAVED`; the entry in each file of a sub-network."""
    save(supernet, folder / "supernet.safetensors")
    entries = {name: _within(supernet, budget) for name, budget in SAVED.items()}
    for name, entry in entries.items():
        save(extract(supernet, entry=entry), folder / name)
    return entries
