"""The stored numbers of the published arithmetic (golden/README.md), and model A built from them."""

import gzip
import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

import skd
import skd_kernels

FOLDER = Path(__file__).parent / "golden"
TOKENS, HEADS, DEPTH = 17, 3, 3
MODULES = tuple(f"{block}.{kind}" for block in range(DEPTH) for kind in ("attn", "mlp"))
FULL = (16, 192) * DEPTH


@cache
def arrays(name):
    """All arrays of one npz file, by key."""
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


@cache
def document(name):
    """One JSON document."""
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


def batches(count, size):
    """The first `count` batches of `size` images, as (images, labels) in float64."""
    stored = arrays("piad")
    pixels = torch.from_numpy(stored["images_u8"][: count * size]).permute(0, 3, 1, 2).double()
    images, labels = (pixels / 255 - 0.5) / 0.5, torch.from_numpy(stored["labels"][: count * size])
    return list(zip(images.split(size), labels.split(size), strict=True))


def build(weights):
    """Model A with the given weights, in float64 and evaluation mode."""
    config = document("piad")["A_plain"]["config"]
    model = VisionTransformer(**config).double().eval()
    model.load_state_dict({key: torch.as_tensor(value) for key, value in weights.items()}, strict=True)
    return model


def original():
    """Weights of model A as trained."""
    return {key[4:]: value for key, value in arrays("wpac").items() if key.startswith("A/w/")}


def transformed():
    """Weights after the published transform; the permuted MLP weights are not stored, but computed here."""
    stored, weights = arrays("wpac"), original()
    weights |= {key[4:]: value for key, value in stored.items() if key.startswith("A/t/")}
    for block in range(DEPTH):
        order, prefix = stored[f"A/block{block}/mlp_perm"], f"blocks.{block}.mlp."
        for name in ("fc1.weight", "fc1.bias"):
            weights[prefix + name] = weights[prefix + name][order]
        weights[prefix + "fc2.weight"] = weights[prefix + "fc2.weight"][:, order]
    return weights


def stored_list(scenario, epoch=-1):
    """The published dropout list after an epoch: widths by entry, as a DropoutList."""
    record = document("piad")[scenario]["epochs"][epoch]
    tables = record["mask_tables_after"]
    rows = [[tables[name][str(entry)] for name in MODULES] for entry in range(record["n_op_codes"] + 1)]
    return skd.DropoutList(MODULES, rows)


def train(weights, epoch):
    """The eight SGD steps of one epoch of A_sgd: (state dict in float64, losses)."""
    data, losses = batches(6, 32), []
    supernet = skd.SuperNet(build(weights), stored_list("A_sgd", epoch))
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05)
    for step, entry in enumerate(document("piad")["A_sgd"]["epochs"][epoch]["train_op_codes"]):
        images, labels = data[step % 6]
        loss = torch.nn.functional.cross_entropy(supernet(images, entry=entry), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return supernet.state_dict(), losses


def flatten(weights):
    """All weights as one vector, sorted by key."""
    return torch.cat([weights[key].flatten() for key in sorted(weights)])


def to_float32(weights, low_bits):
    """Round to float32; where the lowest bit differs from the stored one, to the other neighbour."""
    flat = flatten(weights).numpy()
    bits = np.unpackbits(low_bits, count=flat.size)
    nearest = flat.astype(np.float32)
    other = np.nextafter(nearest, np.where(flat > nearest, np.inf, -np.inf).astype(np.float32))
    rounded = torch.from_numpy(np.where((nearest.view(np.uint32) & 1) == bits, nearest, other))
    parts = rounded.split([weights[key].numel() for key in sorted(weights)])
    return {key: part.reshape(weights[key].shape) for key, part in zip(sorted(weights), parts, strict=True)}


@cache
@torch.enable_grad()
def replay():
    """Scenario A_sgd: [weights at the start of epochs 0..4], [losses of epochs 0..3]."""
    starts, losses = [transformed()], []
    for epoch in range(4):
        weights, epoch_losses = train(starts[-1], epoch)
        starts.append(to_float32(weights, arrays("piad")[f"A_sgd/epoch{epoch + 1}/weights_low_bits"]))
        losses.append(epoch_losses)
    return starts, losses


def start_weights(scenario, epoch):
    """Weights at the start of an epoch of a scenario."""
    return transformed() if scenario == "A_plain" else replay()[0][epoch]


def forced(implementation):
    """A context in which every operation uses one implementation; with "auto" the dispatcher chooses."""
    return nullcontext() if implementation == "auto" else skd_kernels.use(implementation)


def relative(actual, expected):
    """Largest difference over largest magnitude."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    if expected.size == 0:
        return 0.0
    scale = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (scale if scale else 1.0))
