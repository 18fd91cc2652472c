"""A step as a CUDA graph, without a GPU, by fake_graphs.py."""

import io

import pytest
import torch
from fake_graphs import FakeGraphs, NoLooks
from helpers import assert_close, digit_data, digit_net, nested, run_training, training_config, weights
from rich.console import Console

import skd_kernels
from skd.training import state
from skd.training.capture import WARMUP, Capture
from skd.training.step import by_hand

NO_MIXING = {"mixup_prob": 0.0, "drop_path": 0.0}
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
    """Assert equality up to the rounding of the learning rate, which is a float32 tensor on the device."""
    assert_close(found[0], expected[0], 1e-6)
    assert found[1:] == (pytest.approx(expected[1], rel=1e-6), expected[2])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_grad": 0.1},
        {"sched_on_updates": True},
        {"model_ema": False},
        {"kd_teacher": "both"},  # another entry in every step, and another list
        {"model_ema_warmup": True},  # another decay in every step: the kept weights are the average
    ],
    ids=str,
)
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
    step = by_hand(net, training_config(**SETTINGS, cuda_graph=True))
    images, labels = digit_data()[0][0]
    with skd_kernels.use("reference"):
        for _ in range(WARMUP + 2):
            step([(images.double(), labels)], 1)
        nested(net, *rows)
        step([(images.double(), labels)], len(rows))
        step([(images.double(), labels)], 1)
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
    trained(True, torchcompile=True)
    assert graphs.replays > 5 and len(calls) == WARMUP + 1


def test_another_shape_is_refused(graphs):
    net = digit_net()
    step = by_hand(net, training_config(**SETTINGS | NO_MIXING, cuda_graph=True))
    images, labels = digit_data()[0][0]
    loss = step([(images, labels)], 0)
    assert loss.dtype == torch.float64  # as of steps that are not replayed: both go into one log
    with pytest.raises(
        ValueError, match=r"images of torch.float32 \(8, 1, 8, 8\) after torch.float32 \(16, 1, 8, 8\)"
    ):
        step([(images[:8], labels[:8])], 0)
    with pytest.raises(ValueError, match=r"targets of torch.int32"):
        step([(images, labels.int())], 0)


def test_automatically_another_shape_is_a_step_by_itself(graphs):
    """An epoch's last batch may be smaller: the graph is for the others, and every step is taken."""
    runs = []
    for cuda_graph in (False, None):
        net = digit_net(torch.float64)
        step = by_hand(net, training_config(**SETTINGS | NO_MIXING, cuda_graph=cuda_graph))
        with skd_kernels.use("reference"):
            for number in range(3 * WARMUP):
                images, labels = digit_data()[0][0]
                size = 8 if number % 3 == 2 else 16
                step([(images[:size].double(), labels[:size])], 0)
        runs.append(weights(net))
    assert_close(*runs, 1e-6)
    assert (graphs.captures, graphs.replays) == (1, 3)


def test_an_odd_first_batch_does_not_decide_for_which_size_the_graph_is(graphs):
    """As in a run that is resumed at the last, smaller batch of an epoch."""
    step = by_hand(digit_net(torch.float64), training_config(**SETTINGS | NO_MIXING, cuda_graph=None))
    images, labels = digit_data()[0][0]
    with skd_kernels.use("reference"):
        for size in (8, *[16] * (WARMUP + 5), 8):
            step([(images[:size].double(), labels[:size])], 0)
    assert graphs.captures == 1 and graphs.replays >= 3


def test_a_capture_knows_only_its_function(graphs):
    """Of any tensors, to any tensor; what it reads besides, and changes, is read and changed at every replay."""
    total, seen = torch.zeros(3), []

    def function(inputs):
        seen.append(None)
        total.add_(inputs["x"])
        return total * inputs["y"]

    capture = Capture(function, torch.device("cpu"))
    expected = torch.zeros(3)
    for number in range(WARMUP + 4):
        x = torch.full((3,), float(number))
        expected += x
        assert torch.equal(capture({"x": x, "y": torch.tensor(2.0 + number)}), expected * (2.0 + number))
        assert torch.equal(total, expected), "a capture takes no step of its own"
    assert (len(seen), graphs.replays) == (WARMUP + 1, 4)


@pytest.mark.parametrize("cuda_graph", [None, True, False])
def test_a_run_says_whether_it_replays_its_steps(graphs, cuda_graph):
    console = Console(file=io.StringIO(), width=200)
    run_training(digit_net(), training_config(**SETTINGS, cuda_graph=cuda_graph), console=console)
    assert ("every step is a replay of one CUDA graph" in console.file.getvalue()) is (cuda_graph is not False)
    assert (graphs.replays > 0) is (cuda_graph is not False)


def test_the_harness_sees_a_look_at_the_data():
    with pytest.raises(AssertionError, match="reads the device"), NoLooks():
        torch.ones(()).item()


def test_what_is_asked_for_comes_before_what_is_possible():
    """Off is off; on several ranks nothing is decided for the user."""
    net, gpu = digit_net(), torch.device("cuda")
    found = {
        (asked, many): state.refuses_graph(net, training_config(cuda_graph=asked), gpu, object() if many else None)
        for asked in (None, True, False)
        for many in (False, True)
    }
    assert [key for key, reason in found.items() if reason is None] == [(None, False), (True, False), (True, True)]
    assert found[False, False] == "cuda_graph is off" and "several ranks" in found[None, True]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, "not on a GPU"),
        ({"amp_dtype": "float16"}, "gradient scaler"),
        ({"grad_accum_steps": 2}, "grad_accum_steps"),
        ({"grad_checkpointing": True}, "grad_checkpointing"),
        ({"opt": "sgd"}, "opt is not adamw"),
        ({"decay": "expected"}, "expected"),
        ({"model_ema_warmup": True}, None),
    ],
)
def test_every_refusal_has_its_reason(changes, reason):
    config, net = training_config(**SETTINGS | changes), digit_net()
    found = state.refusal(net, config, torch.device("cuda" if changes else "cpu"))
    assert found is None if reason is None else reason in found
