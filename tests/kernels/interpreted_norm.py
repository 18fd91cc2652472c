"""residual_norm's Triton kernels, interpreted on the CPU; test_residual_norm.py runs this in its own process.

The interpreter's device has three multiprocessors, so that the programs of the gradient kernel take several turns.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layouts import LAYOUTS
from mlp_checks import relative_error
from norm_checks import NAMES, OF_A_BRANCH, OPTIONAL, PLAIN, check, in_double, make_inputs, run
from tolerances import UNIT_ROUNDOFF, kernel_tolerance
from watched_launches import check_alignment, watch

import skd_kernels as kernels
from skd_kernels.gpu import norm
from skd_kernels.residual_norm import KINDS, residual_norm_backward, residual_norm_forward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FIRST = ("branch", *OF_A_BRANCH)  # what the first norm of a network is without
ERRORS: dict[str, list[float]] = {}


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """Where SKD_ERRORS names a file, the largest errors found go there, for a table."""
    yield
    if "SKD_ERRORS" in os.environ:
        with open(os.environ["SKD_ERRORS"], "w") as file:
            json.dump(ERRORS, file)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that the operation makes is born full of NaN; the interpreter makes empty ones of integers."""
    make = torch.Tensor.new_empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def verify(dtype: torch.dtype, shape: tuple[int, int, int], kind: str, **options: Any) -> None:
    for name, (error, plain) in check(dtype, shape, kind, **options).items():
        if shape[-1] >= 64:  # of fewer channels the error is a matter of luck
            largest = ERRORS.setdefault(f"{dtype} {name}", [0.0, 0.0])
            largest[:] = max(largest[0], error), max(largest[1], plain)


def grads_of(shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


@pytest.mark.parametrize(
    ("dtype", "mixed"), [*((dtype, False) for dtype in DTYPES), *((dtype, True) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_at_once(kind: str, dtype: torch.dtype, mixed: bool) -> None:
    """192 channels fill three quarters of the tile; 150 rows are several turns of a program, the last cut short."""
    verify(dtype, (3, 50, 192), kind, mixed=mixed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", range(1, len(OPTIONAL) + 1))
def test_whatever_is_left_out(count: int, kind: str) -> None:
    for without in itertools.combinations(OPTIONAL, count):
        if "branch" not in without or set(OF_A_BRANCH) <= set(without):
            verify(torch.float32, (2, 4, 72), kind, without=without)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_so_few_channels_that_most_of_a_gradient_cancels(kind: str, channels: int) -> None:
    """What is left of it is as far off as the terms were rounded; of one channel, nothing is left."""
    inputs, grads = make_inputs((2, 9, channels)), grads_of((2, 9, channels))
    exact = in_double(inputs)
    expected = run("reference", exact, kind, grads)
    for name, got in run("triton", inputs, kind, grads).items():
        torch.testing.assert_close(got.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [13, 16, 45, 128, 130, 257, 768, 1152, 2048, 2500, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_channels(kind: str, channels: int) -> None:
    verify(torch.float32, (2, 3, channels), kind)
    verify(torch.bfloat16, (1, 3, channels), kind, mixed=True, without=OF_A_BRANCH)


@pytest.mark.parametrize(("images", "tokens"), [(1, 1), (1, 2), (5, 1), (1, 97), (7, 31)])
def test_any_number_of_tokens(images: int, tokens: int) -> None:
    for kind in KINDS:
        verify(torch.float32, (images, tokens, 24), kind)
        verify(torch.float16, (images, tokens, 200), kind, mixed=True)


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
    expected, plain = run("reference", exact, kind, grads), run("reference", inputs, kind, grads)
    for name, got in run("triton", inputs, kind, grads).items():
        other, moved = relative_error(plain[name], expected[name]), 2 * mean * UNIT_ROUNDOFF[torch.float32]
        tolerance = kernel_tolerance(other, torch.float32, terms=96) + (moved if kind == "layer" else 0)
        assert relative_error(got, expected[name]) <= tolerance, name


def test_rows_without_deviation_are_ruled_by_eps() -> None:
    inputs = make_inputs((1, 4, 40), without=FIRST)
    inputs["x"] = torch.full((1, 4, 40), 2.0)
    grads = grads_of((1, 4, 40))
    found, expected = (run(name, inputs, "layer", grads) for name in ("triton", "reference"))
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
    found, expected = (run(name, inputs, kind, grads) for name in ("triton", "reference"))
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
        found, expected = (run(name, inputs, "layer", grads) for name in ("triton", "reference"))
    for name, got in found.items():
        torch.testing.assert_close(got, expected[name])


def test_only_one_output_is_read() -> None:
    """The sum at the end of a network, or the normalised output alone, which no later layer adds to."""
    inputs, (dsum, dnormed) = make_inputs((2, 5, 40)), grads_of((2, 5, 40))
    for kind, grads in itertools.product(KINDS, ((dsum, None), (None, dnormed))):
        found, expected = (run(name, inputs, kind, grads) for name in ("triton", "reference"))
        for name, want in expected.items():
            if want is None:
                assert found[name] is None and name in ("weight", "bias")
            else:
                torch.testing.assert_close(found[name], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [0, -1])
def test_a_width_of_zero_leaves_the_branch_out(width: int, kind: str) -> None:
    """Its bias too, whatever is in both, and the gradients of both and of scale are exact zeros."""
    verify(torch.float32, (2, 9, 72), kind, width=width)
    verify(torch.bfloat16, (2, 9, 72), kind, width=width, mixed=True)
    inputs, grads = make_inputs((2, 9, 72), width=width), grads_of((2, 9, 72))
    inputs["branch"], inputs["branch_bias"] = torch.full((2, 9, 72), torch.nan), torch.full((72,), torch.inf)
    expected = run("reference", inputs | dict.fromkeys(FIRST), kind, grads)
    for name in ("triton", "reference"):
        found = run(name, inputs, kind, grads)
        for key in ("branch", "scale", "branch_bias"):
            assert torch.equal(found.pop(key), torch.zeros_like(inputs[key])), (name, key)
        for key, got in found.items():
            torch.testing.assert_close(got, expected[key])


@pytest.mark.parametrize("width", [0, 1])
def test_widths_of_either_integer_type(width: int) -> None:
    inputs, grads = make_inputs((2, 5, 24), width=width), grads_of((2, 5, 24))
    found = run("triton", inputs, "layer", grads)
    for key, got in run("triton", inputs | {"branch_width": torch.tensor(width)}, "layer", grads).items():
        assert torch.equal(got, found[key])


def test_runs_repeat_to_the_bit() -> None:
    inputs, grads = make_inputs((3, 70, 72)), grads_of((3, 70, 72))
    first, again = (run("triton", inputs, "layer", grads) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_second_stage_takes_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose hundreds of programs leave their sums; here 38 programs do, the last turn is short."""
    monkeypatch.setattr(norm, "ROW_TILE", 16)
    verify(torch.float32, (3, 50, 72), "layer")
    verify(torch.bfloat16, (3, 50, 72), "rms", mixed=True, without=("scale",))


@pytest.fixture
def launched() -> Iterator[list[dict[str, Any]]]:
    """The arguments of the kernels that are started, with their names."""
    found: list[dict[str, Any]] = []
    with watch(lambda name, arguments: found.append({"kernel": name, **arguments})):
        yield found


@pytest.mark.parametrize("count", range(1, len(NAMES)))
def test_only_what_is_asked_for_is_computed(count: int, launched: list[dict[str, Any]]) -> None:
    inputs, grads = make_inputs((2, 5, 24)), grads_of((2, 5, 24))
    everything = run("triton", inputs, "layer", grads)
    for wanted in itertools.combinations(NAMES, count):
        launched.clear()
        found = run("triton", inputs, "layer", grads, wanted=wanted)
        assert set(found) == {"sum", "normed", *wanted}
        for name, got in found.items():
            torch.testing.assert_close(got, everything[name])
        sums = {"WEIGHT": "weight", "BIAS": "bias", "SCALE": "scale", "BRANCH": "branch_bias"}
        _, gradient, *second_stage = launched
        assert (gradient["dx"] is None, gradient["dbranch"] is None) == ("x" not in wanted, "branch" not in wanted)
        assert all(gradient[flag] == (name in wanted) for flag, name in sums.items())
        assert (gradient["branch"] is None) == ("scale" not in wanted)
        assert gradient["INPUTS"] == bool({"x", "branch", "scale", "branch_bias"} & set(wanted))
        assert len(second_stage) == bool(set(sums.values()) & set(wanted))


def test_equal_gradients_of_the_two_streams_are_written_once(launched: list[dict[str, Any]]) -> None:
    grads = grads_of((2, 5, 24))
    for kept in ("scale", "mask", "branch_width", "branch_bias"):
        without, once = {"scale", "mask", "branch_width"} - {kept}, kept == "branch_bias"
        launched.clear()
        found = run("triton", make_inputs((2, 5, 24), without=without), "layer", grads)
        assert (launched[1]["dbranch"] is None) == once
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
    total, _, mean, rstd = residual_norm_forward(
        x, branch, weight, None, scale, mask, None, None, 1e-6, kind == "layer", torch.float32
    )
    dtypes, needs = (torch.float32, torch.bfloat16), [False, True, False, False, False, True]
    _, dbranch, *_, sums = residual_norm_backward(
        dsum, dnormed, total, None, weight, scale, mask, None, None, mean, rstd, *dtypes, needs
    )
    exact = in_double(inputs)
    expected = run("reference", exact, kind, (dsum, dnormed))["branch"]
    assert dbranch.dtype == torch.bfloat16 and sums.dtype == torch.float32
    assert relative_error(dbranch, expected) <= UNIT_ROUNDOFF[torch.bfloat16]
    assert relative_error(sums, expected.sum((0, 1))) <= kernel_tolerance(0, torch.float32, terms=60)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_library_accepts_the_operators(kind: str) -> None:
    inputs = make_inputs((2, 3, 20), torch.bfloat16, stream=torch.float32)
    layer, order = kind == "layer", ("x", *OPTIONAL)
    leaves = [inputs[name].requires_grad_(name not in PLAIN) for name in order]
    torch.library.opcheck(residual_norm_forward, (*leaves, 1e-6, layer, torch.bfloat16))
    torch.library.opcheck(residual_norm_forward, (leaves[0], *[None] * 7, 1e-6, layer, torch.float32))
    vectors = [leaf.detach() for leaf in leaves]
    _, branch, weight, _, scale, mask, branch_bias, width = vectors
    total, normed, mean, rstd = residual_norm_forward(*vectors, 1e-6, layer, torch.bfloat16)
    read = total, branch, weight, scale, mask, branch_bias, width, mean, rstd, torch.float32, torch.bfloat16
    for needs in ([True] * 6, [False, True, True, False, False, False]):
        torch.library.opcheck(residual_norm_backward, (total, normed, *read, needs))
    torch.library.opcheck(residual_norm_backward, (total, None, *read, [True, True, False, False, False, False]))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_is_compiled_and_gives_the_same(kind: str, first: bool) -> None:
    """At every width of the branch: what changes within the buffer is not compiled in."""
    without = FIRST if first else ()
    inputs = make_inputs((2, 5, 24), torch.bfloat16, stream=torch.float32, without=without)
    leaves = {n: None if v is None else v.requires_grad_(n not in PLAIN) for n, v in inputs.items()}
    chosen = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]

    def call() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            total, normed = kernels.residual_norm(**leaves, eps=1e-6, kind=kind)
        return total.square().sum() + normed.float().pow(3).sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for width in (3,) if first else (3, 0):
        if not first:
            inputs["branch_width"].fill_(width)
        with kernels.use("triton"), torch.compiler.set_stance("default" if width else "fail_on_recompile"):
            results = [function() for function in (compiled, call)]
        gradients = [torch.autograd.grad(result, chosen) for result in results]
        torch.testing.assert_close(*results)
        for found, want in zip(*gradients, strict=True):
            torch.testing.assert_close(found, want)


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
