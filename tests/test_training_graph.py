"""`StepGraph` without a GPU, by fake_graphs.py."""

import pytest
import torch
from fake_graphs import FakeGraphs, NoLooks
from helpers import QUIET, assert_close, digit_data, digit_net, nested, run_training, training_config, weights

import skd_kernels
from skd.training.graph import WARMUP, refusal
from skd.training.screen import Screen
from skd.training.trainer import Trainer

SETTINGS = {"model_ema": True, "model_ema_warmup": False, "model_ema_decay": 0.9, "drop_path": 0.3, "opt": "adamw"}


@pytest.fixture
def graphs(monkeypatch):
    return FakeGraphs(monkeypatch)


def trained(cuda_graph, net=None, **changes):
    net = digit_net(torch.float64) if net is None else net
    config = training_config(**SETTINGS | changes, cuda_graph=cuda_graph)
    with skd_kernels.use("reference"):
        history = run_training(net, config)
    return weights(net), [row["loss"] for row in history.epochs], history.epochs[-1]["step"]


def assert_same(found, expected):
    """To the rounding of the learning rate, which is a float32 tensor on the device."""
    assert_close(found[0], expected[0], 1e-6)
    assert found[1:] == (pytest.approx(expected[1], rel=1e-6), expected[2])


@pytest.mark.parametrize("changes", [{}, {"clip_grad": 0.1}, {"sched_on_updates": True}, {"model_ema": False}])
def test_replayed_steps_are_the_eager_ones(graphs, changes):
    """While the dropout list grows and the learning rate moves; and one capture serves them all."""
    eager, replayed = trained(False, **changes), trained(True, **changes)
    assert_same(replayed, eager)
    assert graphs.captures == 1 and graphs.replays == replayed[2] - WARMUP > 5 and graphs.released == 1


def test_a_list_beyond_the_table_is_captured_anew(graphs):
    """More entries than groups: the table is another one, which the old graph does not read."""
    rows = [[16, 24, 16, 24 - i] for i in range(1, 24)] + [[16, 24, 16 - i, 1] for i in range(1, 15)]
    rows += [[16, 24 - i, 1, 1] for i in range(1, 24)]
    net = nested(digit_net(torch.float64), *rows[:1])
    assert len(net.width_table) < len(rows)
    supernet = Trainer(net, [], None, training_config(**SETTINGS, cuda_graph=True), (), None, Screen(QUIET))
    step = supernet.graph
    images, labels = digit_data()[0][0]
    inputs = {"images": images.double(), "targets": labels, "entry": torch.tensor(1)}
    with skd_kernels.use("reference"):
        for _ in range(WARMUP + 2):
            step(inputs)
        nested(net, *rows)
        step(inputs | {"entry": torch.tensor(len(rows))})
        step(inputs)
    assert graphs.captures == 2


def test_other_kernels_take_a_step_before_they_are_captured(graphs):
    """Scores are followed in the first epoch only: what computes without them is compiled outside of a capture."""
    eager, replayed = (trained(on, importance="online") for on in (False, True))
    assert_same(replayed, eager)
    assert graphs.captures == 2 and graphs.replays == replayed[2] - WARMUP - 1


def test_a_failed_capture_goes_on_one_by_one(graphs):
    """Saying why, to the same weights."""
    eager = trained(False)
    graphs.error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
    with pytest.warns(UserWarning, match="the capture failed: CUDA error: operation not permitted") as caught:
        assert_same(trained(True), eager)
    assert len([w for w in caught if "the capture failed" in str(w.message)]) == 1
    assert graphs.replays == 0


def test_what_is_captured_is_the_compiled_network(graphs, monkeypatch):
    calls = []

    def compiled(net):
        return lambda *arguments, **named: calls.append(None) or net(*arguments, **named)

    monkeypatch.setattr(torch, "compile", compiled)
    *_, steps = trained(True, torchcompile=True)
    assert graphs.replays > 5 and len(calls) == steps


def test_another_shape_is_refused(graphs):
    net = digit_net()
    step = Trainer(net, [], None, training_config(**SETTINGS, cuda_graph=True), (), None, Screen(QUIET)).graph
    images, labels = digit_data()[0][0]
    loss = step({"images": images, "targets": labels, "entry": torch.tensor(0)})
    assert loss.dtype == torch.float64  # as of steps that are not replayed: both go into one log
    with pytest.raises(
        ValueError, match=r"images of torch.float32 \(8, 1, 8, 8\) after torch.float32 \(16, 1, 8, 8\)"
    ):
        step({"images": images[:8], "targets": labels[:8], "entry": torch.tensor(0)})
    with pytest.raises(ValueError, match=r"targets of torch.float32"):
        step({"images": images, "targets": labels.float(), "entry": torch.tensor(0)})


def test_the_harness_sees_a_look_at_the_data():
    with pytest.raises(AssertionError, match="reads the device"), NoLooks():
        torch.ones(()).item()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, "not on a GPU"),
        ({"amp_dtype": "float16"}, "gradient scaler"),
        ({"grad_accum_steps": 2}, "grad_accum_steps"),
        ({"grad_checkpointing": True}, "grad_checkpointing"),
        ({"opt": "sgd"}, "opt is not adamw"),
        ({"decay": "expected"}, "expected"),
        ({"model_ema_warmup": True}, "model_ema_warmup"),
    ],
)
def test_every_refusal_has_its_reason(changes, reason):
    config = training_config(**SETTINGS | changes)
    run = Trainer(digit_net(), [], None, config, (), None, Screen(QUIET))
    if changes:
        assert "not on a GPU" in refusal(run)
        run.device = torch.device("cuda")
    assert reason in refusal(run)
