"""compensate: nearer to the full network, which does not change; cuts, files and training with corrections."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import digit_data, digit_net, nested, random_batches, raw_bytes, run_training, tiny_vit, training_config
from safetensors import safe_open
from safetensors.torch import save_file
from test_commands import KWARGS, MODEL, command, make_images

import skd
from skd.cli import main
from skd.vit import OutputLayer

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5}
# Widths of `tiny_vit`: full, narrowed, then with a skipped MLP, attention, block.
ROWS = ([16, 48, 8, 40], [16, 40, 8, 0], [8, 32, 0, 0], [0, 24, 0, 0])


def net_of(model: Any, *rows: Any) -> skd.SuperNet:
    return nested(skd.SuperNet(model), *(rows or ROWS)).eval()


@torch.no_grad()
def distance(net: skd.SuperNet, entry: int, batches: Any) -> float:
    """The distance of the logits from the full network's, over all images."""
    return float(sum((net(images, entry=entry) - net(images)).square().sum() for images, _ in batches))


@torch.no_grad()
def largest(one: Any, other: Any) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.fixture
def net() -> skd.SuperNet:
    return net_of(tiny_vit())


MODELS = {
    "plain": {},
    "average": {"global_pool": "avg", "class_token": False},
    "layer scale": {"init_values": 0.3},
    "headless": {"num_classes": 0},
    "registers": {"reg_tokens": 2},
    "no output bias": {"proj_bias": False},
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_entry_comes_nearer_to_the_full_network(kind: str) -> None:
    """Narrowed, with skipped modules, with a last block that runs nothing; and the full network stays as it is."""
    net, batches = net_of(tiny_vit(**MODELS[kind])), random_batches(count=4, size=32)
    images, before = batches[0][0], copy.deepcopy(net.state_dict())
    logits = net(images)
    far = [distance(net, entry, batches) for entry in range(1, 5)]
    found = skd.compensate(net, batches, entries=[1, 2, 3, 4])
    near = [distance(net, entry, batches) for entry in range(1, 5)]
    least = 0.8 if kind == "no output bias" else 0.5
    assert all(after < least * start for start, after in zip(far, near, strict=True)), (far, near)
    assert torch.equal(net(images), logits)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert dict(net.corrections) == found and set(found) == {1, 2, 3, 4}
    assert set(found[2].layers) == {"0.attn", "0.mlp", "1.attn"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extract_folds_the_correction_in(kind: str, dtype: torch.dtype) -> None:
    net, batches = net_of(tiny_vit(dtype, **MODELS[kind])), random_batches(dtype=dtype)
    bare = [net(batches[0][0], entry=entry) for entry in range(1, 5)]
    skd.compensate(net, batches, entries=[1, 2, 3, 4])
    for entry in range(1, 5):
        expected = net(batches[0][0], entry=entry)
        cut, plain = skd.extract(net, entry=entry), skd.extract(net, entry=entry, corrected=False)
        assert largest(cut(batches[0][0]), expected) < (1e-10 if dtype == torch.float64 else 1e-5)
        assert largest(plain(batches[0][0]), bare[entry - 1]) < 1e-5
        assert largest(plain(batches[0][0]), expected) > 1e-3
        assert skd.cost(cut) == skd.cost(net, entry=entry)
        assert {m.__module__.split(".")[0] for m in map(type, cut.modules())} <= {"timm", "torch"}


def test_a_module_that_has_lost_nothing_stays_as_it_is(net: skd.SuperNet) -> None:
    layer = skd.compensate(net, random_batches(), entries=[0])[0].layers
    for module in net.infos:
        own = module.output_layer(module.of(net.model))
        torch.testing.assert_close(layer[module.name].weight, own.weight.data, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer[module.name].bias, own.bias.data, rtol=1e-10, atol=1e-12)


def test_one_module_is_ridge_regression_by_hand() -> None:
    """The last MLP of a network with all else whole: against centred normal equations with a layer scale."""
    net, batches = net_of(tiny_vit(init_values=0.3, global_pool="avg"), [16, 72, 16, 30]), random_batches()
    found = skd.compensate(net, batches, entries=[1], ridge=0.05)[1].layers["1.mlp"]
    features, wanted = [], []
    block: Any = net.network.blocks(net.model)[1]
    with torch.no_grad():
        for images, _ in batches:
            x, shared = net.embed(images)
            for index in range(3):
                x = net.step(index, x, net.infos[index].full_width, shared=shared)
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
            features.append(hidden[..., :30].flatten(0, 1))
            wanted.append((block.mlp.fc2(hidden) - hidden[..., :30] @ block.mlp.fc2.weight[:, :30].T).flatten(0, 1))
    f, t = torch.cat(features), torch.cat(wanted)
    centred, mean = f - f.mean(0), t.mean(0)
    penalty = 0.05 * centred.square().sum(0).mean() * torch.eye(30, dtype=torch.float64)
    change = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (t - mean)).T
    torch.testing.assert_close(found.weight, block.mlp.fc2.weight.data[:, :30] + change, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.bias, mean - change @ f.mean(0), rtol=1e-9, atol=1e-10)


# Attention by heads, rotary positions, biases of positions, gated MLPs, parameters as layer scales.
FAMILIES = ["eva02_tiny_patch14_336", "beit_base_patch16_224", "vit_base_patch16_clip_quickgelu_224"]


def check_family(name: str, correct: Callable[[skd.SuperNet, Any], object]) -> None:
    """What `correct` does to entries 1 and 2 of a network brings them nearer, and `extract` computes the same."""
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 14} if "eva" in name else {"img_size": 32, "patch_size": 16}
    model = timm.create_model(name, **size, embed_dim=48, depth=2, num_heads=3, num_classes=5).eval()
    net, batches = skd.SuperNet(model), random_batches(pixels=size["img_size"], dtype=torch.float32)
    half = [module.full_width // (1 if module.binary else 2) for module in net.infos]
    nested(net, half, [*half[:2], 0, half[3] // 2]).eval()
    far = [distance(net, entry, batches) for entry in (1, 2)]
    correct(net, batches)
    for entry in (1, 2):
        assert distance(net, entry, batches) < far[entry - 1]
        assert largest(skd.extract(net, entry=entry)(batches[0][0]), net(batches[0][0], entry=entry)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name: str) -> None:
    check_family(name, lambda net, batches: skd.compensate(net, batches, entries=[1, 2]))


def test_a_norm_behind_the_module_leaves_it_alone() -> None:
    from timm.models.vision_transformer import ResPostBlock

    net, batches = net_of(tiny_vit(block_fn=ResPostBlock)), random_batches()
    bare = net(batches[0][0], entry=1)
    assert skd.compensate(net, batches, entries=[1])[1].layers == {}
    assert torch.equal(net(batches[0][0], entry=1), bare)


def test_labels_budgets_and_batches(net: skd.SuperNet) -> None:
    """Budgets name entries, labels are not looked at, and how images are divided changes nothing."""
    batches = random_batches()
    found = skd.compensate(net, iter([(images, None) for images, _ in batches]), macs=[0.75, 0.75, 1.0])
    assert sorted(found) == [
        0,
        next(i for i in range(5) if net.dropout_list.macs[i] <= 0.75 * net.dropout_list.macs[0]),
    ]
    again = skd.compensate(net, [(torch.cat([images for images, _ in batches]), None)], entries=sorted(found))
    for entry, correction in found.items():
        for name, layer in correction.layers.items():
            torch.testing.assert_close(layer.weight, again[entry].layers[name].weight, rtol=1e-8, atol=1e-9)


def test_saved_and_loaded_bit_for_bit(net: skd.SuperNet, tmp_path: Any) -> None:
    net = net_of(tiny_vit(torch.float32))
    batches = random_batches(dtype=torch.float32)
    skd.save(net, tmp_path / "bare.safetensors")
    skd.compensate(net, batches, entries=[1, 3])
    skd.save(net, tmp_path / "net.safetensors")
    loaded = skd.load(tmp_path / "net.safetensors")
    assert set(loaded.corrections) == {1, 3}
    for entry, correction in net.corrections.items():
        own = loaded.corrections[entry]
        assert (
            own.widths == correction.widths
            and own.nbytes == correction.nbytes
            and list(own.layers) == list(correction.layers)
        )
        for name, layer in correction.layers.items():
            assert raw_bytes(layer._asdict()) == raw_bytes(own.layers[name]._asdict())
        assert torch.equal(loaded(batches[0][0], entry=entry), net(batches[0][0], entry=entry))
    formats = []
    for name in ("bare", "net"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            formats.append(json.loads(file.metadata()["skd"])["format"])
    assert formats == [1, 2]
    assert not skd.load(tmp_path / "bare.safetensors").corrections
    skd.save(skd.extract(net, entry=3), tmp_path / "cut.safetensors")
    cut = skd.load(tmp_path / "cut.safetensors")
    assert largest(cut(batches[0][0]), net(batches[0][0], entry=3)) < 1e-5


def test_only_evaluation_of_an_int_uses_them(net: skd.SuperNet) -> None:
    images = random_batches()[0][0]
    bare = net(images, entry=2)
    skd.compensate(net, random_batches(), entries=[2])
    assert largest(net(images, entry=2), bare) > 1e-3
    assert largest(net(images, entry=torch.tensor(2)), bare) < 1e-9
    assert torch.equal(net.train()(images, entry=2), bare)


def test_they_follow_the_weights(net: skd.SuperNet) -> None:
    """Copies and dtypes take them along; other weights and other widths drop them."""
    batches = random_batches()
    skd.compensate(net, batches, entries=[1, 4])
    other = copy.deepcopy(net).float()
    assert other.corrections[1].layers["0.mlp"].weight.dtype == torch.float32
    assert largest(other(batches[0][0].float(), entry=4), net(batches[0][0], entry=4)) < 1e-4
    net.dropout_list = skd.DropoutList(net.modules_in_order, net.dropout_list.widths[:3])
    assert set(net.corrections) == {1}
    net.dropout_list = skd.DropoutList(net.modules_in_order, [net.widths(), [16, 47, 8, 40]])
    assert not net.corrections
    skd.compensate(net, batches, entries=[1])
    net.load_state_dict(net.state_dict())
    assert not net.corrections


def test_blocks_with_hooks_and_with_wrappers(net: skd.SuperNet) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inside: torch.nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def __getattr__(self, name: str) -> Any:
            inside = super().__getattr__("inside")
            return inside if name == "inside" else getattr(inside, name)

        def forward(self, *arguments: Any) -> Any:
            return self.inside(*arguments)

    images = random_batches()[0][0]
    skd.compensate(net, random_batches(), entries=[1])
    expected, seen = net(images, entry=1), []
    handle = net.model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    assert largest(net(images, entry=1), expected) < 1e-12 and seen
    handle.remove()
    net.model.blocks[1] = Wrapper(net.model.blocks[1])
    assert largest(net(images, entry=1), expected) < 1e-12


def test_training_drops_them() -> None:
    """Before the first step: they would be measured with weights that they do not belong to."""
    net, seen = digit_net(), []
    train, _, calibration = digit_data()
    net.dropout_list = skd.plan(net, calibration, rounds=1)
    skd.compensate(net, calibration, macs=[0.5])

    class Watched(list[Any]):
        def __iter__(self) -> Any:
            seen.append(dict(net.corrections))
            return super().__iter__()

    assert net.corrections
    run_training(net, training_config(epochs=1, progressive_epochs=0), train_loader=Watched(train))
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "exactly one of entries and macs must be given; got none"),
        ({"entries": [1], "macs": [0.5]}, "got both"),
        ({"entries": []}, "entries is .*at least"),
        ({"entries": 1}, "entries is 1; it must be a list"),
        ({"entries": [9]}, r"entry is 9; it may be 0\.\.4"),
        ({"macs": [0.01]}, "macs is 0.01"),
        ({"macs": [0.9], "convention": "half"}, "convention"),
        ({"entries": [1], "ridge": 0.0}, "ridge is 0.0; it must be a positive"),
        ({"entries": [1], "ridge": "much"}, "ridge is 'much'"),
        ({"entries": [1], "batches": []}, "batches has no batch"),
        ({"entries": [1], "batches": [torch.zeros(2)]}, r"batches\[0\] is a Tensor"),
        ({"entries": [1], "batches": [(torch.full((2, 3, 32, 32), float("nan")), None)]}, "none has finite"),
        ({"entries": [1], "group": 3}, "group is given"),
    ],
)
def test_mistakes_are_told(net: skd.SuperNet, changes: dict[str, Any], match: str) -> None:
    batches = changes.pop("batches", None)
    before = dict(net.corrections)
    with pytest.raises(ValueError, match=match):
        skd.compensate(net, random_batches() if batches is None else batches, **changes)
    assert dict(net.corrections) == before


def test_a_plain_model_has_no_entries() -> None:
    with pytest.raises(ValueError, match="must be a SuperNet"):
        skd.compensate(tiny_vit(), random_batches(), entries=[1])


def test_corrections_that_do_not_fit_are_refused(net: skd.SuperNet) -> None:
    (found,) = skd.compensate(net, random_batches(), entries=[2]).values()
    narrow = {**found.layers, "0.mlp": OutputLayer(found.layers["0.mlp"].weight[:, 1:], None)}
    for value, match in (
        ({1: found}, r"corrections\[1\] is of widths"),
        ({7: found}, "entry is 7"),
        ({2: 3}, r"corrections\[2\] is a int"),
        ([found], "corrections is a list"),
        ({2: skd.Correction(found.widths, narrow)}, r"layer of 0.mlp has a weight of \(48, 39\) and a bias of None"),
        ({2: skd.Correction(found.widths, {"1.mlp": found.layers["0.mlp"]})}, "a layer for '1.mlp'"),
    ):
        with pytest.raises(ValueError, match=match):
            net.corrections = value  # type: ignore[assignment]
    assert dict(net.corrections) == {2: found}


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan stores corrections, info lists them, evaluate and extract use them and say so."""
    make_images(tmp_path / "images")
    data = ["--data", tmp_path / "images", "--workers", 0]
    converted, planned, report = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.json"))
    loading = [*data, "--calibration-images", 24]
    command("convert", *MODEL, json.dumps(KWARGS), *loading, "--out", converted, report)
    plan = ["plan", "--supernet", converted, *loading, "--out", planned, "--rounds", 1, "--target", 0.8]
    made = command(*plan, "--compensate", "0.5,0.3", report)
    entries = [row["entry"] for row in made["corrections"]]
    assert len(entries) == 2 and made["compensation_seconds"] > 0
    listed = "compensated entries: " + ", ".join(
        f"{row['entry']} ({row['bytes']:,} bytes)" for row in made["corrections"]
    )
    assert f"{listed}; in " in capsys.readouterr().out.replace("\n", "")
    assert command("info", planned, report)["corrections"] == made["corrections"]
    assert listed in capsys.readouterr().out.replace("\n", "")
    net, cut = skd.load(planned), tmp_path / "cut.safetensors"
    images = torch.randn(2, 3, 16, 16)
    for option, compensated in (([], True), (["--uncorrected"], False)):
        argv = ["extract", "--supernet", planned, "--macs", 0.5, "--out", cut, *option]
        assert command(*argv, report)["compensated"] is compensated
        assert ("with its correction folded in" in capsys.readouterr().out) is compensated
        if not compensated:
            net.corrections = {}
        assert largest(skd.load(cut)(images), net(images, entry=entries[0])) < 1e-5
    found = command("evaluate", "--supernet", planned, "--entry", entries[1], *data, report)
    assert found["compensated"] and "measured with their corrections" in capsys.readouterr().out
    assert found["top1"] == pytest.approx(skd_top1(planned, entries[1], tmp_path / "images"))
    curve = command("evaluate", "--supernet", planned, "--budgets", 1, 0.5, *data, report)
    assert curve["corrections"] == made["corrections"]
    made = command(*plan, "--compensate", "0.5,0.01", report)  # a plan is not lost for a share that is out of reach
    assert "no sub-network is within 0.01 of the MACs; the smallest is corrected" in capsys.readouterr().out
    assert [row["entry"] for row in made["corrections"]] == [entries[0], made["entries"] - 1]
    for bad in ("0.5,2", "much", "0"):
        with pytest.raises(SystemExit):
            main([str(word) for word in (*plan, "--compensate", bad)])
        assert "not a list of shares" in capsys.readouterr().err


def skd_top1(file: Path, entry: int, images: Path) -> float:
    net = skd.load(file)
    cut = skd.extract(net, entry=entry)
    config = skd.TrainConfig(batch_size=8, workers=0, calibration_images=24)
    _, validation, _ = skd.data.loaders(str(images), net.model, config)
    return skd.evaluate(cut, validation)


def test_a_file_with_other_tensors_or_entries_is_refused(tmp_path: Path) -> None:
    net, file = net_of(tiny_vit(torch.float32)), tmp_path / "net.safetensors"
    skd.compensate(net, random_batches(dtype=torch.float32), entries=[2])
    skd.save(net, file)
    with safe_open(file, "pt") as opened:
        document = json.loads(opened.metadata()["skd"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    key = "corrections.2.blocks.0.mlp.fc2.weight"
    assert tensors[key].shape == (48, 40)
    for changed, entries in (
        ({**tensors, "corrections.2.other": torch.zeros(1)}, [[2, ["0.attn", "0.mlp", "1.attn"]]]),
        ({name: tensor for name, tensor in tensors.items() if name != key}, document["corrections"]),
        ({**tensors, key: tensors[key][:, 1:].contiguous()}, document["corrections"]),
        (tensors, [[9, ["0.mlp"]]]),
        (tensors, []),
        (tensors, [[2, ["7.mlp"]]]),
        (tensors, 3),
    ):
        save_file(changed, file, metadata={"skd": json.dumps({**document, "corrections": entries})})
        with pytest.raises(ValueError, match="cannot be rebuilt"):
            skd.load(file)


@pytest.mark.parametrize("images", [True, False], ids=["images", "moments"])
def test_a_channel_that_float16_cannot_hold_stays(images: bool) -> None:
    """Layer scale multiplies it by next to nothing, so that its bias would have to be enormous."""
    model = tiny_vit(init_values=1.0)
    with torch.no_grad():
        model.blocks[0].ls1.gamma[3] = 1e-6
    net = nested(skd.SuperNet(model.half()), [16, 0, 16, 0])
    batches = [(x.half(), y) for x, y in random_batches()]
    skd.moments(net, batches)
    found = skd.compensate(net, batches if images else None, entries=[1])
    layer, own = found[1].layers["0.attn"], net.model.blocks[0].attn.proj
    assert layer.bias is not None and torch.equal(layer.bias[3], own.bias[3])
    assert not torch.equal(layer.bias, own.bias)
    with torch.no_grad():
        assert net(batches[0][0], entry=1).isfinite().all()


def test_corrections_are_made_in_inference_mode_too() -> None:
    net = nested(skd.SuperNet(tiny_vit()), [16, 24, 16, 24])
    with torch.inference_mode():
        found = skd.compensate(net, random_batches(), entries=[1])
        made_inside = nested(skd.SuperNet(tiny_vit()), [16, 24, 16, 24])
        other = skd.compensate(made_inside, random_batches(), entries=[1])
    net(random_batches()[0][0], entry=1).sum().backward()
    assert torch.equal(found[1].layers["0.mlp"].weight, other[1].layers["0.mlp"].weight)


def test_an_empty_batch_changes_no_moments() -> None:
    """As a process has it, of a last batch with fewer images than processes."""
    net = skd.SuperNet(tiny_vit())
    images, labels = random_batches()[0]
    found = skd.moments(net, [(images, labels), (images[:0], labels[:0])])
    for name, own in skd.moments(net, [(images, labels)]).items():
        assert torch.equal(found[name].covariance, own.covariance), name
