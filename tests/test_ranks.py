"""Calibration, importance and compensation on two processes with half of the images each, against one with all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import random_batches, tiny_vit

import skd
from skd.support.ranks import RankFailed, others_alive


def results(batches: Any, group: Any = None, **kwargs: Any) -> dict[str, Any]:
    """The results of convert, importance, plan and compensate on `batches`."""
    model = tiny_vit(**kwargs)
    supernet = skd.convert(model, batches, group=group)
    scores, sensitivity = skd.importance(supernet, batches, group=group)
    listed = skd.plan(supernet, batches, rounds=2, group=group)
    supernet.dropout_list = listed
    layers = skd.compensate(supernet, batches, macs=[0.6], group=group)
    state = supernet.state_dict() | {
        f"{entry} {name} {kind}": tensor
        for entry, correction in layers.items()
        for name, layer in correction.layers.items()
        for kind, tensor in layer._asdict().items()
    }
    options = {"qk": "balanced", "v": "output", "neurons": "residual", "moments": True}
    converted = skd.convert(model, batches, group=group, **options)
    other = converted.state_dict() | {f"{name} moments": own.covariance for name, own in converted.moments.items()}
    return {"other": other, "state": state, "scores": scores, "sensitivity": sensitivity, "list": listed.to_json()}


MODELS: dict[str, dict[str, Any]] = {"classifier": {}, "headless": {"num_classes": 0}}


def _on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = random_batches(4)
    mine = batches[:3] if rank == 0 else batches[3:]  # shares of different size
    for name, kwargs in MODELS.items():
        torch.save(results(mine, dist.group.WORLD, **kwargs), Path(folder) / f"{name}-{rank}.pt")
    if rank == 1:  # a rank whose images are all NaN: an error on both, no waiting
        mine = [(images * float("nan"), labels) for images, labels in mine]
    for kwargs in MODELS.values():
        with pytest.raises(ValueError, match="a rank has none with finite"):
            skd.convert(tiny_vit(**kwargs), mine, group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two processes, for all models: starting them takes longer than their work."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_on_rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_give_what_one_gives(on_two_ranks: Path, model: str) -> None:
    """Moments to 1e-10 in float64, so rotations alike; the same bits on both ranks; counts and the list exact."""
    ranks = [torch.load(on_two_ranks / f"{model}-{rank}.pt", weights_only=False) for rank in range(2)]
    whole = results(random_batches(4), **MODELS[model])
    for name, tensor in whole["state"].items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])
        torch.testing.assert_close(ranks[0]["state"][name], tensor, rtol=1e-8, atol=1e-8)
    for name, tensor in whole["other"].items():  # small eigenvalues magnify rounding, and moments are float32
        assert torch.equal(ranks[0]["other"][name], ranks[1]["other"][name])
        torch.testing.assert_close(ranks[0]["other"][name], tensor, rtol=1e-5, atol=1e-6)
    for rank in ranks:
        assert rank["sensitivity"] == whole["sensitivity"] and rank["list"] == whole["list"]
        for name, scores in whole["scores"].items():
            assert np.array_equal(rank["scores"][name], ranks[0]["scores"][name])
            np.testing.assert_allclose(rank["scores"][name], scores, rtol=1e-7)


def test_a_group_needs_torch_distributed(batches: Any) -> None:
    with pytest.raises(ValueError, match="not initialised"):
        skd.convert(tiny_vit(), batches, group=object())


@pytest.mark.parametrize("text", ["the peer has a socket", "Connection refused", "NCCL is not there", "gloo/pair.cc"])
def test_a_process_alone_has_no_other_rank_to_miss(text: str) -> None:
    with pytest.raises(RuntimeError, match=text) as caught, others_alive(None):
        raise RuntimeError(text)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize(
    ("error", "died"),
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), True),
        (dist.DistBackendError("watchdog timeout"), True),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
        (RuntimeError("CUDA error: peer access is not supported between these two devices"), False),
        (ConnectionError("Connection to the data set is lost: socket closed by peer"), False),
        (torch.OutOfMemoryError("out of memory; NCCL holds 2 GiB"), False),
    ],
)
def test_in_a_group_only_errors_of_the_network_are_a_dead_rank(error: Exception, died: bool) -> None:
    with pytest.raises(RankFailed if died else type(error)) as caught, others_alive(object()):
        raise error
    assert "another rank has died" in str(caught.value) if died else caught.value is error
