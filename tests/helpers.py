"""Small models and batches that many tests share."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import skd
from skd.data import PREPROCESSING, Batches, Split, batched, digits


def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Add noise to every parameter: zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))


def tiny_vit(dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """A perturbed two-block ViT: 32 px, patch 8, 17 tokens, head width 16, 72 neurons, 5 classes."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5}
    torch.manual_seed(0)
    model = VisionTransformer(**{**args, "num_classes": 5, **kwargs}).to(dtype).eval()
    perturb(model)
    return model


def with_twenty_one_entries(dtype: torch.dtype = torch.float64) -> skd.SuperNet:
    """`tiny_vit` as a super-network whose entries get narrower, down to a skipped attention."""
    net = skd.SuperNet(tiny_vit(dtype))
    full = net.widths()
    rows = [
        [max(full[0] - step, 0), max(full[1] - 3 * step, 0), full[2], max(full[3] - 2 * step, 0)]
        for step in range(1, 21)
    ]
    return nested(net, *rows)


def noted(backend: str) -> tuple[Callable[..., Any], list[Any]]:
    """A backend of torch.compile that records the graphs it is given, and the list of them."""
    graphs: list[Any] = []

    def compile_graph(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    return compile_graph, graphs


def random_batches(
    count: int = 2, size: int = 4, dtype: torch.dtype = torch.float64, classes: int = 5, pixels: int = 32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, pixels, pixels, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


# Training: a network that takes 5 ms a step, on the built-in digits

QUIET = Console(quiet=True)


def digit_vit(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """A perturbed two-block ViT for 8x8 digits: 4 tokens, one head of width 16, 24 neurons, 10 classes."""
    args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 2}
    args |= {"num_heads": 1, "mlp_ratio": 1.5, "global_pool": "avg", "class_token": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(**{**args, **kwargs}).to(dtype)
    model.pretrained_cfg = dict(PREPROCESSING)
    perturb(model)
    return model


def digit_net(dtype: torch.dtype = torch.float32, **kwargs: Any) -> skd.SuperNet:
    """`digit_vit` as a super-network of one entry."""
    return skd.SuperNet(digit_vit(dtype, **kwargs))


@functools.cache
def digit_data() -> tuple[Batches, Batches, Batches]:
    """Batches to train (4 of 16), to evaluate (2 of 32) and to measure importance (2 of 16)."""
    train, test = digits()
    parts = ((train, slice(0, 64), 16), (test, slice(0, 64), 32), (train, slice(96, 128), 16))
    train, test, calibration = (batched(Split(s.images[part], s.labels[part]), size) for s, part, size in parts)
    return train, test, calibration


def training_config(**changes: Any) -> skd.TrainConfig:
    """Three epochs of four steps, two of which grow the list; evaluated at the end; a checkpoint every other step.

    The planner is "paper", which reads the images once a round, and not the default, which runs them many times.
    """
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 16,
        "lr": 2e-3,
        "progressive_epochs": 2,
        "planner": "paper",
    }
    settings |= {"budgets": (1.0, 0.5, 0.25), "checkpoint_steps": 2, "workers": 0}
    return skd.TrainConfig(**{**settings, **changes})


def run_training(supernet: Any, config: skd.TrainConfig, out: Any = None, **changes: Any) -> skd.History:
    """`skd.train` on `digit_data`, without a word; `changes` replace its arguments."""
    train, test, calibration = digit_data()
    arguments = {"train_loader": train, "val_loader": test, "calibration": calibration, "out": out, "console": QUIET}
    return skd.train(supernet, config=config, **{**arguments, **changes})


class Hooked:
    """Batches that call ``hook(number)`` before each batch; the number starts at 0 and counts on over the epochs."""

    def __init__(self, batches: Sequence[Any], hook: Callable[[int], None]) -> None:
        self.batches, self.hook, self.given = batches, hook, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.hook(self.given)
            self.given += 1
            yield batch


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def nested(net: skd.SuperNet, *narrow: Sequence[int]) -> skd.SuperNet:
    """Give `net` the dropout list (full, *narrow)."""
    net.dropout_list = skd.DropoutList(net.modules_in_order, [net.widths(), *narrow])
    return net


def raising(batches: Sequence[Any], at: int, error: BaseException) -> Hooked:
    """Batches that raise before the one numbered `at`."""

    def hook(number: int) -> None:
        if number == at:
            raise error

    return Hooked(batches, hook)


def interrupted(out: Path, at: int = 7, **changes: Any) -> None:
    """A run that ends after `at` steps; seven leave checkpoints of steps 4 and 6."""
    loader = raising(digit_data()[0], at, ConnectionError())
    with contextlib.suppress(ConnectionError):
        run_training(digit_net(), training_config(**changes), out, train_loader=loader)


def spoilt(batches: Sequence[Any], index: int, change: Callable[[Any, Any], Any]) -> list[Any]:
    """`batches` with one of them replaced by ``change(images, labels)``."""
    batches = list(batches)
    batches[index] = change(*batches[index])
    return batches


def raw_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    """Tensors as bytes, which are equal if all bits are: -0.0 and 0.0 differ, and NaN equals itself."""
    return {name: (tensor.dtype, tensor.contiguous().numpy().tobytes()) for name, tensor in tensors.items()}


def timeless(value: Any) -> Any:
    """A JSON value, or epochs of a history, without the "seconds" in it."""
    if isinstance(value, Mapping):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def checkpoint_files(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((out / "checkpoints").glob("step-*.safetensors"))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON of a checkpoint, without skd."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["skd-checkpoint"])


def outcome(out: Path) -> dict[str, Any]:
    """All that a run leaves in its folder, without times; two runs with equal outcomes are equal bit for bit."""
    tensors, header = read_checkpoint(checkpoint_files(out)[-1])
    supernet = out / "supernet.safetensors"
    header.pop("config")
    header["origin"].pop("data")  # hooked loaders do not say what they have
    with safe_open(supernet, framework="pt") as file:
        metadata = file.metadata()
    return {
        "last": checkpoint_files(out)[-1].name,
        "checkpoint": raw_bytes(tensors),
        "header": timeless(header),
        "supernet": raw_bytes(load_file(supernet)),
        "metadata": metadata,
        "dropout_list": (out / "dropout_list.json").read_text(),
        "history": [timeless(json.loads(line)) for line in (out / "history.jsonl").read_text().splitlines()],
    }


def assert_same_outcome(found: Path, expected: Path) -> None:
    """Assert that two runs have the same outcome, bit for bit. The message says where they differ, not the bytes."""
    one, other = outcome(found), outcome(expected)
    for key, value in other.items():
        if isinstance(value, dict):
            differing = [name for name in value.keys() | one[key].keys() if value.get(name) != one[key].get(name)]
            assert not differing, f"{key} differs in {sorted(differing)[:5]} of {len(value)}"
        assert one[key] == value, key
    assert not leftovers(found)


def leftovers(out: Path) -> list[str]:
    """The temporary files that are left in the folder of a run."""
    return [path.name for path in out.rglob("*") if path.name.startswith(".")]


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Assert that tensors agree, each relative to its own norm, so that a large one hides no error of a small one."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm().clamp(min=1e-30), name
