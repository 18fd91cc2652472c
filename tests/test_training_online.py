"""importance="online": scores of the training steps in place of extra passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_outcome,
    digit_data,
    digit_net,
    interrupted,
    run_training,
    tiny_vit,
    training_config,
)

import skd
from skd.training.decay import inclusion
from skd.training.online import OnlineImportance

ONLINE = {"importance": "online", "progressive_epochs": 3}


def test_scores_are_those_of_the_steps() -> None:
    """One step on the full network, without decay of any kind: what skd.importance sums with the same cost."""
    net = digit_net(torch.float64)
    net.dropout_list = skd.plan(net, digit_data()[2], rounds=1)
    online = OnlineImportance(net)
    online.follow(True)
    images, labels = digit_data()[0][0]
    logits = net(images.double(), entry=len(net.dropout_list) - 1)
    logits.gather(1, labels[:, None]).sum().backward()  # the cost of skd.importance
    online.steps += 1
    expected, _ = skd.importance(net, [(images, labels)])
    proposal = online.propose("full")
    for name, scores in expected.items():
        np.testing.assert_allclose(proposal.scores[name], scores, rtol=1e-10)
    assert online.steps == 0 and all(float(buffer.abs().sum()) == 0 for buffer in online.buffers)


def test_every_entry_includes_the_coordinates_that_are_read() -> None:
    """So their inclusion probability, by which sums would be divided, is 1."""
    net = digit_net()
    net.dropout_list = skd.plan(net, digit_data()[2], rounds=2)
    for index, (info, width) in enumerate(zip(net.infos, net.widths(len(net.dropout_list) - 1), strict=True)):
        shares = inclusion(net.dropout_list, index, info.full_width)
        assert (shares[:width] == 1).all() and (shares[width:] < 1).all()


def test_modules_are_compared_by_their_totals() -> None:
    net = digit_net(torch.float64)
    online = OnlineImportance(net)
    for buffer in online.buffers:
        buffer.fill_(2.0)
    proposal = online.propose("full")
    widths = dict(zip(net.modules_in_order, net.widths(), strict=True))
    for info in net.infos:
        np.testing.assert_array_equal(proposal.scores[info.name], 6.0 if info.kind == "attn" else 2.0)
    totals = {name: width * (6 if "attn" in name else 2) for name, width in widths.items()}
    assert proposal.sensitivity == pytest.approx({name: t / max(totals.values()) for name, t in totals.items()})


def test_only_the_first_round_reads_calibration_images() -> None:
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    passes = {}
    for importance in ("passes", "online"):
        calibration = Counted(digit_data()[2])
        net = digit_net()
        history = run_training(
            net, training_config(**{**ONLINE, "planner": "paper", "importance": importance}), calibration=calibration
        )
        passes[importance] = calibration.passes
        assert net.scores is None, "nothing is followed after the run"
        assert [row["entries"] for row in history.epochs] == sorted({row["entries"] for row in history.epochs})
    assert passes == {"passes": 3, "online": 1}


@pytest.mark.parametrize("at", [2, 6, 9])
def test_a_resumed_run_is_the_same(tmp_path, at: int) -> None:
    run_training(digit_net(), training_config(**ONLINE), tmp_path / "whole")
    interrupted(tmp_path / "stopped", at, **ONLINE)
    run_training(digit_net(), training_config(**ONLINE), tmp_path / "stopped", resume="auto")
    assert_same_outcome(tmp_path / "stopped", tmp_path / "whole")


def test_with_activation_checkpointing_scores_count_once() -> None:
    lists = []
    for again in (False, True):
        net = digit_net(torch.float64)
        run_training(net, training_config(**ONLINE, grad_checkpointing=again))
        lists.append(net.dropout_list.to_json())
    assert lists[0] == lists[1]


def test_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="importance is 'sometimes'"):
        training_config(importance="sometimes")
    with pytest.raises(ValueError, match="takes only the widths 0 and full"):
        OnlineImportance(skd.SuperNet(tiny_vit(qk_norm=True)))
    with pytest.raises(ValueError, match="loss scale"):
        run_training(digit_net(), training_config(**ONLINE, amp_dtype="float16"))
