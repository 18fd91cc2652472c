"""Whole training steps on a CUDA device: one graph for all entries; skipped, with the reason, where there is none."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    digit_net,
    nested,
    noted,
    random_batches,
    run_training,
    training_config,
    with_twenty_one_entries,
)
from tolerances import kernel_tolerance

import skd
import skd_kernels
from skd.training.capture import WARMUP, Capture
from skd.training.step import Stepper, by_hand

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
SETTINGS: dict[str, Any] = {"model_ema_warmup": True, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "lr": 1e-3}


@pytest.fixture(autouse=True)
def ieee() -> Any:
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def network(dtype: torch.dtype = torch.float32) -> skd.SuperNet:
    """Entries of every kind: full, narrow, odd widths, modules of width 0."""
    rows = [[16, 20, 16, 24], [16, 20, 9, 24], [8, 13, 9, 16], [8, 13, 0, 16], [3, 1, 0, 5], [0, 1, 0, 0]]
    return nested(digit_net(dtype), *rows).cuda()


def stepper(graph: bool, **changes: Any) -> Stepper:
    config = training_config(**{**SETTINGS, "cuda_graph": graph, "batch_size": 64, **changes})
    step = by_hand(network().train(), config)
    assert (step.capture is not None) == graph
    return step


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    return images.cuda().to(dtype), torch.randint(0, 10, (64,), generator=generator).cuda()


def take(step: Stepper, entries: Any) -> list[torch.Tensor]:
    """Steps of these entries; the losses."""
    return [step([batch(step.step)], torch.tensor(int(entry), device="cuda")) for entry in entries]


def test_a_thousand_steps_of_mixed_entries_stay_finite() -> None:
    """bfloat16, one graph; the capacity of the table is not passed, so one capture serves all."""
    run = stepper(True, amp_dtype="bfloat16")
    losses = torch.stack(take(run, np.random.default_rng(0).integers(7, size=1000)))
    assert run.capture is not None and run.capture.graph is not None and not run.capture.failed
    assert losses.isfinite().all()
    for module in (run.state.supernet, run.state.averaged):
        assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("changes", [{}, {"clip_grad": 0.1}, {"model_ema": False}])
def test_replayed_steps_are_the_eager_ones(changes: dict[str, Any]) -> None:
    entries = np.random.default_rng(1).integers(7, size=WARMUP + 12)
    runs = [stepper(graph, amp_dtype="float32", **changes) for graph in (False, True)]
    eager, replayed = (torch.stack(take(run, entries)) for run in runs)
    torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-5)
    for found, expected in zip(runs[1].state.averaged.parameters(), runs[0].state.averaged.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_replay_never_stops_the_host() -> None:
    """Nor does what fills its inputs: learning rate, decay of the average and entry."""
    run = stepper(True, amp_dtype="bfloat16")
    take(run, [0, 1, 2, 3, 4])
    images, labels = batch(0)
    entry = torch.tensor(2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run([(images, labels)], entry)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(net: skd.SuperNet, entry: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    net.zero_grad()
    images, labels = batch(0, next(net.parameters()).dtype)
    with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
        logits = net(images, entry=entry)
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_step_against_float64(dtype: torch.dtype) -> None:
    """Every entry, all parameters as one vector; no more than twice what plain PyTorch is off by."""
    net = network()
    exact_net = copy.deepcopy(net).double()
    for entry in range(7):
        with skd_kernels.use("reference"):
            exact = torch.cat([g.flatten() for g in gradients(exact_net, entry, torch.float64)])
        plain = torch.cat([g.flatten() for g in gradients(net, entry, dtype)])
        found = torch.cat([g.flatten() for g in gradients(net, torch.tensor(entry, device="cuda"), dtype)])
        other = float((plain - exact).norm() / exact.norm())
        assert float((found - exact).norm() / exact.norm()) <= kernel_tolerance(other, dtype), entry


def test_deterministic_mode_repeats_a_run_to_the_bit() -> None:
    entries = np.random.default_rng(2).integers(7, size=20)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [stepper(graph, amp_dtype="bfloat16") for graph in (False, False, True, True)]
        for run in runs:
            take(run, entries)
    finally:
        torch.use_deterministic_algorithms(False)
    for first, again in ((runs[0], runs[1]), (runs[2], runs[3])):
        for a, b in zip(first.state.supernet.parameters(), again.state.supernet.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("importance", ["passes", "online"])
def test_a_whole_run_replays_its_steps(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stochastic depth, Mixup and CutMix, a warm-up and a growing list, as the recipes have them."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    replayed = []
    call = Capture.__call__

    def noting(step: Capture, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = call(step, inputs)
        replayed.append(step.graph is not None)
        return loss

    monkeypatch.setattr(Capture, "__call__", noting)
    net = digit_net().cuda()
    config = training_config(
        cuda_graph=None, importance=importance, drop_path=0.3, warmup_epochs=1, model_ema_warmup=True
    )
    assert config.mixup and config.cutmix
    history = run_training(net, config)
    expected = [False] * WARMUP + [True] * (3 * 4 - WARMUP)
    if importance == "online":  # the second epoch adds up no scores: another graph, after one step without
        expected[4] = False
    assert replayed == expected
    rows = history.epochs
    assert 1 < rows[0]["entries"] < rows[1]["entries"] == rows[2]["entries"]
    assert rows[0]["lr"] < rows[1]["lr"]
    assert np.isfinite([row["loss"] for row in rows]).all() and np.isfinite(rows[-1]["area"])
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_one_compilation_serves_twenty_entries() -> None:
    """Forward and backward of a whole super-network: nothing breaks the graph, and the kernels are in it."""
    net = with_twenty_one_entries(torch.float32).cuda()
    images, labels = (tensor.cuda() for tensor in random_batches(dtype=torch.float32)[0])
    backend, graphs = noted("inductor")

    def loss(entry: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(net(images, entry=entry), labels)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(net.parameters()))])

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(21):
            entry = torch.tensor(index, device="cuda")
            expected, found = loss(entry), compiled(entry)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            exact = gradient(expected)
            assert (gradient(found) - exact).norm() <= 1e-4 * exact.norm()
    assert len(graphs) == 1
    names = {str(node.target) for node in graphs[0].graph.nodes}
    for operation in ("masked_attention_triton", "masked_mlp_triton"):
        assert any(operation in name for name in names), names
