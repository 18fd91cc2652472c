"""Corrections from stored second moments: without images, for any entry, the same in cuts and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digit_data, digit_net, random_batches, run_training, tiny_vit, training_config
from safetensors import safe_open
from test_commands import KWARGS, MODEL, command, make_images
from test_compensation import FAMILIES, MODELS, check_family, distance, largest, net_of

import skd
from skd.cli import main
from skd.moments import FeatureMoments, Predicting, moments_correction


@pytest.mark.parametrize("kind", MODELS)
def test_entries_come_nearer_to_the_full_network(kind: str) -> None:
    """Narrowed, with skipped modules; the full network stays as it is; `extract` computes the same on the fly."""
    net, batches = net_of(tiny_vit(**MODELS[kind])), random_batches(count=4, size=32)
    images, before = batches[0][0], copy.deepcopy(net.state_dict())
    logits, bare = net(images), net(images, entry=2)
    far = [distance(net, entry, batches) for entry in range(1, 5)]
    skd.moments(net, batches)
    assert torch.equal(net(images, entry=2), bare)  # moments alone correct nothing
    on_the_fly = [skd.extract(net, entry=entry, corrected="moments") for entry in range(1, 5)]
    found = skd.compensate(net, entries=[1, 2, 3, 4])
    near = [distance(net, entry, batches) for entry in range(1, 5)]
    assert near[0] < 0.8 * far[0] and sum(near) < 0.9 * sum(far), (far, near)
    for entry, cut in enumerate(on_the_fly, 1):
        assert largest(cut(images), net(images, entry=entry)) < 1e-10
        assert skd.cost(cut) == skd.cost(net, entry=entry)
    assert torch.equal(net(images), logits) and dict(net.corrections) == found
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert "0.attn" not in found[1].layers  # it is whole, and so is what comes next


def features_of(net: skd.SuperNet, batches: Any) -> dict[str, torch.Tensor]:
    """The rows that enter each output layer of timm's own full model."""
    plain, rows = skd.extract(net, entry=0), dict[str, list[torch.Tensor]]()
    for name, layer in plain.named_modules():
        if name.endswith((".proj", ".fc2")) and name.startswith("blocks"):
            layer.register_forward_pre_hook(lambda _, given, name=name: rows.setdefault(name, []).append(given[0]))
    with torch.no_grad():
        for images, _ in batches:
            plain(images)
    return {name: torch.cat([part.flatten(0, 1) for part in own]) for name, own in rows.items()}


def test_the_fit_is_ridge_regression_of_what_is_dropped() -> None:
    net, batches = net_of(tiny_vit(global_pool="avg"), [6, 72, 16, 30]), random_batches()
    stored = skd.moments(net, batches)
    found, rows = skd.compensate(net, entries=[1], ridge=0.05)[1].layers, features_of(net, batches)
    assert list(found) == ["0.attn", "1.mlp"]
    heads = (torch.arange(48) % 16) < 6
    for name, kept in {"0.attn": heads, "1.mlp": torch.arange(72) < 30}.items():
        module = next(module for module in net.infos if module.name == name)
        own, features = module.output_layer(module.of(net.model)), rows[f"{module.path}.{module.output_name}"]
        centred, dropped = features - features.mean(0), own.weight.data[:, ~kept]
        torch.testing.assert_close(
            stored[name].covariance.double(), centred.T @ centred / len(features), atol=1e-6, rtol=1e-5
        )
        squares = centred[:, kept].T @ centred[:, kept]
        penalty = 0.05 * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
        change = torch.linalg.solve(squares + penalty, centred[:, kept].T @ centred[:, ~kept] @ dropped.T).T
        shift = dropped @ features[:, ~kept].mean(0) - change @ features[:, kept].mean(0)
        torch.testing.assert_close(found[name].weight, own.weight.data[:, kept] + change, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].bias, own.bias.data + shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_modules_that_predict_are_those_of_the_correction(kind: str) -> None:
    """Module by module, the stream ends where an entry with its correction ends."""
    net, batches = net_of(tiny_vit(**MODELS[kind])), random_batches(count=4, size=32)
    predicting, images = Predicting(net, skd.moments(net, batches)), batches[0][0]
    skd.compensate(net, entries=[3])
    with torch.no_grad():
        x, shared = net.embed(images)
        for index, width in enumerate(net.widths(3)):
            x = predicting.step(index, x, width, shared=shared)
        assert largest(net.head(x), net(images, entry=3)) < 1e-6
        assert largest(net.head(x), skd.extract(net, entry=3, corrected=False)(images)) > 1e-3


def test_an_infinite_ridge_folds_the_means_in() -> None:
    """The mean of dropped features and of skipped modules goes into the bias, the weights stay."""
    net, batches = net_of(tiny_vit(init_values=0.3, global_pool="avg"), [16, 40, 0, 72]), random_batches()
    skd.moments(net, batches)
    layer = moments_correction(net, 1, ridge=1e12).layers["0.mlp"]
    rows, (first, second) = features_of(net, batches), net.network.blocks(net.model)
    own: Any = first.mlp.fc2
    expected = own.bias.data + own.weight.data[:, 40:] @ rows["blocks.0.mlp.fc2"].mean(0)[40:]
    mean = second.attn.proj(rows["blocks.1.attn.proj"]).mean(0).detach()
    expected = expected + mean * second.ls1.gamma.data / first.ls2.gamma.data
    torch.testing.assert_close(layer.weight, own.weight.data[:, :40], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.bias, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name: str) -> None:
    def correct(net: skd.SuperNet, batches: Any) -> None:
        found = skd.moments(net, batches)
        assert all(bool(found[info.name].covariance.numel()) != info.binary for info in net.infos)
        skd.compensate(net, entries=[1, 2])

    check_family(name, correct)


def test_only_tokens_that_count_are_in_the_moments() -> None:
    """Of the last block the head reads the class token alone; how images are divided changes nothing."""
    net, batches = net_of(tiny_vit()), random_batches()
    found, rows = skd.moments(net, iter(batches)), features_of(net, batches)
    class_tokens = rows["blocks.1.mlp.fc2"].unflatten(0, (-1, 17))[:, 0]
    torch.testing.assert_close(found["1.mlp"].mean.double(), class_tokens.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["0.mlp"].mean.double(), rows["blocks.0.mlp.fc2"].mean(0), rtol=1e-5, atol=1e-6)
    whole = skd.moments(net, [(torch.cat([images for images, _ in batches]), None)])
    for name, own in whole.items():
        torch.testing.assert_close(own.covariance, found[name].covariance, rtol=1e-5, atol=1e-6)
    bad = torch.full_like(batches[0][0], torch.nan)
    with pytest.warns(UserWarning, match="1 were left out"):
        again = skd.moments(net, [(bad, None), *batches])
    assert all(torch.equal(again[name].covariance, own.covariance) for name, own in found.items())


def test_files_keep_them(tmp_path: Path) -> None:
    net, batches = net_of(tiny_vit()), random_batches()
    skd.moments(net, batches)
    skd.save(net, tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert json.loads(file.metadata()["skd"])["format"] == 3
    again = skd.load(tmp_path / "net.safetensors")
    assert all(
        torch.equal(a, b) for name in net.moments for a, b in zip(net.moments[name], again.moments[name], strict=True)
    )
    assert sum(own.nbytes for own in again.moments.values()) == 4 * 2 * (48 + 48**2 + 72 + 72**2)
    # Tensors of a file lie at addresses by which some processors round sums differently; those of a copy do not.
    one, other = (skd.extract(each, entry=2, corrected="moments") for each in (net, copy.deepcopy(again)))
    assert torch.equal(one(batches[0][0]), other(batches[0][0]))


def test_they_go_when_the_weights_change() -> None:
    net = digit_net()
    for change in (
        lambda: net.load_state_dict(net.state_dict()),
        lambda: run_training(net, training_config(epochs=1, progressive_epochs=1)),
    ):
        skd.moments(net, digit_data()[2])
        assert set(net.moments) == set(net.modules_in_order)
        change()
        assert not net.moments


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """convert stores moments, plan keeps them, info has their bytes, evaluate and extract use them when asked."""
    make_images(tmp_path / "images")
    data = ["--data", tmp_path / "images", "--workers", 0]
    converted, planned, report, cut = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c", "d.safetensors")
    )
    loading, bases = (
        [*data, "--calibration-images", 24],
        ["--qk", "balanced", "--v", "output", "--neurons", "residual"],
    )
    made = command("convert", *MODEL, json.dumps(KWARGS), *loading, *bases, "--moments", "--out", converted, report)
    plan = ["plan", "--supernet", converted, *loading, "--out", planned, "--rounds", 1, "--target", 0.8]
    again = command(*plan, report)
    assert made["moments_bytes"] == again["moments_bytes"] == command("info", planned, report)["moments_bytes"] > 0
    assert again["seconds"] > 0 and f"planned in {again['seconds']:.1f} s" in capsys.readouterr().out
    net, images = skd.load(planned), torch.randn(2, 3, 16, 16)
    options = ["extract", "--supernet", planned, "--macs", 0.5, "--out", cut]
    found = command(*options, "--compensate", "moments", report)
    assert found["compensated"] and "from the stored moments" in capsys.readouterr().out
    expected = skd.extract(net, macs=0.5, corrected="moments")(images)
    assert largest(skd.load(cut)(images), expected) < 1e-5
    assert not command(*options, report)["compensated"]
    assert largest(skd.load(cut)(images), expected) > 1e-4
    measured = ["evaluate", "--supernet", planned, *data, "--compensate", "moments"]
    assert command(*measured, "--entry", found["entry"], report)["compensated"]
    curve = command(*measured, "--budgets", 1, 0.5, report)
    assert [row["entry"] for row in curve["corrections"]] == [row["entry"] for row in curve["curve"]]
    restored = command(*plan, "--moments", report)
    assert restored["moments_bytes"] == made["moments_bytes"]
    with pytest.raises(SystemExit):
        main([str(word) for word in (*options, "--compensate", "moments", "--uncorrected")])


def test_convert_makes_them_from_an_iterator_too() -> None:
    model, batches = tiny_vit(), random_batches()
    net = skd.convert(model, iter(batches), moments=True)
    expected = skd.moments(skd.convert(model, batches), batches)
    assert all(torch.equal(net.moments[name].covariance, own.covariance) for name, own in expected.items())


def test_what_is_refused() -> None:
    net = net_of(tiny_vit())
    with pytest.raises(ValueError, match="supernet has no moments"):
        skd.compensate(net, entries=[1])
    with pytest.raises(ValueError, match="supernet has no moments"):
        skd.extract(net, entry=1, corrected="moments")
    with pytest.raises(ValueError, match="corrected is 'moment'"):
        skd.extract(net, entry=1, corrected="moment")
    found = skd.moments(net, random_batches())
    with pytest.raises(ValueError, match="must be empty or map every module"):
        net.moments = {"0.attn": found["0.attn"]}
    with pytest.raises(ValueError, match=r"moments of 0\.attn must be"):
        net.moments = found | {"0.attn": FeatureMoments(found["0.attn"].mean, found["0.mlp"].covariance)}


def test_a_ridge_below_the_rounding_of_moments_is_refused() -> None:
    """The equations then have no solution: they are float32, and features that depend on each other are singular."""
    net, batches = net_of(tiny_vit()), random_batches(count=1, size=2)
    skd.moments(net, batches)
    with pytest.raises(ValueError, match=r"^ridge is 1e-12; it is too small for the moments of \d\.(attn|mlp)"):
        skd.compensate(net, entries=[1, 2, 3, 4], ridge=1e-12)
