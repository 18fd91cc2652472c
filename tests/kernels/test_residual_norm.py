"""residual_norm: the specification, its gradients, how it is chosen, and its kernels without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpretation import run_interpreted
from norm_checks import NAMES, OF_A_BRANCH, OPTIONAL, Inputs, make_inputs
from operations import in_double

import skd_kernels as kernels
from skd_kernels.residual_norm import KINDS

SHAPE = (2, 5, 12)
FIRST = ("branch", *OF_A_BRANCH)  # what the first norm of a network is without
CUDA = {"x": SHAPE, "branch": SHAPE, "weight": (12,), "bias": (12,), "eps": 1e-6, "device": "cuda"}


def by_hand(inputs: Inputs, kind: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Image by image, token by token."""
    x, branch, weight, bias, scale, mask, offset, width = (inputs[name] for name in ("x", *OPTIONAL))
    total, normed = x.clone(), torch.empty_like(x)
    for image in range(x.shape[0]):
        for token in range(x.shape[1]):
            row = total[image, token]
            if branch is not None and (width is None or width > 0):
                added = branch[image, token] + (0 if offset is None else offset)
                row += (1 if mask is None else mask[image]) * (1 if scale is None else scale) * added
            centred = row - row.mean() if kind == "layer" else row
            unit = centred / (centred.square().mean() + eps).sqrt()
            normed[image, token] = unit * (1 if weight is None else weight) + (0 if bias is None else bias)
    return total, normed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "without",
    [(), ("mask",), ("scale",), ("branch_bias",), ("branch_width",), ("weight",), ("bias",), FIRST, OPTIONAL],
)
def test_value(without: tuple[str, ...], kind: str) -> None:
    for eps, width in ((1e-6, 3), (0.5, 0), (0, 1)):
        inputs = make_inputs(SHAPE, torch.float64, without=without, width=width)
        found = kernels.residual_norm(**inputs, eps=eps, kind=kind)
        for got, want in zip(found, by_hand(inputs, kind, eps), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", [(), FIRST, ("weight", "bias")])
@pytest.mark.parametrize("width", [0, 3])
def test_gradcheck(width: int, without: tuple[str, ...], kind: str) -> None:
    inputs = make_inputs((2, 2, 5), torch.float64, without=without, width=width)
    names = [name for name in NAMES if inputs[name] is not None]
    rest = {name: value for name, value in inputs.items() if name not in names}

    def call(*leaves: torch.Tensor) -> Any:
        return kernels.residual_norm(**dict(zip(names, leaves, strict=True)), **rest, eps=1e-3, kind=kind)

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_what_the_next_linear_layer_takes(kind: str) -> None:
    """Only the result is rounded: the branch comes in half precision, all else is float32."""
    inputs = make_inputs(SHAPE, torch.bfloat16, stream=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = kernels.residual_norm(**inputs, eps=1e-6, kind=kind)
        assert normed.dtype == F.linear(total, torch.ones(3, 12)).dtype == torch.bfloat16
    exact = kernels.residual_norm(**in_double(inputs), eps=1e-6, kind=kind)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact[0].float())
    torch.testing.assert_close(normed, exact[1].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.residual_norm(**in_double(inputs), eps=1e-6, kind=kind)
    assert all(value.dtype == torch.float64 for value in found)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (
            {"x": torch.float32, "branch": torch.bfloat16, "weight": torch.float16, "bias": torch.float32},
            torch.float16,
        ),
        ({"x": torch.float32, "branch": torch.bfloat16, "bias": torch.float16}, torch.float16),
        ({"x": torch.float32, "branch": torch.bfloat16}, torch.bfloat16),
        ({"x": torch.bfloat16}, torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_the_next_layer(dtypes: dict[str, torch.dtype], expected: torch.dtype) -> None:
    inputs = make_inputs(SHAPE, without=set(OPTIONAL) - set(dtypes))
    total, normed = kernels.residual_norm(**inputs | {n: inputs[n].to(d) for n, d in dtypes.items()}, eps=1e-6)
    assert (total.dtype, normed.dtype) == (torch.float32, expected)


def test_without_a_branch_the_sum_is_x() -> None:
    inputs = make_inputs(SHAPE, without=FIRST)
    assert kernels.residual_norm(**inputs, eps=1e-6)[0] is inputs["x"]
    assert kernels.residual_norm(**inputs | {"x": inputs["x"].half()}, eps=1e-6)[0].dtype == torch.float32


def test_only_the_first_tokens_of_the_sum_are_returned() -> None:
    """Their gradients, too, and all tokens are normed."""
    results = []
    for tokens in (2, None):
        inputs = make_inputs(SHAPE)
        leaves = [inputs[name].requires_grad_() for name in NAMES]
        total, normed = kernels.residual_norm(**inputs, eps=1e-6, sum_tokens=tokens)
        assert total.shape == (2, 5 if tokens is None else tokens, 12)
        loss = total[:, :2].pow(3).sum() + normed.pow(3).sum()
        results.append([total[:, :2], normed, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (2, 5, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty(shape: tuple[int, int, int], kind: str) -> None:
    """Nothing in, nothing out, and gradients of zero."""
    inputs = make_inputs(shape)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    out = kernels.residual_norm(**inputs, eps=1e-6, kind=kind)
    assert all(value.shape == shape for value in out)
    for grad in torch.autograd.grad(out[0].sum() + out[1].sum(), leaves):
        assert grad.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_as_one_graph(kind: str) -> None:
    inputs = make_inputs(SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(kernels.residual_norm, fullgraph=True, backend="aot_eager")
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    results = []
    for call in (compiled, kernels.residual_norm):
        total, normed = call(**inputs, eps=1e-6, kind=kind)
        loss = total.square().sum() + normed.pow(3).sum()
        results.append([total, normed, *torch.autograd.grad(loss, leaves)])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(5, 12)}, "x has shape"),
        ({"x": torch.zeros(2, 5, 12, dtype=torch.int32)}, "x has dtype"),
        ({"branch": torch.zeros(2, 5, 11)}, "branch has shape"),
        (
            {"branch": torch.zeros(2, 5, 12, dtype=torch.float64)},
            "branch has dtype torch.float64, x has torch.float32",
        ),
        ({"branch": torch.zeros(2, 5, 12, device="meta")}, "branch is on meta; x is on cpu"),
        ({"weight": torch.zeros(11)}, "weight has shape"),
        ({"bias": torch.zeros(1)}, "bias has shape"),
        ({"scale": torch.zeros(())}, "scale has shape"),
        ({"mask": torch.zeros(2, 1)}, "mask has shape"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, "mask has dtype"),
        ({"mask": torch.zeros(2, requires_grad=True)}, "mask requires grad"),
        ({"branch_bias": torch.zeros(2)}, "branch_bias has shape"),
        *(
            ({"branch": None, **dict.fromkeys(OF_A_BRANCH)} | {name: given}, f"{name} is given without a branch")
            for name, given in make_inputs(SHAPE).items()
            if name in OF_A_BRANCH
        ),
        ({"branch_width": 3}, "branch_width is 3; it must be a 0-d int32 tensor"),
        ({"branch_width": torch.tensor([3])}, r"branch_width is a torch.int64 tensor of shape \(1,\)"),
        ({"branch_width": torch.tensor(3.0)}, "branch_width is a torch.float32 tensor"),
        ({"branch_width": torch.tensor(3, device="meta")}, "branch_width is on meta; x is on cpu"),
        ({"kind": "batch"}, "kind is 'batch'"),
        ({"kind": ["rms"]}, "kind is"),
        ({"eps": -1e-6}, "eps is -1e-06"),
        ({"eps": None}, "eps is None"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"sum_tokens": 0}, "sum_tokens is 0; it may be 1..5, or None"),
        ({"sum_tokens": 6}, "sum_tokens is 6"),
        ({"sum_tokens": True}, "sum_tokens is True"),
    ],
)
def test_rejects(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kernels.residual_norm(**{**make_inputs(SHAPE), "eps": 1e-6, **change})


# The choice of an implementation, and the kernels ----------------------------------------------------


def test_cuda_takes_the_kernels() -> None:
    pytest.importorskip("triton")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert kernels.explain("residual_norm", **CUDA, dtype=dtype).chosen == "triton"
    everything = {**CUDA, "scale": (12,), "mask": (2,), "branch_bias": (12,), "branch_width": (), "kind": "rms"}
    assert kernels.explain(kernels.residual_norm, **everything).chosen == "triton"
    assert (
        kernels.explain("residual_norm", **{**CUDA, "branch": None, "weight": None, "bias": None}).chosen == "triton"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "no kernel for torch.float64"),
        ({"device": "xpu"}, "no kernel for xpu"),
        ({"device": "cpu"}, "Triton has no CPU target"),
        ({"x": (0, 5, 12), "branch": (0, 5, 12)}, "is empty"),
        ({"x": (2, 5, 4097), "branch": (2, 5, 4097), "weight": None, "bias": None}, "x has 4097 channels"),
    ],
)
def test_what_the_kernels_refuse(change: dict[str, Any], reason: str) -> None:
    pytest.importorskip("triton")
    explained = kernels.explain("residual_norm", **CUDA | change)
    assert explained.chosen == "reference" and reason in explained.refused["triton"]
    with kernels.use("triton"), pytest.raises(ValueError, match=reason):
        kernels.explain("residual_norm", **CUDA | change)


def test_interpreted() -> None:
    run_interpreted("interpreted_norm.py")


@pytest.mark.slow
def test_more_cases_interpreted() -> None:
    run_interpreted("interpreted_norm.py", slow=True)


def compiled_launches(architecture: int) -> list[Any]:
    from skd_kernels.gpu import norm
    from skd_kernels.gpu.launch import record

    with record(architecture) as recorder:
        for recorder.label, call in norm.examples():
            call()
    return list({launch.key(): launch for launch in recorder.launches}.values())


def test_streams_keep_one_layout_and_the_gradient_kernel_its_16_warps() -> None:
    """Half precision goes in 8 bytes a thread, beside float32 in 16: no tile is exchanged through shared memory."""
    pytest.importorskip("triton")
    from benchmarks.registers import compile_for, compile_launch

    checked = 0
    for launch in compiled_launches(90):
        if not launch.label.startswith("quick") or launch.name == "residual_norm_sums_kernel":
            continue
        resources = compile_launch(launch, 90)
        if "*bf16" in (launch.signature.get("normed"), launch.signature.get("dbranch")):
            assert "st.global.v2.b32" in compile_for(launch, 90).asm["ptx"]
        # A word of each warp's sums over columns, for two rows, and no more.
        assert resources.shared <= 2 * 4 * launch.num_warps and resources.faults(90) == ""
        if launch.name == "residual_norm_gradient_kernel":
            assert resources.registers <= 65536 // (16 * 32)
        checked += 1
    assert checked >= 8


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_no_configuration_spills(architecture: int) -> None:
    pytest.importorskip("triton")
    from benchmarks.registers import compile_launch

    faults = {
        f"{launch.name} ({launch.label})": compile_launch(launch, architecture).faults(architecture)
        for launch in compiled_launches(architecture)
    }
    assert {name: fault for name, fault in faults.items() if fault} == {}
