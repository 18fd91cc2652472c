"""residual_norm's Triton kernels, interpreted on the CPU; test_residual_norm.py runs this in its own process.

The interpreter's device has three multiprocessors, so that the programs of the gradient kernel take several turns.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
from every_operation import Cases, Everywhere, check_alignment
from layouts import LAYOUTS
from norm_checks import NAMES, OF_A_BRANCH, OPTIONAL, PLAIN, Inputs, Norm, make_inputs
from operations import in_double, relative_error, run
from tolerances import UNIT_ROUNDOFF, kernel_tolerance

import skd_kernels as kernels
from skd_kernels.gpu import norm
from skd_kernels.gpu.launch import launch, watch
from skd_kernels.residual_norm import KINDS, residual_norm_backward, residual_norm_forward

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FIRST = ("branch", *OF_A_BRANCH)  # what the first norm of a network is without


def in_training(shape: tuple[int, int, int], kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Norm:
    return Norm(shape, kind=kind, dtype=dtype, mixed=True, **options)


def of_kinds(one: str, other: str) -> Cases:
    """Problems of every size, by the one kind of norm or the other."""
    return {
        "any number of channels": [
            (problem, None)
            for channels in (13, 130, 2500)
            for problem in (
                Norm((1, 3, channels), kind=one),
                in_training((1, 3, channels), other, without=OF_A_BRANCH),
            )
        ]
        + [(Norm((2, 3, 4096), kind=one), None)],
        "any number of tokens": [
            (problem, None)
            for images, tokens in ((1, 1), (5, 1), (3, 11))
            for problem in (
                Norm((images, tokens, 24), kind=one),
                in_training((images, tokens, 200), other, torch.float16),
            )
        ],
        "few tokens of the sum": [
            (Norm(shape, kind=kind, without=without, sum_tokens=tokens), None)
            for shape, tokens in (((3, 25, 72), 1), ((2, 11, 24), 10))
            for kind, without in ((one, ()), (other, FIRST))
        ],
        "a width of zero": [
            (problem, width)
            for width in (0, -1)
            for problem in (Norm((2, 9, 72), kind=one), in_training((2, 9, 72), other))
        ],
    }


class TestNorm(Everywhere):
    repeated = Norm((2, 25, 40)), (3, 0)
    compiled = in_training((2, 5, 24), "layer"), in_training((2, 5, 24), "rms", without=FIRST)
    controls = (3, 0)
    cases: ClassVar[Cases] = {
        # 192 channels fill three quarters of the tile; 150 rows are several turns of a program, the last cut short.
        "everything at once": [
            (Norm((3, 50, 192)), None),
            *((Norm((1, 9, 192), kind=kind, dtype=dtype), None) for kind in KINDS for dtype in DTYPES),
            *((in_training((1, 9, 192), kind, dtype), None) for kind in KINDS for dtype in DTYPES[1:]),
        ],
        "whatever is left out": [
            (Norm((2, 4, 72), kind=kind, without=without), None)
            for count in (1, len(OPTIONAL))
            for without in itertools.combinations(OPTIONAL, count)
            for kind in KINDS
            if "branch" not in without or set(OF_A_BRANCH) <= set(without)
        ],
        **of_kinds("layer", "rms"),
    }
    slow: ClassVar[Cases] = of_kinds("rms", "layer")


def grads_of(shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


def results(name: str, inputs: Inputs, kind: str, grads: Any, **options: Any) -> dict[str, Any]:
    """sum, normed and the gradients, of inputs that a test has changed."""
    there = {key: value for key, value in inputs.items() if value is not None}
    return run(Norm(inputs["x"].shape, kind=kind), name, there, None, grads, **options)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_so_few_channels_that_most_of_a_gradient_cancels(kind: str, channels: int) -> None:
    """What is left of it is as far off as the terms were rounded; of one channel, nothing is left."""
    inputs, grads = make_inputs((2, 9, channels)), grads_of((2, 9, channels))
    exact = in_double(inputs)
    expected = results("reference", exact, kind, grads)
    for name, got in results("triton", inputs, kind, grads).items():
        torch.testing.assert_close(got.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 100.0, 3000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_far_above_the_deviation(kind: str, mean: float) -> None:
    """A variance as the difference of two large numbers would be all wrong: the square of 3000 is 2^23 and more.

    What is left is the rounding of the mean itself, as large as one of an element: it moves every centred element by
    up to `mean` roundings, where those deviate by 1.
    """
    inputs = make_inputs((2, 20, 96), without=FIRST)
    inputs["x"] += mean
    grads = grads_of((2, 20, 96))
    exact = in_double(inputs)
    expected, plain = results("reference", exact, kind, grads), results("reference", inputs, kind, grads)
    for name, got in results("triton", inputs, kind, grads).items():
        other, moved = relative_error(plain[name], expected[name]), 2 * mean * UNIT_ROUNDOFF[torch.float32]
        tolerance = kernel_tolerance(other, torch.float32, terms=96) + (moved if kind == "layer" else 0)
        assert relative_error(got, expected[name]) <= tolerance, name


def test_rows_without_deviation_are_ruled_by_eps() -> None:
    inputs = make_inputs((1, 4, 40), without=FIRST)
    inputs["x"] = torch.full((1, 4, 40), 2.0)
    grads = grads_of((1, 4, 40))
    found, expected = (results(name, inputs, "layer", grads) for name in ("triton", "reference"))
    assert torch.equal(found["normed"], inputs["bias"].expand(1, 4, 40))
    for name, got in found.items():
        torch.testing.assert_close(got, expected[name])


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["x", "branch", "grad of sum", "grad of normed"])
def test_nan_and_inf_pass_and_stay_in_their_row(where: str, bad: float, kind: str) -> None:
    """Also through a mask of zero, which multiplies: image 1 is dropped."""
    inputs, grads = make_inputs((2, 5, 24)), grads_of((2, 5, 24))
    target = grads[where == "grad of normed"] if "grad" in where else inputs[where]
    target[1, 3, 7] = bad
    found, expected = (results(name, inputs, kind, grads) for name in ("triton", "reference"))
    for name, got in found.items():
        assert torch.equal(got.isfinite(), expected[name].isfinite()), name
    assert not all(got.isfinite().all() for got in found.values())
    others = torch.ones(2, 5, dtype=torch.bool)
    others[1, 3] = False
    assert all(found[name][others].isfinite().all() for name in ("sum", "normed", "x", "branch"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Also of the gradients; whatever tensors are parts of, kernels get rows without gaps from 16 bytes on."""
    lay_out = LAYOUTS[layout]
    inputs = make_inputs((2, 5, 48))
    inputs = {name: lay_out(value) if value.ndim > 1 else value for name, value in inputs.items()}
    column = torch.stack([inputs["weight"], torch.full((48,), torch.nan)], 1)[:, 0]
    inputs |= {"weight": column, "bias": inputs["bias"][:1].expand(48)}
    grads = [lay_out(grad) for grad in grads_of((2, 5, 48))]
    with watch(check_alignment):
        found, expected = (results(name, inputs, "layer", grads) for name in ("triton", "reference"))
    for name, got in found.items():
        torch.testing.assert_close(got, expected[name])


def test_only_one_output_is_read() -> None:
    """The sum at the end of a network, or the normalised output alone, which no later layer adds to."""
    inputs, (dsum, dnormed) = make_inputs((2, 5, 40)), grads_of((2, 5, 40))
    for kind, grads in itertools.product(KINDS, ((dsum, None), (None, dnormed))):
        found, expected = (results(name, inputs, kind, grads) for name in ("triton", "reference"))
        for name, want in expected.items():
            if want is None:
                assert found[name] is None and name in ("weight", "bias")
            else:
                torch.testing.assert_close(found[name], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [0, -1])
def test_a_width_of_zero_leaves_the_branch_out(width: int, kind: str) -> None:
    """Its bias too, whatever is in both, and the gradients of both and of scale are exact zeros."""
    inputs, grads = make_inputs((2, 9, 72), width=width), grads_of((2, 9, 72))
    inputs["branch"], inputs["branch_bias"] = torch.full((2, 9, 72), torch.nan), torch.full((72,), torch.inf)
    expected = results("reference", inputs | dict.fromkeys(FIRST), kind, grads)
    for name in ("triton", "reference"):
        found = results(name, inputs, kind, grads)
        for key in ("branch", "scale", "branch_bias"):
            assert torch.equal(found.pop(key), torch.zeros_like(inputs[key])), (name, key)
        for key, got in found.items():
            torch.testing.assert_close(got, expected[key])


def test_the_second_stage_takes_several_turns() -> None:
    """As on a GPU, whose hundreds of programs leave their sums; here 38 have, and the last turn is short."""
    sums, found = torch.randn(2, 38, 72), torch.full((2, 72), torch.nan)
    arguments: dict[str, Any] = {"sums": sums, "first": found[0], "second": found[1], "third": None, "fourth": None}
    arguments |= {"programs": 38, "COLUMNS": 72, "BLOCK_M": 16, "BLOCK_N": 32}
    launch(norm.residual_norm_sums_kernel, (3, 2), arguments, num_warps=8, num_stages=1)
    torch.testing.assert_close(found, sums.sum(1))


@pytest.mark.parametrize("count", [1, 2, len(NAMES) - 1])
def test_only_what_is_asked_for_is_computed(count: int, launched: list[tuple[str, Any]]) -> None:
    inputs, grads = make_inputs((2, 5, 24)), grads_of((2, 5, 24))
    everything = results("triton", inputs, "layer", grads)
    for wanted in itertools.combinations(NAMES, count):
        launched.clear()
        found = results("triton", inputs, "layer", grads, wanted=wanted)
        assert set(found) == {"sum", "normed", *wanted}
        for name, got in found.items():
            torch.testing.assert_close(got, everything[name])
        sums = {"WEIGHT": "weight", "BIAS": "bias", "SCALE": "scale", "BRANCH": "branch_bias"}
        _, gradient, *second_stage = (arguments for _, arguments in launched)
        assert (gradient["dx"] is None, gradient["dbranch"] is None) == ("x" not in wanted, "branch" not in wanted)
        assert all(gradient[flag] == (name in wanted) for flag, name in sums.items())
        assert (gradient["branch"] is None) == ("scale" not in wanted)
        assert gradient["INPUTS"] == bool({"x", "branch", "scale", "branch_bias"} & set(wanted))
        assert len(second_stage) == bool(set(sums.values()) & set(wanted))


def test_equal_gradients_of_the_two_streams_are_written_once(launched: list[tuple[str, Any]]) -> None:
    grads = grads_of((2, 5, 24))
    for kept in ("scale", "mask", "branch_width", "branch_bias"):
        without, once = {"scale", "mask", "branch_width"} - {kept}, kept == "branch_bias"
        launched.clear()
        found = results("triton", make_inputs((2, 5, 24), without=without), "layer", grads)
        assert (launched[1][1]["dbranch"] is None) == once
        assert torch.equal(found["x"], found["branch"]) == (once or kept == "branch_width")


def test_what_is_kept_for_the_backward_pass() -> None:
    """The sum, which the next norm keeps too, and not the branch, unless the gradient of scale needs it."""
    inputs = make_inputs((2, 5, 24))
    for wanted in (("x", "weight"), ("x", "scale")):
        leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
        with kernels.use("triton"):
            total, _ = kernels.residual_norm(**leaves, eps=1e-6)
        kept = [tensor.data_ptr() for tensor in total.grad_fn.saved_tensors if tensor is not None]
        assert total.data_ptr() in kept and leaves["x"].data_ptr() not in kept
        assert (leaves["branch"].data_ptr() in kept) == ("scale" in wanted)
    with torch.no_grad(), kernels.use("triton"):
        assert kernels.residual_norm(**leaves, eps=1e-6)[0].grad_fn is None


@pytest.mark.parametrize("kind", KINDS)
def test_column_sums_without_a_branch_bias(kind: str) -> None:
    """A layer that knows its own bias asks the operator for the sums of the branch's gradient over tokens."""
    inputs = make_inputs((2, 30, 72), without=("branch_bias", "branch_width"))
    dsum, dnormed = grads_of((2, 30, 72))
    x, branch, weight, scale, mask = (inputs[name] for name in ("x", "branch", "weight", "scale", "mask"))
    total, _, _, mean, rstd = residual_norm_forward(
        x, branch, weight, None, scale, mask, None, None, 1e-6, kind == "layer", torch.float32, None
    )
    dtypes, needs = (torch.float32, torch.bfloat16), [False, True, False, False, False, True]
    _, dbranch, *_, sums = residual_norm_backward(
        dsum, dnormed, total, None, weight, scale, mask, None, None, mean, rstd, *dtypes, needs
    )
    exact = in_double(inputs)
    expected = results("reference", exact, kind, (dsum, dnormed))["branch"]
    assert dbranch.dtype == torch.bfloat16 and sums.dtype == torch.float32
    assert relative_error(dbranch, expected) <= UNIT_ROUNDOFF[torch.bfloat16]
    assert relative_error(sums, expected.sum((0, 1))) <= kernel_tolerance(0, torch.float32, terms=60)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_library_accepts_the_operators(kind: str) -> None:
    inputs = make_inputs((2, 3, 20), torch.bfloat16, stream=torch.float32)
    layer, order = kind == "layer", ("x", *OPTIONAL)
    leaves = [inputs[name].requires_grad_(name not in PLAIN) for name in order]
    torch.library.opcheck(residual_norm_forward, (*leaves, 1e-6, layer, torch.bfloat16, None))
    torch.library.opcheck(residual_norm_forward, (leaves[0], *[None] * 7, 1e-6, layer, torch.float32, 2))
    vectors = [leaf.detach() for leaf in leaves]
    _, branch, weight, _, scale, mask, branch_bias, width = vectors
    total, first, normed, mean, rstd = residual_norm_forward(*vectors, 1e-6, layer, torch.bfloat16, 1)
    read = total, branch, weight, scale, mask, branch_bias, width, mean, rstd, torch.float32, torch.bfloat16
    for needs in ([True] * 6, [False, True, True, False, False, False]):
        torch.library.opcheck(residual_norm_backward, (total, normed, *read, needs))
    torch.library.opcheck(residual_norm_backward, (first, None, *read, [True, True, False, False, False, False]))


def test_the_first_norm_adds_both_gradients_of_x(launched: list[tuple[str, Any]]) -> None:
    """That of the stream reaches its kernel, in one call, and x is not copied."""
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 24), (24,)))
    with kernels.use("triton"):
        total, normed = kernels.residual_norm(x, None, weight, None, eps=1e-6)
    assert total.data_ptr() == x.data_ptr()
    launched.clear()
    torch.autograd.backward((total, normed), grads_of((2, 5, 24)))
    assert [name for name, _ in launched] == ["residual_norm_gradient_kernel", "residual_norm_sums_kernel"]
    assert launched[0][1]["dtotal"] is not None and torch.equal(launched[0][1]["dx"], x.grad)


def test_a_chain_of_norms_is_a_residual_stream() -> None:
    """Three of them, the first without a branch, linear layers in between: gradients are those of the reference."""
    generator = torch.Generator().manual_seed(0)
    x, w1, w2, w3 = (torch.randn(s, generator=generator) for s in ((2, 5, 24), (24, 24), (24, 24), (24,)))
    results = []
    for name in ("triton", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, w2, w3)]
        with kernels.use(name):
            total, normed = kernels.residual_norm(leaves[0], None, leaves[3], None, eps=1e-6)
            for weight in leaves[1:3]:
                branch = torch.nn.functional.linear(normed, weight / 24**0.5)
                total, normed = kernels.residual_norm(total, branch, leaves[3], None, eps=1e-6)
        loss = normed.pow(3).sum() + total.square().sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-5)
