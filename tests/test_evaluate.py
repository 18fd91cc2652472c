"""evaluate: exact counts, many entries in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_vit

import skd


def test_top1_is_a_count_over_all_images(model: Any, batches: Any) -> None:
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    correct = int((model(images).argmax(-1) == labels).sum())
    assert skd.evaluate(model, batches) == 100 * correct / len(labels)
    assert skd.evaluate(model, [(images[:3], labels[:3]), (images[3:], labels[3:])]) == 100 * correct / len(labels)


def test_entries_in_one_pass_are_the_entries_one_by_one(planned: skd.SuperNet, batches: Any) -> None:
    last = len(planned.dropout_list) - 1
    together = skd.evaluate(planned, iter(batches), entries=[last, 0, last])
    assert together == [skd.evaluate(planned, batches, entries=[entry])[0] for entry in (last, 0, last)]
    assert together[1] == skd.evaluate(planned, batches)
    assert together[0] == skd.evaluate(skd.extract(planned, entry=last), batches)


def test_without_labels_the_full_network_is_the_judge(planned: skd.SuperNet, batches: Any) -> None:
    unlabelled = [(images, None) for images, _ in batches]
    assert skd.evaluate(planned, unlabelled) == 100.0
    own = [(images, planned(images).argmax(-1)) for images, _ in batches]
    assert skd.evaluate(planned, unlabelled, entries=[5]) == skd.evaluate(planned, own, entries=[5])


@pytest.mark.parametrize("classes", [10, 0])
def test_what_is_not_a_number_is_not_correct(classes: int) -> None:
    """`argmax` takes NaN for the largest: of the first class, or of the first image."""
    model, images = tiny_vit(num_classes=classes), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    bad = [(torch.full_like(images, float("nan")), torch.zeros(1, dtype=torch.long)), (images, None)]
    assert skd.evaluate(model, bad) == 50.0
    (model.head if classes else model.norm).weight.data.fill_(float("nan"))
    assert skd.evaluate(model, bad) == 0.0


def test_training_mode_is_restored(planned: skd.SuperNet, batches: Any) -> None:
    skd.evaluate(planned.train(), batches)
    assert planned.training


def test_evaluate_rejects(planned: skd.SuperNet, model: Any, batches: Any) -> None:
    with pytest.raises(ValueError, match="entry is 999"):
        skd.evaluate(planned, batches, entries=[0, 999])
    with pytest.raises(ValueError, match="only a SuperNet"):
        skd.evaluate(model, batches, entries=[0])
    with pytest.raises(ValueError, match="has no batch"):
        skd.evaluate(model, [])
