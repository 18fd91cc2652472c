"""SuperNet: full and masked forward, device entries, state dict, gradients, the dropout list's place in it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import noted, random_batches, tiny_vit, with_twenty_one_entries

import skd


def test_wrapping_changes_neither_function_nor_keys(model: Any, batches: Any) -> None:
    images = batches[0][0]
    expected, keys = model(images), list(model.state_dict())
    classes, memory = [type(module) for module in model.modules()], {p.data_ptr() for p in model.parameters()}
    supernet = skd.SuperNet(model)
    assert [type(module) for module in model.modules()] == classes
    assert memory.isdisjoint(p.data_ptr() for p in supernet.parameters())
    torch.testing.assert_close(supernet(images), expected)
    torch.testing.assert_close(supernet.model(images), expected)
    assert list(supernet.state_dict()) == keys
    supernet.load_state_dict(model.state_dict())
    taken = copy.deepcopy(model)
    assert skd.SuperNet(taken, copy=False).model is taken


def test_state_dict_nests_and_reports_missing_keys(planned: skd.SuperNet, model: Any) -> None:
    parent = torch.nn.ModuleDict({"net": planned})
    assert "net.blocks.0.attn.qkv.weight" in parent.state_dict()
    parent.load_state_dict(parent.state_dict())
    state = model.state_dict()
    del state["blocks.0.attn.qkv.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        planned.load_state_dict(state)


def test_a_device_entry_is_the_int_entry(planned: skd.SuperNet, batches: Any) -> None:
    images = batches[0][0]
    for entry in range(len(planned.dropout_list)):
        expected = planned(images, entry=entry)
        torch.testing.assert_close(planned(images, entry=torch.tensor(entry)), expected, rtol=1e-10, atol=1e-12)


def test_entries_get_smaller_and_differ(planned: skd.SuperNet, batches: Any) -> None:
    assert len(planned.dropout_list) > 10
    assert (planned.dropout_list.macs[1:] < planned.dropout_list.macs[:-1]).all()
    last = len(planned.dropout_list) - 1
    assert (planned(batches[0][0]) - planned(batches[0][0], entry=last)).abs().max() > 1e-3


@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_parameter_stays_in_the_graph(planned: skd.SuperNet, batches: Any, as_tensor: bool) -> None:
    """Skipped modules have zero gradients, not None, so DistributedDataParallel needs no search for unused ones."""
    smallest = [info.full_width if info.name == "0.attn" else 0 for info in planned.infos]
    planned.dropout_list = skd.DropoutList(planned.modules_in_order, [planned.widths(), smallest])
    entry = torch.tensor(1) if as_tensor else 1
    planned(batches[0][0], entry=entry).square().sum().backward()
    for name, parameter in planned.model.named_parameters():
        assert parameter.grad is not None, name
        skipped = name.startswith(("blocks.0.mlp", "blocks.0.norm2", "blocks.1."))
        assert bool(parameter.grad.eq(0).all()) == skipped, name


def test_one_compilation_serves_a_training_step_of_twenty_entries(batches: Any) -> None:
    """Forward, backward and update: nothing breaks the graph, and no entry compiles anything again."""
    supernet, compiled_net = with_twenty_one_entries(), with_twenty_one_entries()
    images, labels = batches[0]
    backend, graphs = noted("aot_eager")

    def step(network: skd.SuperNet, entry: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(images, entry=entry), labels)

    torch._dynamo.reset()
    compiled = torch.compile(lambda entry: step(compiled_net, entry), fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(network.parameters(), lr=1e-2) for network in (supernet, compiled_net)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for entry in range(21):
            expected, found = step(supernet, entry), compiled(torch.tensor(entry))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
            for loss, optimizer in ((expected, optimizers[0]), (found, optimizers[1])):
                optimizer.zero_grad()
                loss.backward()
            for a, b in zip(compiled_net.parameters(), supernet.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
            for optimizer in optimizers:
                optimizer.step()
    assert len(graphs) == 1


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_last_block_computes_what_the_head_reads(pool: str) -> None:
    """With token pooling the class token alone goes through the last MLP."""
    supernet = skd.SuperNet(tiny_vit(global_pool=pool))
    seen = []
    for block in supernet.model.blocks:
        block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = supernet(images)
    assert seen == ([17, 1] if pool == "token" else [17, 17])
    torch.testing.assert_close(found, tiny_vit(global_pool=pool)(images), rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing_gives_the_same_gradients(planned: skd.SuperNet, batches: Any) -> None:
    planned.train()
    entry = len(planned.dropout_list) // 2
    grads = []
    for checkpointing in (False, True):
        planned.model.set_grad_checkpointing(checkpointing)
        planned.zero_grad()
        planned(batches[0][0], entry=entry).square().sum().backward()
        grads.append([p.grad.clone() for p in planned.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_width_table_has_room_for_every_group(planned: skd.SuperNet) -> None:
    capacity = 1 + sum(-(-info.full_width // info.group_size) for info in planned.infos)
    assert planned.width_table.shape == (capacity, 4)
    assert "width_table" not in planned.state_dict()


@pytest.mark.parametrize("entry", [-1, 10_000, True, 1.0])
def test_bad_entries(planned: skd.SuperNet, batches: Any, entry: Any) -> None:
    with pytest.raises(ValueError, match="entry is"):
        planned(batches[0][0], entry=entry)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(2, 1, 32, 32), "1 channels; the model takes 3"),
        (torch.zeros(2, 3, 32, 24), r"size \(32, 24\); the model takes \(32, 32\)"),
        (torch.zeros(3, 32, 32), r"images is \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "dtype torch.uint8"),
        ("cat.jpg", "images is str"),
    ],
)
def test_bad_images(planned: skd.SuperNet, images: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        planned(images)


def test_bad_dropout_lists(planned: skd.SuperNet) -> None:
    modules, full = planned.modules_in_order, planned.widths()
    with pytest.raises(ValueError, match="it must be a DropoutList"):
        planned.dropout_list = [[1]]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="this network has"):
        planned.dropout_list = skd.DropoutList(("a",), [[1]])
    with pytest.raises(ValueError, match="entry 0 must be"):
        planned.dropout_list = skd.DropoutList(modules, [[8] * len(full)])
    binary = skd.SuperNet(tiny_vit(qk_norm=True))
    with pytest.raises(ValueError, match=r"0\.attn may only have the widths 0 and 16"):
        binary.dropout_list = skd.DropoutList(modules, [full, [8, *full[1:]]])


def test_a_longer_list_than_planned_for_still_fits(planned: skd.SuperNet, batches: Any) -> None:
    full = planned.widths()
    rows = [[full[0], width, *full[2:]] for width in range(full[1], -1, -1)]
    planned.dropout_list = skd.DropoutList(planned.modules_in_order, rows)
    images = batches[0][0]
    torch.testing.assert_close(planned(images, entry=torch.tensor(70)), planned(images, entry=70))


def test_float32_and_bfloat16_run() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        supernet = skd.convert(tiny_vit(dtype), random_batches(dtype=dtype))
        assert supernet(random_batches(dtype=dtype)[0][0]).dtype == dtype


def test_blocks_are_called_as_modules(model: Any) -> None:
    """So that hooks, and wrappers of blocks, see them."""
    supernet, calls = skd.SuperNet(copy.deepcopy(model)), []
    for index, block in enumerate(supernet.model.blocks):
        block.register_forward_hook(lambda module, inputs, output, index=index: calls.append(index))
    supernet(random_batches(1)[0][0], entry=0)
    assert calls == list(range(len(supernet.model.blocks)))


def test_blocks_that_others_have_patched_or_compiled() -> None:
    """A block's own `forward`, or what block.compile() leaves in it, does not reach the super-network's block."""
    images = random_batches()[0][0]
    for prepare in (patch, lambda block: block.compile(backend="eager")):
        model = tiny_vit()
        expected = model(images)
        for block in model.blocks:
            prepare(block)
        torch.testing.assert_close(skd.SuperNet(model, copy=False)(images), expected)


def patch(block: Any) -> None:
    block.forward = partial(type(block).forward, block)


def test_a_model_without_an_image_size_is_refused() -> None:
    sizeless = {"img_size": None, "dynamic_img_size": True, "pos_embed": "none", "no_embed_class": True}
    with pytest.raises(ValueError, match="give img_size"):
        skd.SuperNet(tiny_vit(**sizeless))
