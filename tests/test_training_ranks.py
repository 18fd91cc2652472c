"""Training on two ranks against one: the same run for the same batches; and a fault on one rank ends both."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_graphs import FakeGraphs
from helpers import (
    Hooked,
    assert_close,
    assert_same_outcome,
    checkpoint_files,
    digit_data,
    digit_net,
    leftovers,
    raising,
    read_checkpoint,
    run_training,
    spoilt,
    timeless,
    training_config,
)
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import skd
from skd.training import checkpoints
from skd.training.parallel import on_ranks
from skd.training.step import average_gradients

LOADERS = ("train_loader", "val_loader", "calibration")
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"grad_accum_steps": 2, "clip_grad": 1.0, "decay": "expected", "kd_teacher": "original"},
    "online": {"importance": "online", "progressive_epochs": 3},
    "checkpointing": {"grad_checkpointing": True, "model_ema": False, "kd_teacher": "larger", "refit_start": True},
    "graph": {"cuda_graph": True, "clip_grad": 1.0, "kd_teacher": "both", "entry_sampling": "small"},
}
ROUNDING = {"graph": 1e-6}  # of the learning rate, a float32 tensor there; otherwise of float64


def config(**changes: Any) -> skd.TrainConfig:
    """Mixup mixes within a rank, so it is off. Half of the branches drop, each by its row of the whole batch.

    What the planner "paper" counts is the same on any number of ranks; losses differ in their last digits.
    """
    settings = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.5, "eval_every": 2, "planner": "paper"}
    return training_config(**{**settings, **changes})


def share(batches: Any, rank: int) -> list[Any]:
    """The part of each batch that one of two ranks gets."""
    return [(images[rank::2], labels[rank::2]) for images, labels in batches]


# What the two processes do


def run_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    kept_apart: list[None] = []
    wrapped: list[None] = []
    wrap, no_sync = DistributedDataParallel.__init__, DistributedDataParallel.no_sync

    def noted(*args: Any, **kwargs: Any) -> None:
        wrapped.append(None)
        wrap(*args, **kwargs)

    def counted(network: Any) -> Any:
        kept_apart.append(None)
        return no_sync(network)

    DistributedDataParallel.__init__ = noted  # type: ignore[method-assign]
    DistributedDataParallel.no_sync = counted  # type: ignore[method-assign]
    for name in [*CHANGES, *FAULTS]:
        loaders = {key: share(batches, rank) for key, batches in zip(LOADERS, digit_data(), strict=True)}
        settings = config(**CHANGES.get(name, {}))
        kept_apart.clear()
        wrapped.clear()
        start = time.monotonic()
        patch = pytest.MonkeyPatch()
        graphs = FakeGraphs(patch) if settings.cuda_graph else None
        try:
            if name in FAULTS:
                loaders |= FAULTS[name](rank, loaders, settings)
            net = digit_net(torch.float64)
            if rank == 1:  # all begin with rank 0's weights
                torch.nn.utils.vector_to_parameters(torch.ones(10**6, dtype=torch.float64), net.parameters())
            arguments = {"config": settings, **loaders, "out": folder / name}
            history = run_training(net, **arguments, group=dist.group.WORLD)
            result = {
                "apart": len(kept_apart),
                "wrapped": len(wrapped),
                "replays": graphs.replays if graphs else 0,
                "weights": net.state_dict(),
                "history": [dict(row) for row in history.epochs],
                "list": net.dropout_list.to_json(),
            }
        except Exception as error:
            result = {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
        finally:
            patch.undo()
        torch.save(result, folder / f"{name}-{rank}.pt")
        if name == "plain":
            average(rank, folder)
            unlike(rank, folder)
        if name == "stopped" and "error" in result:  # a copy to be resumed in other ways
            dist.barrier()
            if rank == 0:
                shutil.copytree(folder / name, folder / "to resume on one")
            dist.barrier()
            resumed = digit_net(torch.float64)
            loaders = {key: share(batches, rank) for key, batches in zip(LOADERS, digit_data(), strict=True)}
            run_training(resumed, settings, folder / name, **loaders, resume="auto", group=dist.group.WORLD)


def average(rank: int, folder: Path) -> None:
    """What a CUDA graph does in place of DistributedDataParallel, with gradients of one dtype, some absent."""
    net = digit_net(torch.float64)
    images, labels = share(digit_data()[0], rank)[0]
    net.requires_grad_(True).model.pos_embed.requires_grad_(False)
    torch.nn.functional.cross_entropy(net(images.double()), labels).backward()
    average_gradients(net, dist.group.WORLD)
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    torch.save(gradients, folder / f"gradients-{rank}.pt")


def unlike(rank: int, folder: Path) -> None:
    """Prepare networks that differ between ranks for training by a CUDA graph, and record the error."""
    net: Any = torch.nn.Linear(2 + rank, 2)
    try:
        on_ranks(net, net, dist.group.WORLD, replayed=True)
    except ValueError as error:
        (folder / f"unlike-{rank}.txt").write_text(str(error))


def at_batch(number: int, action: Callable[[], None]) -> Callable[[int], None]:
    return lambda given: action() if given == number else None


def stop_rank_1(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    return stop_at(loaders, 6) if rank == 1 else {}


def stop_in_importance(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    ask = at_batch(2, lambda: signal.raise_signal(signal.SIGTERM))
    return {"calibration": Hooked(loaders["calibration"], ask)} if rank == 0 else {}


def nan_on_rank_1(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    bad = spoilt(loaders["train_loader"], 2, lambda images, labels: (images * float("nan"), labels))
    return {"train_loader": bad} if rank == 1 else {}


def broken_file(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    batches = raising(loaders["train_loader"], 5, OSError(errno.EIO, "input/output error", "images/7.png"))
    return {"train_loader": batches} if rank == 1 else {}


def broken_calibration(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    return {"calibration": raising(loaders["calibration"], 1, ValueError("a label is 11"))} if rank == 0 else {}


def fewer_batches(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    class Stream:
        """Of a length that is not known before."""

        def __init__(self, batches: list[Any]) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            return iter(self.batches)

    return {"train_loader": Stream(loaders["train_loader"][: 4 - rank])}


def smaller_batches(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    short = spoilt(loaders["train_loader"], 2, lambda images, labels: (images[:-1], labels[:-1]))
    return {"train_loader": short} if rank == 1 else {}


def wrong_label(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    bad = spoilt(loaders["val_loader"], 1, lambda images, labels: (images, labels + 90))
    return {"val_loader": bad} if rank == 1 else {}


def other_settings(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    return {"config": settings.changed(seed=1)} if rank == 1 else {}


def failure_and_signal(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    """One rank fails in the same step in which the other gets a signal."""
    return broken_file(rank, loaders, settings) if rank == 1 else stop_at(loaders, 4)


def stop_at(loaders: dict[str, Any], number: int) -> dict[str, Any]:
    ask = at_batch(number, lambda: signal.raise_signal(signal.SIGTERM))
    return {"train_loader": Hooked(loaders["train_loader"], ask)}


def full_disk(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    def write(*_: Any, **__: Any) -> None:
        checkpoints.save_file = save
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step")

    def fill() -> None:
        checkpoints.save_file = write

    save = checkpoints.save_file
    return {"train_loader": Hooked(loaders["train_loader"], at_batch(3, fill))} if rank == 0 else {}


def death(rank: int, loaders: dict[str, Any], settings: Any) -> dict[str, Any]:
    die = at_batch(6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return {"train_loader": Hooked(loaders["train_loader"], die)} if rank == 1 else {}


FAULTS: dict[str, Callable[..., dict[str, Any]]] = {
    "stopped": stop_rank_1,
    "stopped in importance": stop_in_importance,
    "nan": nan_on_rank_1,
    "broken file": broken_file,
    "broken calibration": broken_calibration,
    "fewer batches": fewer_batches,
    "smaller batches": smaller_batches,
    "wrong label": wrong_label,
    "other settings": other_settings,
    "failure and signal": failure_and_signal,
    "full disk": full_disk,
    "death": death,  # the last: rank 1 is gone
}


# What is asked of them


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_ranks, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert not process.is_alive(), "a rank hangs"
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    return folder


def result(folder: Path, name: str, rank: int) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}-{rank}.pt", weights_only=False)
    return loaded


@pytest.mark.parametrize("name", CHANGES)
def test_two_ranks_train_what_one_trains(ranks: Path, tmp_path: Path, name: str) -> None:
    """float64: losses and weights within rounding, the list and the counts exactly."""
    whole = digit_net(torch.float64)
    history = run_training(whole, config(**{**CHANGES[name], "cuda_graph": False}), tmp_path / "one").epochs
    found, rounding = [result(ranks, name, rank) for rank in range(2)], ROUNDING.get(name, 1e-9)
    for rank in found:
        assert "error" not in rank, rank
        assert rank["list"] == whole.dropout_list.to_json()
        # A graph adds up the gradients itself: DistributedDataParallel's collectives cannot be captured.
        assert (rank["wrapped"], rank["replays"] > 5) == ((0, True) if name == "graph" else (1, False))
        assert_close(rank["weights"], whole.state_dict(), rounding)
        assert [row["curve"] for row in rank["history"]] == [row["curve"] for row in history]
        for row, alone in zip(rank["history"], history, strict=True):
            exact = row["sensitivity"] is None or name != "online"  # counts; online sums
            expected = alone["sensitivity"]
            assert row["sensitivity"] == (expected if exact else pytest.approx(expected, rel=1e-9))
        assert [row["images"] for row in rank["history"]] == [row["images"] for row in history]
        losses = [row["loss"] for row in rank["history"]]
        assert losses == pytest.approx([row["loss"] for row in history], rel=rounding)
    assert all(torch.equal(found[0]["weights"][key], tensor) for key, tensor in found[1]["weights"].items())
    assert timeless(found[0]["history"]) == timeless(found[1]["history"])
    assert len(whole.dropout_list) > 2


def test_networks_that_are_not_alike_are_told(ranks: Path) -> None:
    for rank in range(2):
        found = (ranks / f"unlike-{rank}.txt").read_text()
        assert found.startswith("the shape of the network is not the same on all ranks: {'weight': (2, 2), 'bias'")


def test_gradients_are_averaged_as_a_graph_does_it(ranks: Path) -> None:
    net = digit_net(torch.float64)
    net.model.pos_embed.requires_grad_(False)
    images, labels = digit_data()[0][0]
    torch.nn.functional.cross_entropy(net(images.double()), labels).backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    for rank in range(2):
        assert_close(torch.load(ranks / f"gradients-{rank}.pt"), expected)


def test_ranks_add_up_gradients_once_a_step(ranks: Path) -> None:
    """With two parts, 3 epochs of 2 steps: the first part of each step is kept apart."""
    assert [result(ranks, name, 0)["apart"] for name in ("plain", "accumulated")] == [0, 6]


def test_rank_0_writes_what_one_process_writes(ranks: Path) -> None:
    assert not leftovers(ranks / "plain")
    assert load_file(ranks / "plain" / "supernet.safetensors").keys() == digit_net().state_dict().keys()
    rows = (ranks / "plain" / "history.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == result(ranks, "plain", 0)["history"]


def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on_to_the_same_end(ranks: Path) -> None:
    for rank in range(2):
        assert result(ranks, "stopped", rank)["error"] == "Stopped"
        assert "SIGTERM" in result(ranks, "stopped", rank)["text"]
    assert_same_outcome(ranks / "stopped", ranks / "plain")


def test_a_run_of_two_ranks_goes_on_on_one(ranks: Path) -> None:
    net = digit_net(torch.float64)
    run_training(net, config(), ranks / "to resume on one", resume="auto")
    assert_close(net.state_dict(), result(ranks, "plain", 0)["weights"], 1e-9)
    assert net.dropout_list.to_json() == result(ranks, "plain", 0)["list"]


def test_a_signal_while_importance_is_measured(ranks: Path) -> None:
    for rank in range(2):
        assert result(ranks, "stopped in importance", rank)["error"] == "Stopped"
    assert read_checkpoint(checkpoint_files(ranks / "stopped in importance")[-1])[1]["step"] == 4


@pytest.mark.parametrize(
    "name, where, error, text",
    [
        ("nan", 1, "Diverged", "NaN or infinite in epoch 0, by step 3; the last good checkpoint is .*step-000000002"),
        ("broken file", 1, "OSError", "input/output error: 'images/7.png'"),
        ("broken calibration", 0, "ValueError", "a label is 11"),
        ("failure and signal", 1, "OSError", "input/output error"),
        ("wrong label", 1, "ValueError", r"labels has 9\d\.\.9\d"),
        ("full disk", 0, "OSError", "No space left on device"),
    ],
)
def test_a_fault_on_one_rank_is_told_on_both(ranks: Path, name: str, where: int, error: str, text: str) -> None:
    own, other = result(ranks, name, where), result(ranks, name, 1 - where)
    assert own["error"] == error
    if error != "Diverged":
        assert other["error"] == "RankFailed" and f"rank {where} failed: {error}" in other["text"]
    for told in (own, other):
        assert re.search(text, told["text"]), told["text"]
        assert told["seconds"] < 60
    assert_checkpoints_whole(ranks / name)


@pytest.mark.parametrize(
    "name, text",
    [
        ("fewer batches", r"\[4, 3\] batches"),
        ("smaller batches", r"batches of \[8, 7\] images"),
        ("other settings", "settings is not the same on all ranks"),
    ],
)
def test_ranks_that_do_not_fit_together(ranks: Path, name: str, text: str) -> None:
    for rank in range(2):
        assert result(ranks, name, rank)["error"] == "ValueError"
        assert re.search(text, result(ranks, name, rank)["text"])


def test_a_rank_that_dies(ranks: Path) -> None:
    survivor = result(ranks, "death", 0)
    assert survivor["error"] == "RankFailed" and "died" in survivor["text"] and survivor["seconds"] < 60
    assert assert_checkpoints_whole(ranks / "death") == 6


def assert_checkpoints_whole(out: Path) -> int:
    """All can be read and nothing is half-written; the step of the newest."""
    assert not leftovers(out)
    return max((read_checkpoint(path)[1]["step"] for path in checkpoint_files(out)), default=0)


def test_a_group_needs_gloo_and_torch_distributed() -> None:
    with pytest.raises(ValueError, match="not initialised"):
        run_training(digit_net(), training_config(), group=object())
