"""Moments of tokens: what they are about, how they are added up and re-based, and what a call starts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from statistics_checks import class_tokens_apart, error, exact_moments
from test_statistics_operations import DTYPES, IMPLEMENTATIONS, check_statistic, pair
from tolerances import statistics_tolerance
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import skd_kernels as kernels
from skd_kernels.moments import token_moments_compiled


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_shift_moments_are_about_the_mean(dtype: torch.dtype) -> None:
    x, grad = pair(300, 3, 16, dtype=dtype)
    x[: len(x) // 4] += 100  # what some tokens are like says little of all
    moments = kernels.token_moments(x, grad)
    spread = x.double().abs().mean(0)
    tolerance = statistics_tolerance("compiled", dtype, alike=True)
    assert ((moments.shift - x.double().mean(0)).abs() <= tolerance * spread).all()
    assert (moments.plain_sum.abs() <= tolerance * len(x) * spread).all()
    check_statistic("weighted_covariance", x, grad, "compiled" if "compiled" in IMPLEMENTATIONS else "reference")


@pytest.mark.parametrize("batch", [1, 2, 16, 31, 62, 93, 128])
def test_the_mean_of_class_tokens_stands_for_nothing_else(batch: int) -> None:
    x, grad = class_tokens_apart(batch, 2, 8)
    outer = exact_moments(x, grad, x.double().mean(0))[3]
    # One of the tokens that are sampled may be a class token; of more, errors are thousands of times as large.
    tolerance = 50 * statistics_tolerance("compiled", x.dtype)
    assert error(kernels.weighted_covariance(x, grad), outer) <= tolerance


class Dispatched(TorchDispatchMode):
    """The operators that PyTorch dispatches: each may start kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.prim.device.default:  # a fake tensor is asked where it is
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def dispatched(device: str, shape: tuple[int, ...], shift: str | None) -> tuple[list[str], kernels.Moments]:
    """By one call of the compiled operation, for tensors without memory on a device that need not be there."""
    with FakeTensorMode():
        x, grad = torch.empty(2, *shape, device=device, dtype=torch.bfloat16)
        given = {
            None: None,
            "float64": torch.empty(shape[-2:], device=device, dtype=torch.float64),
            "float32": torch.empty(shape[-2:], device=device),
            "needs a gradient": torch.empty(shape[-2:], device=device, dtype=torch.float64, requires_grad=True),
        }[shift]
        with Dispatched() as seen:
            moments = token_moments_compiled(x, grad, given)
    return seen.names, moments


@pytest.mark.skipif(not kernels.build_info()["compiled"], reason="no extension")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("shape", [(300, 6, 64), (4, 197, 6, 64)])
def test_a_call_dispatches_one_operator(device: str, shape: tuple[int, ...]) -> None:
    """A kernel of PyTorch before or after ours would take a GPU about as long as ours do."""
    for shift, name in ((None, "centred_moments"), ("float64", "token_moments")):
        names, moments = dispatched(device, shape, shift)
        views = ["aten.view.default"] * 2 if len(shape) == 4 else []  # which start nothing
        assert names == [*views, f"skd_kernels.{name}.default"]
        groups, dims = shape[-2:]
        assert {field: tuple(value.shape) for field, value in vars(moments).items()} == {
            "count": (),
            "shift": (groups, dims),
            "weight": (groups,),
            "plain_sum": (groups, dims),
            "weighted_sum": (groups, dims),
            "weighted_outer": (groups, dims, dims),
        }
        assert all(value.device.type == device and value.dtype == torch.float64 for value in vars(moments).values())
    assert dispatched(device, shape, "needs a gradient")[0][-2:] == ["aten.detach.default", names[-1]]
    assert dispatched(device, shape, "float32")[0][-2:] == ["aten._to_copy.default", names[-1]]


def test_moments_of_other_groups_do_not_add() -> None:
    for shape in ((6, 1, 4), (6, 3, 1), (6, 2, 4)):
        with pytest.raises(ValueError, match=r"other has .* it must have \(3, 4\)"):
            kernels.token_moments(*pair(6, 3, 4)) + kernels.token_moments(*pair(*shape))


def test_moments_keep_their_shift_to_themselves() -> None:
    x, grad = pair(6, 3, 4)
    shift = torch.ones(3, 4, dtype=torch.float64)
    for implementation in IMPLEMENTATIONS:
        with kernels.use(implementation):
            moments = kernels.token_moments(x, grad, shift)
        shift.add_(1)
        assert torch.equal(moments.shift, shift - 1)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_derivatives_of_every_kind() -> None:
    """Forward mode and torch.func see what plain PyTorch gives, the way through the mean included."""

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        y = x - x.mean(0)
        return torch.einsum("tg,tgi,tgj->gij", (x * grad).abs().mean(-1), y, y)

    x, grad = pair(9, 2, 4)
    many = torch.stack([x, 2 * x, x + 1])
    cases = [
        (lambda x: kernels.weighted_covariance(x, grad), by_hand),
        (lambda x: kernels.taylor_scores(x, grad), lambda x: (x * grad).abs().sum((0, 1))),
    ]
    for ours, plain in cases:
        for transform in (
            lambda f: torch.func.jvp(f, (x,), (x,))[1],
            lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).square().sum())(many),
            lambda f: torch.func.jacrev(torch.func.jacfwd(f))(x),
        ):
            torch.testing.assert_close(transform(ours), transform(plain))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangents = [torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (ours, plain)]
            torch.testing.assert_close(*tangents)


def test_a_large_mean_does_not_cancel() -> None:
    """One-pass centring without a shift loses all digits when |mean| >> std."""
    x, grad = pair(64, 2, 4)
    centred = kernels.weighted_covariance(x, grad / x)
    moved = x + 1e6
    found = kernels.weighted_covariance(moved, grad / moved)
    assert ((found - centred).norm() / centred.norm()) < 1e-8


def test_sums_do_not_depend_on_the_partition_or_the_shift() -> None:
    x, grad = pair(24, 5, 3, 8)
    whole = kernels.token_moments(x, grad)
    parts = [kernels.token_moments(a, b) for a, b in zip(x.split(7), grad.split(7), strict=True)]
    added = parts[0] + parts[1] + parts[2] + parts[3]
    assert torch.equal(added.shift, parts[0].shift)
    assert int(added.count) == 24 * 5
    torch.testing.assert_close(added.covariance(), whole.covariance(), rtol=1e-10, atol=1e-12)
    moved = whole.about(whole.shift + 3)
    direct = kernels.token_moments(x, grad, shift=whole.shift + 3)
    for name in ("weight", "plain_sum", "weighted_sum", "weighted_outer"):
        torch.testing.assert_close(getattr(moved, name), getattr(direct, name), rtol=1e-10, atol=1e-9)


def test_a_repeated_token_adds_no_variance_but_counts() -> None:
    x, grad = pair(1, 1, 2, 4)
    moments = kernels.token_moments(x.expand(3, 5, 2, 4), grad.expand(3, 5, 2, 4))
    assert int(moments.count) == 15
    assert moments.covariance().abs().max() < 1e-12


def test_an_empty_batch_is_zero_and_neutral() -> None:
    x, grad = pair(6, 3, 4)
    empty = kernels.token_moments(x[:0], grad[:0])
    assert empty.covariance().eq(0).all() and int(empty.count) == 0
    whole = kernels.token_moments(x, grad)
    torch.testing.assert_close((whole + empty).covariance(), whole.covariance())
    torch.testing.assert_close((empty + whole).covariance(), whole.covariance(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 2, 8), (5, 0, 8), (5, 2, 0)])
def test_moments_of_nothing_are_zeros_about_the_shift(shape: tuple[int, ...], implementation: str) -> None:
    empty, shift = torch.zeros(shape), torch.ones(shape[1:], dtype=torch.float64)
    for point, expected in ((shift, 1), (None, 0)):
        with kernels.use(implementation):
            moments = kernels.token_moments(empty, empty, point)
        assert int(moments.count) == len(empty) and moments.shift.eq(expected).all()
        sums = (moments.weight, moments.plain_sum, moments.weighted_sum, moments.weighted_outer)
        assert all(found.eq(0).all() for found in sums)


def test_nan_propagates_to_its_group_only() -> None:
    x, grad = pair(6, 3, 4)
    x[2, 1, 0] = float("nan")
    covariance = kernels.weighted_covariance(x, grad)
    assert covariance[1].isnan().any() and covariance[[0, 2]].isfinite().all()


def test_strided_views_need_no_copy_to_be_right() -> None:
    x, grad = pair(4, 5, 3, 2, 8)
    transposed = x.transpose(0, 1)
    found = kernels.weighted_covariance(transposed.flatten(2, 3), grad.transpose(0, 1).flatten(2, 3))
    torch.testing.assert_close(found, kernels.weighted_covariance(x.flatten(2, 3), grad.flatten(2, 3)))


def assert_same_moments(found: kernels.Moments, expected: kernels.Moments) -> None:
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name


def test_all_reduce_without_a_group_is_this_process_alone() -> None:
    """No torch.distributed is needed, and nothing changes: not a given shift, nor moments of nothing."""
    x, grad = pair(6, 5, 3, 8)
    moments = kernels.token_moments(x, grad, torch.full((3, 8), 0.5, dtype=x.dtype))
    for expected in (moments, kernels.token_moments(x[:0], grad[:0])):
        assert_same_moments(expected.all_reduce(), expected)
        assert_same_moments(expected.all_reduce(None) + moments, expected + moments)


REDUCED = {torch.float64: 1e-10, torch.float32: 1e-5}


def _reduce_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(0, 9) if rank == 0 else slice(9, 24)
    for dtype in REDUCED:
        x, grad = (tensor.to(dtype)[half] for tensor in pair(24, 5, 3, 8))
        moments = kernels.token_moments(x, grad).all_reduce(dist.group.WORLD)
        torch.save(copy.deepcopy(vars(moments)), f"{folder}/{dtype}-{rank}.pt")
        alone = kernels.token_moments(x, grad)
        assert_same_moments(alone.all_reduce(None), alone)  # though there is a world
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes reduce, in all dtypes: starting them takes longer than their work."""
    folder = tmp_path_factory.mktemp("reduced")
    mp.spawn(_reduce_on_rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("dtype, tolerance", REDUCED.items())
def test_all_reduce_gives_every_rank_the_moments_of_all_tokens(
    reduced: Path, dtype: torch.dtype, tolerance: float
) -> None:
    ranks = [kernels.Moments(**torch.load(reduced / f"{dtype}-{rank}.pt")) for rank in range(2)]
    whole = kernels.token_moments(*(tensor.to(dtype) for tensor in pair(24, 5, 3, 8)))
    for name in vars(ranks[0]):
        assert torch.equal(getattr(ranks[0], name), getattr(ranks[1], name))
    assert int(ranks[0].count) == 120
    found, expected = ranks[0].covariance(), whole.covariance()
    assert ((found - expected).norm(dim=(-2, -1)) <= tolerance * expected.norm(dim=(-2, -1))).all()
