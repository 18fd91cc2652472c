"""Teachers of a training run: what they predict, what is learned from it, and what is left of it in a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    QUIET,
    assert_close,
    assert_same_outcome,
    checkpoint_files,
    digit_data,
    digit_net,
    interrupted,
    nested,
    perturb,
    raw_bytes,
    read_checkpoint,
    run_training,
    training_config,
    weights,
)
from torch.nn import functional as F

import skd
from skd.training.distillation import divergence, larger_entries
from skd.training.dry_run import dry_run
from skd.training.online import OnlineImportance
from skd.training.step import by_hand

# Nothing random, and plain gradient descent.
STEP: dict[str, Any] = {"mixup_prob": 0.0, "drop_path": 0.0, "model_ema": False, "opt": "momentum", "lr": 0.1}
STEP |= {"weight_decay": 0.0, "kd_temperature": 3.0, "task_loss_weight": 0.3}
ENTRIES = [[16, 22, 16, 24], [16, 20, 16, 22], [8, 0, 16, 0]]
TEACHERS = ("original", "larger", "both")


def divergence_by_hand(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """9 KL(p || q) at the temperature 3, mean over the images."""
    p, q = (teacher / 3).softmax(-1), (logits / 3).softmax(-1)
    return 9 * (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("entry", range(4))
@pytest.mark.parametrize("teacher", TEACHERS)
def test_one_step_by_hand(teacher: str, entry: int) -> None:
    """The frozen network is the one before the first step; the larger entry is taken at the present weights."""
    net = nested(digit_net(torch.float64), *ENTRIES)
    original = copy.deepcopy(net)
    step = by_hand(net, training_config(**STEP, kd_teacher=teacher))
    perturb(net, seed=5)
    net.train()
    expected, present = copy.deepcopy(net), copy.deepcopy(net)
    images, labels = digit_data()[0][0]
    images = images.double()
    loss = step([(images, labels)], entry)

    larger = [0, 0, 0, 2][entry]  # the first two are nearer to one another than a twelfth of the MACs
    logits = expected(images, entry=entry)
    task = F.cross_entropy(logits, labels, label_smoothing=0.1)
    with torch.no_grad():
        taught = {"original": original(images), "larger": present(images, entry=larger)}
    shares = {"original": {"original": 0.7}, "larger": {"larger": 0.7}, "both": {"original": 0.35, "larger": 0.35}}
    own = shares[teacher]
    if entry == 0:  # which no other is larger than
        own = {} if teacher == "larger" else {"original": 0.7}
    whole = (1 - sum(own.values())) * task
    for name, share in own.items():
        whole = whole + share * divergence_by_hand(logits, taught[name])
    whole.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    assert_close(weights(net), weights(expected), 1e-11)


def test_the_next_larger_entry_has_a_twelfth_of_the_macs_more() -> None:
    net = nested(digit_net(), *([16, 24 - step, 16, 24] for step in range(1, 25)), [8, 0, 8, 24], [8, 0, 8, 0])
    macs = net.dropout_list.macs
    found = larger_entries(net.dropout_list)
    assert found[:2] == [0, 0] and len(set(found)) > 3
    for entry, larger in enumerate(found):
        enough = [other for other in range(entry) if macs[other] >= macs[entry] + macs[0] / 12]
        assert larger == max(enough, default=0)


def test_the_divergence_is_timms() -> None:
    logits, teacher = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = divergence(logits, teacher, 3.0)
    torch.testing.assert_close(found, divergence_by_hand(logits, teacher), rtol=1e-12, atol=0)
    assert divergence(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-15)
    half = divergence(logits.bfloat16(), teacher.bfloat16(), 3.0)
    assert half.dtype == torch.float32


def test_a_teacher_sees_the_mixed_images_and_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode and without a gradient; the student afterwards is in training mode, with one."""
    calls: list[tuple[torch.Tensor, bool, bool, bool]] = []
    forward = skd.SuperNet.forward

    def spy(self: Any, images: torch.Tensor, entry: Any = None) -> torch.Tensor:
        modes = {module.training for module in self.modules()}
        calls.append((images, modes == {True}, modes == {False}, torch.is_grad_enabled()))
        return forward(self, images, entry)

    net = nested(digit_net(), *ENTRIES)
    monkeypatch.setattr(skd.SuperNet, "forward", spy)
    run_training(
        net,
        training_config(epochs=1, progressive_epochs=0, kd_teacher="both", drop_path=0.5, checkpoint_steps=0),
        val_loader=None,
    )
    assert len(calls) == 3 * 4
    originals = [images for images, _ in digit_data()[0]]
    for number in range(4):
        first, second, student = calls[3 * number : 3 * number + 3]
        assert first[1:] == second[1:] == (False, True, False) and student[1:] == (True, False, True)
        assert torch.equal(first[0], student[0]) and torch.equal(second[0], student[0])
        assert not torch.equal(student[0], originals[number])


@pytest.mark.parametrize("teacher", TEACHERS)
def test_parts_of_a_step_equal_the_whole(teacher: str) -> None:
    runs = []
    for parts in (1, 2):
        net = nested(digit_net(torch.float64), *ENTRIES)
        step = by_hand(net, training_config(**STEP, kd_teacher=teacher, grad_accum_steps=parts))
        images, labels = digit_data()[0][0]
        split = zip(images.double().chunk(parts), labels.chunk(parts), strict=True)
        loss = step(list(split), 2)
        runs.append((weights(net), loss.item()))
    assert_close(runs[0][0], runs[1][0], 1e-11)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-12)


def test_all_weights_still_learn_under_autocast() -> None:
    """Weights that a teacher's pass cast to bfloat16 without a gradient must not be what the student uses."""
    net = nested(digit_net(), *ENTRIES)
    before = weights(net)
    step = by_hand(net, training_config(**STEP, kd_teacher="larger", amp_dtype="bfloat16"))
    step([digit_data()[0][0]], 1)
    still = [name for name, tensor in weights(net).items() if torch.equal(tensor, before[name])]
    assert still == []


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_resumed_run_has_the_same_teacher(tmp_path: Path, teacher: str) -> None:
    """Also if it is given the weights that the run had reached, in place of those it began with."""
    start = digit_net()
    run_training(start, training_config(kd_teacher=teacher), tmp_path / "whole")
    interrupted(tmp_path / "cut", kd_teacher=teacher)
    tensors, _ = read_checkpoint(checkpoint_files(tmp_path / "cut")[-1])
    reached = digit_net()
    reached.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    run_training(reached, training_config(kd_teacher=teacher), tmp_path / "cut", resume="auto")
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")
    kept = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("teacher.")}
    assert raw_bytes(kept) == ({} if teacher == "larger" else raw_bytes(digit_net().state_dict()))


def test_another_teacher_is_another_run(tmp_path: Path) -> None:
    interrupted(tmp_path, kd_teacher="original")
    with pytest.raises(ValueError, match="kd_teacher is larger, it was original"):
        run_training(digit_net(), training_config(kd_teacher="larger"), tmp_path, resume="auto")


def test_a_dry_run_counts_the_teacher() -> None:
    found = {
        teacher: dry_run(digit_net(), training_config(kd_teacher=teacher), images=64, console=QUIET)["state_bytes"]
        for teacher in (None, *TEACHERS)
    }
    weigh = sum(parameter.nbytes for parameter in digit_net().parameters())
    assert found["larger"] == found[None]
    assert found["original"] == found["both"] == found[None] + weigh


def test_a_teacher_adds_nothing_to_the_scores() -> None:
    """Importance follows the steps' backward passes, and a teacher has none; its share of the loss is tiny here."""
    sums = []
    for changes in ({}, {"kd_teacher": "larger", "task_loss_weight": 1 - 2**-40}):
        net = nested(digit_net(torch.float64), *ENTRIES)
        online = OnlineImportance(net)
        online.follow(True)
        images, labels = digit_data()[0][0]
        by_hand(net, training_config(**STEP | changes))([(images.double(), labels)], 2)
        sums.append(online.state())
    assert_close(*sums, 1e-9)


def test_finetuning_has_no_larger_entry() -> None:
    train, test, _ = digit_data()
    for teacher in ("larger", "both"):
        config = skd.finetune_config(epochs=1, batch_size=16, kd_teacher=teacher)
        with pytest.raises(ValueError, match=f"kd_teacher is '{teacher}'; a plain model has no larger entry"):
            skd.finetune(skd.extract(digit_net(), entry=0), train, test, config, console=QUIET)
    config = skd.finetune_config(epochs=1, batch_size=16, kd_teacher="original")
    skd.finetune(skd.extract(digit_net(), entry=0), train, test, config, console=QUIET)
