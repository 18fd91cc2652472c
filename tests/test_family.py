"""skd.Family: the answers of cut networks on one copy of the weights, from many threads at once."""

from __future__ import annotations

import importlib.util
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import digit_data, digit_vit, nested, perturb, random_batches, tiny_vit
from PIL import Image

import skd

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve.py"
IMAGES = random_batches(dtype=torch.float32)[0][0]


def saved(supernet: skd.SuperNet, folder: Path) -> tuple[skd.SuperNet, skd.Family]:
    skd.save(supernet, folder / "net.safetensors")
    return supernet, skd.Family(folder / "net.safetensors")


def compensated(folder: Path) -> tuple[skd.SuperNet, skd.Family]:
    """`tiny_vit` with entries down to nothing, two of which have a correction."""
    rows = [[16, 72, 16, 72], [12, 60, 16, 40], [8, 24, 16, 5], [8, 0, 16, 5], [0, 0, 8, 5], [0, 0, 0, 0]]
    supernet = nested(skd.SuperNet(tiny_vit(torch.float32)), *rows[1:])
    skd.compensate(supernet, random_batches(dtype=torch.float32), entries=[2, 3])
    return saved(supernet, folder)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_every_size_is_the_network_that_would_be_cut(tmp_path: Path) -> None:
    supernet, family = compensated(tmp_path)
    assert len(family.sizes) == 6
    for entry, size in enumerate(family.sizes):
        assert_same(size(IMAGES), skd.extract(supernet, entry=entry)(IMAGES))
        cost = skd.cost(supernet, entry=entry)
        assert (size.entry, size.macs, size.params) == (entry, cost.macs, cost.params)
        assert size.compensated == (entry in (2, 3))
    bare = skd.extract(supernet, entry=2, corrected=False)(IMAGES)
    assert (family.at(entry=2)(IMAGES) - bare).norm() > 1e-2 * bare.norm()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3_qkvb", {}),
        ("eva02_base_patch14_224", {"scale_mlp": False, "patch_size": 16}),
        ("beit_base_patch16_224", {}),
    ],
)
def test_other_families_of_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Heads, gates, biases of positions, and corrections of their output layers."""
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "init_values": 0.5}
    model = timm.create_model(name, **size, **options).eval()
    perturb(model)
    net = skd.SuperNet(model)
    full = net.widths()
    nested(net, [full[0] if net.infos[0].binary else 2, 24, full[2], 8], [0, 24, full[2], 0])
    skd.compensate(net, random_batches(dtype=torch.float32), entries=[1])
    supernet, family = saved(net, tmp_path)
    for entry, part in enumerate(family.sizes):
        assert_same(part(IMAGES), skd.extract(supernet, entry=entry)(IMAGES))


def test_the_weights_are_pages_of_the_file(tmp_path: Path) -> None:
    """They are mapped, not read, and running every size makes no copy that stays."""
    _, family = compensated(tmp_path)
    if Path("/proc/self/maps").is_file():
        mapped = [
            range(*(int(end, 16) for end in line.split()[0].split("-")))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(tmp_path / "net.safetensors"))
        ]
        layers = [
            layer for correction in family._supernet.corrections.values() for layer in correction.layers.values()
        ]
        for tensor in (*family.model.parameters(), *(layer.weight for layer in layers)):
            assert any(tensor.data_ptr() in pages for pages in mapped)
    assert not any(parameter.requires_grad for parameter in family.model.parameters())
    before = {name: tensor.data_ptr() for name, tensor in family.model.state_dict().items()}
    for size in family.sizes:
        size(IMAGES)
    assert {name: tensor.data_ptr() for name, tensor in family.model.state_dict().items()} == before


def test_memory_is_one_copy_and_the_corrections(tmp_path: Path) -> None:
    supernet, family = compensated(tmp_path)
    memory = family.memory()
    assert memory["weights"] == 4 * sum(parameter.numel() for parameter in supernet.parameters())
    kept = [
        (8, 3),
        (24, 1),
        (16, 3),
        (5, 1),
        (8, 3),
        (16, 3),
        (5, 1),
    ]  # coordinates of entries 2 and 3, and of how many heads
    assert memory["corrections"] == sum(4 * 48 * (width * heads + 1) for width, heads in kept)
    assert memory["total"] == memory["weights"] + memory["corrections"]
    assert memory["copies"] == 4 * sum(skd.cost(supernet, entry=entry).params for entry in range(6))
    assert memory["gathered"] == 4 * (12 * 3 * (4 * 48 + 3))  # the widest attention that is not whole: 12 of 16


def test_budgets_are_those_of_extract(tmp_path: Path) -> None:
    supernet, family = compensated(tmp_path)
    macs = int(supernet.dropout_list.macs[2])
    for choice in (
        {"macs": macs},
        {"macs": 0.5},
        {"params": 0.5},
        {"macs": 0.5, "convention": "linear"},
        {"entry": 5},
    ):
        expected = skd.cost(skd.extract(supernet, **choice))
        for _ in range(2):  # the second time it is looked up
            size = family.at(**choice)
            assert (size.macs, size.params) == (expected.macs, expected.params)
    assert family.at(macs=1.0).entry == 0 and family.at(macs=0.5) is family.at(macs=0.5)
    for choice, told in (
        ({"macs": 1}, "macs is 1, that is 1"),
        ({}, "exactly one"),
        ({"entry": 6}, "entry is 6"),
        ({"macs": [0.5]}, r"macs is \[0\.5\]"),
    ):
        with pytest.raises(ValueError, match=told):
            family.at(**choice)
    with pytest.raises(ValueError, match="images is"):
        family.at(entry=0)(torch.zeros(3, 32, 32))


def test_moments_are_not_kept(tmp_path: Path) -> None:
    supernet = skd.SuperNet(tiny_vit(torch.float32))
    skd.moments(supernet, random_batches(dtype=torch.float32))
    _, family = saved(supernet, tmp_path)
    assert supernet.moments and not family._supernet.moments


def test_a_plain_model_is_no_family(tmp_path: Path) -> None:
    skd.save(tiny_vit(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="a plain model"):
        skd.Family(tmp_path / "net.safetensors")


def example() -> Any:
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("requests", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mixed_requests_from_threads(requests: int, tmp_path: Path) -> None:
    """Every answer is that of its size, with corrections and without; the size is the one for the target."""
    net = skd.SuperNet(digit_vit(depth=1))
    _, test, calibration = digit_data()
    nested(net, *([16 - 2 * step, 24 - 3 * step] for step in range(1, 9)))
    skd.compensate(net, calibration, entries=[2, 3, 6])
    supernet, family = saved(net, tmp_path)
    server, images = example().Server(family), test[0][0]
    entries = range(len(family.sizes))
    server.sizes = [(float(len(entries) - entry), family.sizes[entry]) for entry in entries]  # not as they came out
    with torch.no_grad():
        known = {entry: skd.extract(supernet, entry=entry)(images).softmax(1) for entry in entries}

    def is_right(number: int) -> bool:
        row, target = number % len(images), (number * 7) % (len(entries) + 1) + 0.5
        answer = server.answer(images[row], target)
        fits = [ms for ms, _ in server.sizes if ms <= target]
        size = next(size for ms, size in server.sizes if ms == (fits[0] if fits else 1.0))
        expected = known[size.entry][row]
        same = abs(answer["probability"] - float(expected.max())) < 1e-5 and answer["class"] == int(expected.argmax())
        return same and answer["entry"] == size.entry

    with ThreadPoolExecutor(8) as threads:
        right = list(threads.map(is_right, range(requests), chunksize=50))
    assert len(right) == requests and all(right)


def test_the_application(tmp_path: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    supernet = nested(skd.SuperNet(tiny_vit(torch.float32)), [8, 24, 8, 24])
    supernet, family = saved(supernet, tmp_path)
    client = testclient.TestClient(example().create_app(family))
    sizes = client.get("/sizes").json()
    assert [size["entry"] for size in sizes] == [0, 1]
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 60)).save(picture, "PNG")

    def ask(target: float) -> Any:
        return client.post(f"/predict?target_ms={target}", content=picture.getvalue()).json()

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, [0.0, 1e9] * 20))
    assert [answer["entry"] for answer in answers] == [1, 0] * 20
    assert len({json.dumps(answer) for answer in answers}) == 2
