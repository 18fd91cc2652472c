"""One test for each mistake that was found once; the docstring tells what went wrong."""

from __future__ import annotations

import copy
import stat
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import perturb, random_batches, tiny_vit
from test_files import header_of, rewrite
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import skd
import skd_kernels as kernels


def test_float64_scores_are_not_an_alias_of_their_buffer(model: Any, batches: Any) -> None:
    """`buffer.double()` of a float64 buffer is the buffer, which is zeroed after every batch."""
    scores, _ = skd.importance(skd.SuperNet(model), batches)
    assert all(array.sum() > 0 for array in scores.values())


@pytest.mark.parametrize("gated", [False, True])
def test_width_zero_with_scores(gated: bool) -> None:
    """Scores of no neuron could not be reshaped."""
    w1 = torch.randn(24 if gated else 12, 8, requires_grad=True)
    scores = torch.zeros(12)
    out = kernels.masked_mlp(torch.randn(2, 3, 8), w1, None, torch.randn(8, 12), None, 0, gated=gated, scores=scores)
    out.sum().backward()
    assert scores.eq(0).all() and w1.grad is not None and w1.grad.eq(0).all()


def test_a_host_tensor_width_is_checked_where_it_is_read() -> None:
    """-3 would cut from the other end."""
    with pytest.raises(ValueError, match=r"width is -3; it may be 0\.\.12"):
        kernels.masked_mlp(torch.randn(2, 3, 8), torch.randn(12, 8), None, torch.randn(8, 12), None, torch.tensor(-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_features_far_from_the_origin(dtype: torch.dtype) -> None:
    """Distances by matrix products lose everything when features are large and close to each other."""
    model = tiny_vit(dtype, num_classes=0)
    with torch.no_grad():
        model.norm.bias += 1e3
    assert skd.evaluate(model, [(random_batches(1, 40, dtype)[0][0], None)]) == 100.0


def test_a_fraction_means_the_entry_it_was_computed_from(model: Any, batches: Any) -> None:
    """floor((a / b) * b) may be a - 1."""
    supernet = skd.convert(model, batches)
    supernet.dropout_list = skd.plan(supernet, batches, target=1.0, rounds=3)
    sizes = supernet.dropout_list.macs
    for entry, size in enumerate(sizes):
        assert skd.cost(skd.extract(supernet, macs=float(size / sizes[0]))).macs == size, entry


def test_a_device_entry_out_of_range_is_clamped(planned: skd.SuperNet, batches: Any) -> None:
    """index_select past the table would be a device-side assertion."""
    images, last = batches[0][0], len(planned.dropout_list) - 1
    torch.testing.assert_close(planned(images, entry=torch.tensor(10**6)), planned(images, entry=last))
    torch.testing.assert_close(planned(images, entry=torch.tensor(-1)), planned(images, entry=0))
    with pytest.raises(ValueError, match="0-d integer tensor"):
        planned(images, entry=torch.tensor(True))


def test_numpy_widths(planned: skd.SuperNet, batches: Any) -> None:
    """A row of the dropout list is what one would pass."""
    row = planned.dropout_list.widths[3]
    scores, _ = skd.importance(planned, batches, widths=row)
    assert [len(scores[name]) for name in planned.modules_in_order] == row.tolist()
    with pytest.raises(ValueError, match="sequence of int"):
        skd.importance(planned, batches, widths=[1.5, 1, 1, 1])  # type: ignore[list-item]


class Doubled(VisionTransformer):
    """A forward of its own."""

    def forward_features(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward_features(2 * x, **kwargs)


def test_a_forward_of_its_own_is_refused(batches: Any) -> None:
    """The super-network runs timm's modules, not an overridden forward: it was silently another function."""
    model = Doubled(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5).double()
    perturb(model)
    with pytest.raises(ValueError, match="a Doubled whose forward is not that of its modules"):
        skd.convert(model, batches)


def test_a_model_inside_a_supernet_is_not_converted_again(planned: skd.SuperNet, batches: Any) -> None:
    with pytest.raises(ValueError, match="belongs to a SuperNet already"):
        skd.convert(planned.model, batches)


def test_a_plain_model_where_a_supernet_belongs(model: Any, batches: Any) -> None:
    for call in (
        lambda: skd.extract(model, macs=0.5),
        lambda: skd.plan(model, batches),
        lambda: skd.importance(model, batches),
    ):
        with pytest.raises(ValueError, match="it must be a SuperNet"):
            call()
    with pytest.raises(ValueError, match="timm VisionTransformer"):
        skd.evaluate(torch.nn.Linear(1, 1), batches)


def test_inference_mode(model: Any) -> None:
    supernet = skd.SuperNet(copy.deepcopy(model))
    with torch.inference_mode():
        batches = random_batches()
        for call, argument in (
            (skd.convert, model),
            (partial(skd.plan, planner="paper"), supernet),
            (skd.importance, supernet),
        ):
            with pytest.raises(ValueError, match="inference_mode"):
                call(argument, batches)
    assert isinstance(skd.convert(model, batches), skd.SuperNet)  # images made in inference mode are copied


def test_other_wrong_arguments(planned: skd.SuperNet, batches: Any) -> None:
    with pytest.raises(ValueError, match=r"images has dtype torch\.float32; the model has torch\.float64"):
        planned(batches[0][0].float())
    with pytest.raises(ValueError, match="batches is a NoneType"):
        skd.evaluate(planned, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rounds is 2\.5"):
        skd.plan(planned, batches, rounds=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a 64-bit integer"):
        skd.DropoutList(("0.attn",), [[16.9], [3.2]])
    whole = skd.DropoutList(("0.mlp",), [[8]])
    with pytest.raises(ValueError, match="target_macs is nan"):
        whole.extended([], float("nan"))
    with pytest.raises(ValueError, match="removes nan MACs"):
        whole.extended([skd.Operation("0.mlp", 4, float("nan"), 0.1)], 5.0)
    dynamic = skd.SuperNet(tiny_vit(dynamic_img_size=True))
    with pytest.raises(ValueError, match="multiples of"):
        dynamic(torch.zeros(1, 3, 45, 40, dtype=torch.float64))


def test_moments_of_nothing_have_no_say_in_the_shift() -> None:
    """A shift of zero far from the mean loses digits."""
    x = torch.randn(64, 2, 4, dtype=torch.float64) + 1e8
    grad = torch.randn(64, 2, 4, dtype=torch.float64) / x
    whole = kernels.token_moments(x, grad)
    added = kernels.token_moments(x[:0], grad[:0]) + whole
    assert torch.equal(added.covariance(), whole.covariance())


def test_huge_scores_do_not_overflow() -> None:
    """Their sum was infinite, so all of them became zero."""
    names = ["0.mlp"]
    one, big = (
        skd.rank_operations(
            {"0.mlp": np.arange(1.0, 9.0)[::-1] * scale}, *(dict.fromkeys(names, v) for v in (1.0, 1.0, 2, 8))
        )
        for scale in (1.0, 1e307)
    )
    assert [op.width for op in one] == [op.width for op in big] and big[0].score == pytest.approx(one[0].score)


def test_second_derivatives_leave_scores_a_plain_buffer() -> None:
    scores = torch.zeros(12)
    w1 = torch.randn(12, 8, requires_grad=True)
    out = kernels.masked_mlp(torch.randn(2, 3, 8), w1, None, torch.randn(8, 12), None, 5, scores=scores)
    torch.autograd.grad(out.square().sum(), w1, create_graph=True)
    assert not scores.requires_grad


def test_files_are_readable_by_others_and_know_their_image_size(planned: skd.SuperNet, tmp_path: Path) -> None:
    """safetensors makes files of mode 0600; timm's configuration says 224 pixels whatever was built."""
    path = tmp_path / "a.safetensors"
    skd.save(planned, path)
    reference = tmp_path / "plain"
    reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)
    assert header_of(path)["data"]["input_size"] == [3, 32, 32]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(format=float("inf")),
        lambda h: h.update(format=-1),
        lambda h: h.update(kind="zebra"),
        lambda h: h.update(architecture=5),
        lambda h: h["model_args"].update(embed_dim=-48),
        lambda h: h["model_args"].update(num_heads=0),
        lambda h: h["model_args"].update(mlp_ratio=float("inf")),
        lambda h: h["model_args"].update(depth=3000),
        lambda h: h["model_args"].update(img_size=[10**9, 10**9]),
        lambda h: h["model_args"].update(checkpoint_path="/etc/passwd"),
        lambda h: h.update(widths=[[10**30, 8], [8, 8]]),
        lambda h: h.update(dropout_list="[" * 10_000),
        lambda h: h.update(dropout_list='{"modules": [], "widths": [[]], "removed_macs": [1, 0]}'),
    ],
)
def test_damaged_headers_are_value_errors(planned: skd.SuperNet, tmp_path: Path, change: Any) -> None:
    path = tmp_path / "a.safetensors"
    skd.save(planned, path)
    rewrite(path, lambda header, tensors: change(header))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        skd.load(path)


def test_tied_tensors_and_odd_label_names(tmp_path: Path) -> None:
    model = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=5)
    model.pretrained_cfg = {"label_names": np.array(list("abcde"))}
    skd.save(model, tmp_path / "a.safetensors")
    assert header_of(tmp_path / "a.safetensors")["label_names"] == list("abcde")
    model.head_dist.weight = model.head.weight
    with pytest.raises(ValueError, match="cannot be saved"):
        skd.save(model, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
