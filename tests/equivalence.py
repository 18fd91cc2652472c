"""What must hold of any supported architecture, checked in float64 on one tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from architectures import batches, images
from internals import ModuleInfo, modules_of
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import nn

import skd

TOLERANCE = 1e-10
# Parameters of an attention that is cut by heads; no model has all of them.
_PARTS = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
HEAD_PARAMETERS = [f"{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")]
HEAD_PARAMETERS += ["q_bias", "v_bias", "proj.weight"]


def by_heads(info: ModuleInfo) -> bool:
    """Whether `info` is an attention whose width counts its heads."""
    return info.kind == "attn" and info.full_width == getattr(info, "num_heads", None) and hasattr(info, "kv_heads")


def check(model: Any) -> tuple[float, float]:
    """Convert, narrow, extract, price and score `model`; the worst relative errors of function and extraction."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches(model)
    supernet = skd.convert(model, data)
    check_untouched(model, before)
    check_rewritten(supernet, before)
    function_error = check_function(model, supernet)
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, ladder(supernet.infos))
    entries = range(len(supernet.dropout_list))
    extraction_error = max(check_entry(supernet, entry) for entry in entries)
    check_importance(supernet, data)
    return function_error, extraction_error


def check_untouched(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def check_rewritten(supernet: Any, before: dict[str, torch.Tensor]) -> None:
    """Check that the weights which the transform rewrites have changed, and all others have the same bits."""
    after = supernet.state_dict()
    assert list(after) == list(before)
    flags = rewritten(supernet.infos)
    for name, old in before.items():
        parts = flags.get(name, (False,))
        pairs = zip(old.reshape(len(parts), -1), after[name].reshape(len(parts), -1), parts, strict=True)
        for index, (was, now, changes) in enumerate(pairs):
            if changes is None:
                assert torch.equal(now.sort()[0], was.sort()[0]), f"part {index} of {name} may only be reordered"
                continue
            moved = relative(now, was) > 1e-3 if changes else not torch.equal(now, was)
            assert moved == changes, f"part {index} of {name} must {'' if changes else 'not '}change"


def rewritten(infos: tuple[ModuleInfo, ...]) -> dict[str, tuple[bool | None, ...]]:
    """For each parameter, which of its equal parts (rows of q, k, v) WPAC rewrites; None: it may reorder the part.

    Parameters that WPAC does not touch are absent.
    """
    flags: dict[str, tuple[bool | None, ...]] = {}
    for info in infos:
        prefix = f"blocks.{info.block}.{info.kind}."
        if by_heads(info):
            flags |= {prefix + name: (None,) for name in HEAD_PARAMETERS if not info.binary}
        elif info.kind == "attn":
            rows = (info.rotates_qk, info.rotates_qk, info.rotates_v)
            flags |= {prefix + "qkv.weight": rows, prefix + "qkv.bias": rows}
            flags[prefix + "proj.weight"] = (info.rotates_v,)
        else:
            layers = [f"{layer}.{kind}" for layer in info.inputs for kind in ("weight", "bias")]
            flags |= {prefix + name: (not info.binary,) for name in [*layers, f"{info.output}.weight"]}
    return flags


@torch.no_grad()
def check_function(model: Any, supernet: Any) -> float:
    """The largest error of the super-network at full width, called in every way, against the model."""
    x = images(model, 3)
    expected = model(x)
    assert expected.isfinite().all() and expected.std() > 0.01
    outputs = supernet(x), supernet(x, entry=0), supernet(x, torch.tensor(0))
    error = max(relative(output, expected) for output in outputs)
    assert error <= TOLERANCE
    return error


def ladder(infos: tuple[ModuleInfo, ...]) -> list[list[int]]:
    """Nested widths: full, about half, every second module gone, block 0 gone too, nothing left."""
    half = [narrowed(info) for info in infos]
    kept = [(info.kind == "attn") == (info.block % 2 == 0) for info in infos]
    alternate = [width * keep for width, keep in zip(half, kept, strict=True)]
    # A width that is no whole number of groups is a width too.
    ragged = [w - (w > 1 and not info.binary) for info, w in zip(infos, alternate, strict=True)]
    headless = [0 if info.block == 0 else width for info, width in zip(infos, ragged, strict=True)]
    return [[info.full_width for info in infos], half, ragged, headless, [0] * len(infos)]


def narrowed(info: ModuleInfo) -> int:
    """About half of the groups; a module that is all or nothing stays whole."""
    if info.binary:
        return info.full_width
    return info.full_width // 2 // info.group_size * info.group_size or info.full_width // 2


@torch.no_grad()
def check_entry(supernet: Any, entry: int) -> float:
    """Compare extraction, the entry as int and as tensor, and the zeroed full network; return the worst error."""
    x = images(supernet.model, 3)
    widths = supernet.widths(entry)
    expected = zeroed(skd.extract(supernet, entry=0), supernet.infos, widths)(x)
    extracted = skd.extract(supernet, entry=entry)
    outputs = extracted(x), supernet(x, entry=entry), supernet(x, torch.tensor(entry))
    error = max(relative(output, expected) for output in outputs)
    assert error <= TOLERANCE, f"entry {entry}, widths {widths}"
    assert type(extracted) is type(supernet.model)
    check_plain(extracted)
    check_cost(supernet, extracted, entry)
    return error


def zeroed(model: Any, infos: tuple[ModuleInfo, ...], widths: list[int]) -> Any:
    """The full network with zeros where `widths` cut: the definition of a sub-network, in timm's own code."""
    for info, width in zip(infos, widths, strict=True):
        block = model.blocks[info.block]
        module = getattr(block, info.kind)
        last = module.proj if info.kind == "attn" else getattr(module, info.output)
        if width == 0:
            norm = block.norm1 if info.kind == "attn" else block.norm2
            tail = norm if isinstance(block, ResPostBlock | EvaBlockPostNorm) else last  # what the residual adds
            for parameter in tail.parameters():
                parameter.zero_()
        elif by_heads(info):
            last.weight.unflatten(1, (info.num_heads, -1))[:, width:] = 0
        elif info.kind == "attn":
            last.weight.unflatten(1, (info.num_heads, -1))[:, :, width:] = 0
            for tensor in module.qkv.parameters():
                tensor.unflatten(0, (3, info.num_heads, -1))[0, :, width:] = 0
        else:
            last.weight[:, width:] = 0
    return model


def check_plain(extracted: Any) -> None:
    """Check that a model has only timm's and PyTorch's classes, so that it needs no skd, and can be trained."""
    assert {type(module).__module__.split(".")[0] for module in extracted.modules()} <= {"timm", "torch"}
    assert all(parameter.requires_grad for parameter in extracted.parameters())


def check_cost(supernet: Any, extracted: Any, entry: int) -> None:
    """Check that super-network and extracted model have the same cost, and that counted parameters and MACs agree."""
    empty = len(supernet.dropout_list) - 1
    counts = dict(zip(("linear", "full"), counted(extracted), strict=True))
    for convention, count in counts.items():
        price = skd.cost(supernet, entry=entry, convention=convention)
        assert skd.cost(extracted, convention=convention) == price
        assert price.params == sum(parameter.numel() for parameter in extracted.parameters())
        assert price.macs - skd.cost(supernet, entry=empty, convention=convention).macs == count


def counted(model: Any) -> tuple[int, int]:
    """(linear, full) MACs of the blocks, from one image: products, bias adds, norms, activations twice, gates."""
    total = 0

    def count(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += output.numel() * (layer.in_features + (layer.bias is not None))
        elif "norm" in type(layer).__name__.lower() and not list(layer.children()):  # no block of that name
            total += output.numel()
        elif any(layer is getattr(block.mlp, "act", None) for block in model.blocks):
            total += 2 * output.numel()

    handles = [module.register_forward_hook(count) for module in model.blocks.modules()]
    model(images(model, 1))
    for handle in handles:
        handle.remove()
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    attentions = [block.attn for block in model.blocks if not isinstance(block.attn, torch.fx.GraphModule)]
    gates = sum(attn.proj.in_features * (getattr(attn, "gate", None) is not None) for attn in attentions)
    gates += sum(info.full_width for info in modules_of(model) if getattr(info, "gated", False))
    total += gates * tokens
    for attn in attentions:  # biases in pieces are put together, and the layer is not called
        if getattr(attn, "q_bias", None) is not None:
            total += tokens * (attn.qkv.in_features + 1) * attn.qkv.out_features
    return total, total + 2 * tokens**2 * sum(attn.proj.in_features for attn in attentions)


def check_importance(supernet: Any, data: Any) -> None:
    """Check that scores are finite, non-negative, not all zero, and of the widths asked for."""
    widths = supernet.widths(1)
    scores, sensitivity = skd.importance(supernet, data, widths=widths)
    for info, width in zip(supernet.infos, widths, strict=True):
        assert scores[info.name].shape == (width,)
        assert np.isfinite(scores[info.name]).all() and scores[info.name].min() >= 0 < scores[info.name].max()
        assert 0 < sensitivity[info.name] <= 1


@torch.no_grad()
def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    return float((value - expected).abs().max() / expected.abs().max())
