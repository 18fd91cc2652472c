"""torchcompile: the whole run compiles its network once, and trains what it trains without."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, digit_net, run_training, training_config
from torch._dynamo.utils import counters

from skd.training.step import by_hand


def test_a_cpu_is_warned() -> None:
    """Widths are tensors inside the graph, which the reference masks: nothing gets smaller."""
    with pytest.warns(UserWarning, match="torchcompile: on a CPU each compiled step does the full network's work"):
        by_hand(digit_net(), training_config(torchcompile=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"grad_accum_steps": 2}, {"importance": "online", "progressive_epochs": 3}, {"kd_teacher": "both"}],
    ids=str,
)
def test_one_compilation_for_all_entries(changes: dict) -> None:
    settings = {"mixup": 0.0, "cutmix": 0.0, "model_ema": False, **changes}
    plain, compiled = digit_net(torch.float64), digit_net(torch.float64)
    history = run_training(plain, training_config(**settings))
    torch._dynamo.reset()
    counters.clear()
    found = run_training(compiled, training_config(torchcompile=True, **settings))
    # One with scores, while the list grows, and one without; one of each teacher.
    assert counters["stats"]["unique_graphs"] == (
        2 if "importance" in changes else 3 if "kd_teacher" in changes else 1
    )
    assert not counters["graph_break"]
    assert len(compiled.dropout_list) > 2
    assert_close(compiled.state_dict(), plain.state_dict(), 1e-9)
    assert [row["curve"] for row in found.epochs] == [row["curve"] for row in history.epochs]
    seconds = [row["seconds"] for row in found.epochs]
    assert "compile" in seconds[0] and not any("compile" in row for row in seconds[1:])
