"""The CUDA kernels without a GPU: compiled for every architecture without spills, and run on the CPU by emulation.

The emulation (tests/kernels/cuda) executes the kernels' own source thread by thread, with the matrix instructions
written from the layouts in the PTX manual.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from statistics_checks import DTYPES, check_results, class_tokens_apart, error, exact_moments, pair
from tolerances import statistics_tolerance

ROOT = Path(__file__).parents[2]
SOURCES = ["moments_cuda.cu", "taylor_cuda.cu"]


# Compilation ---------------------------------------------------------------------------------------


def find_nvcc() -> tuple[str, str]:
    """nvcc and the root of its toolkit, or skip. nvcc may be a wrapper: only a dry run tells where the toolkit is."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
    if top is None:
        pytest.skip("nvcc --dryrun names no toolkit (no TOP= line)")
    return nvcc, str(Path(top[1]).resolve())


def compile_kernels(source: str, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """Per kernel: registers, shared memory, stack frame and spills in bytes, as ptxas reports them."""
    from torch.utils.cpp_extension import include_paths

    nvcc, toolkit = find_nvcc()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if f"sm_{architecture}" not in listed:
        pytest.skip(f"this nvcc does not list sm_{architecture}")
    command = [nvcc, "-cubin", "-O3", "-std=c++20", "-Xptxas", "-v", "-arch", f"sm_{architecture}"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{path}" for path in [*include_paths(), f"{toolkit}/include"]]
    command += [str(ROOT / "csrc" / source), "-o", str(folder / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels: dict[str, dict[str, int]] = {}
    for name, report in re.findall(r"entry function '(\S+)'(.*?)Used", result.stderr, re.DOTALL):
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert numbers, report
        kernels[name] = dict(zip(("stack", "stores", "loads"), map(int, numbers.groups()), strict=True))
    return kernels


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "architecture", ["90", pytest.param("80", marks=pytest.mark.slow), pytest.param("100", marks=pytest.mark.slow)]
)
def test_no_kernel_spills(source: str, architecture: str, tmp_path: Path) -> None:
    kernels = compile_kernels(source, architecture, tmp_path)
    assert len(kernels) == 13  # 3 dtypes x 4 sizes or variants, and the sum over blocks
    assert {name: report for name, report in kernels.items() if any(report.values())} == {}


# Emulation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    library = tmp_path_factory.mktemp("emulation") / "emulate.so"
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(Path(__file__).parent / "cuda" / "emulate.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_choose_splits.restype = ctypes.c_int64
    return loaded


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def is_aligned(*tensors: torch.Tensor) -> bool:
    """cuda_common.h's is_aligned of all of them."""
    return all(
        tensor.data_ptr() % 16 == 0
        and all(n * tensor.element_size() % 16 == 0 for n in (*tensor.stride()[:-1], tensor.shape[-1]))
        for tensor in tensors
    )


def run_moments(
    emulated: Any, x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None, splits: int
) -> tuple[tuple[torch.Tensor, ...], int]:
    """The six results of an operation on CUDA and how many kernels were launched."""
    tokens, groups, dims = x.shape
    sizes: list[tuple[int, ...]] = [(), (groups, dims), (groups,), *[(groups, dims)] * 2, (groups, dims, dims)]
    outputs = tuple(torch.full(size, torch.nan, dtype=torch.float64) for size in sizes)
    integers = [*x.stride()[:2], *grad.stride()[:2], tokens, groups]
    launches = emulated.emulate_moments(
        DTYPES.index(x.dtype),
        pointer(x),
        pointer(grad),
        None if shift is None else pointer(shift),
        *map(ctypes.c_int64, integers),
        dims,
        ctypes.c_bool(is_aligned(x, grad)),
        ctypes.c_int64(splits),
        *map(pointer, outputs),
    )
    return outputs, launches


def emulate_moments(
    emulated: Any, x: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor | None = None, splits: int = 1
) -> tuple[torch.Tensor, ...]:
    return run_moments(emulated, x, grad, shift, splits)[0]


def emulate_taylor(emulated: Any, x: torch.Tensor, grad: torch.Tensor, power: int, splits: int) -> torch.Tensor:
    tokens, dims = x.shape
    scores = torch.full((dims,), torch.nan, dtype=torch.float64)
    integers = [x.stride(0), grad.stride(0), tokens, dims, splits]
    emulated.emulate_taylor(
        DTYPES.index(x.dtype),
        pointer(x),
        pointer(grad),
        *map(ctypes.c_int64, integers),
        ctypes.c_bool(power == 2),
        ctypes.c_bool(is_aligned(x, grad)),
        pointer(scores),
    )
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "groups", "dims", "splits"),
    [
        (1, 1, 8, 1),
        (300, 2, 16, 2),
        (257, 1, 13, 1),
        (150, 2, 24, 1),
        (200, 3, 64, 3),
        (65, 1, 80, 1),
        (40, 1, 128, 1),
        (2500, 1, 16, 10),  # more partial products than the second kernel reads at a time
    ],
)
def test_emulated_moments(
    emulated: Any, tokens: int, groups: int, dims: int, splits: int, dtype: torch.dtype
) -> None:
    x, grad = pair(tokens, groups, dims, dtype=dtype)
    for shift in (None, torch.full((groups, dims), 0.1, dtype=torch.float64)):
        found = emulate_moments(emulated, x, grad, shift, splits)
        check_results(found, x, grad, shift)
        for first, second in zip(found, emulate_moments(emulated, x, grad, shift, splits), strict=True):
            assert torch.equal(first, second)  # to the bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_moments_about_what_float32_does_not_hold(emulated: Any, dtype: torch.dtype) -> None:
    """10000.1 is 4e-4 from the nearest float32, which is what the kernel subtracts."""
    x, grad = pair(200, 2, 24)
    x, grad = (x + 1e4).to(dtype), grad.to(dtype)
    shift = torch.full((2, 24), 10000.1, dtype=torch.float64)
    check_results(emulate_moments(emulated, x, grad, shift, 2), x, grad, shift)


@pytest.mark.parametrize("tokens", [2, 7, 30, 31, 32, 61, 62, 63])
def test_emulated_moments_of_few_tokens(emulated: Any, tokens: int) -> None:
    """Fewer than the sample, as many, a few more."""
    for dims in (16, 128):
        x, grad = pair(tokens, 2, dims)
        check_results(emulate_moments(emulated, x, grad), x, grad, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sample_is_near_the_mean_of_all_and_not_of_class_tokens(emulated: Any, dtype: torch.dtype) -> None:
    """Sums about a point that is far from the mean would lose what they cancel."""
    for batch in (2, 16, 31, 62):
        x, grad = (tensor.to(dtype) for tensor in class_tokens_apart(batch, 1, 8))
        outer = exact_moments(x, grad, x.double().mean(0))[3]
        # One of the tokens that are sampled may be a class token; of more, errors are thousands of times as large.
        tolerance = 50 * statistics_tolerance("compiled", dtype, "cuda")
        assert error(emulate_moments(emulated, x, grad, splits=3)[5], outer) <= tolerance


def test_a_call_launches_two_kernels_and_nothing_else(emulated: Any) -> None:
    """The emulation counts what moments_cuda.cu launches; that file starts nothing on the device in any other way."""
    x, grad = pair(300, 2, 24)
    for shift in (None, torch.zeros(2, 24, dtype=torch.float64)):
        assert run_moments(emulated, x, grad, shift, 3)[1] == 2
    source = (ROOT / "csrc" / "moments_cuda.cu").read_text()
    assert source.count("<<<") == 1 and not re.search(r"cuda(Mem|Launch|Graph)", source)
    used = set(re.findall(r"torch::stable::(\w+)\(", source))
    assert used == {"new_empty", "new_zeros", "fill_", "clone"}
    start = source.index("Tensors empty_moments(")  # all but the first are for inputs without elements
    body = source[start : source.index("\n}\n", start)]
    assert all(source.count(f"{name}(") == body.count(f"{name}(") == 1 for name in used - {"new_empty"})


def test_two_halves_are_worth_a_float_and_one_is_not(emulated: Any) -> None:
    x, grad = pair(500, 2, 64)
    shift = x.mean(0).double()
    expected = exact_moments(x, grad, shift)[3]
    assert error(emulate_moments(emulated, x, grad, shift)[5], expected) < 5e-6
    scaled = (x * grad).abs().mean(-1, keepdim=True).sqrt() * (x - shift.float())
    single = scaled.bfloat16().double().permute(1, 2, 0)
    assert error(single @ single.mT, expected) > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_moments_of_views(emulated: Any, dtype: torch.dtype) -> None:
    """Token-major and group-major views, aligned and not; what lies between the rows is never used."""
    for dims, extra in [(16, 16), (16, 3), (13, 3)]:
        x, grad = (torch.full((2, 70, dims + extra), torch.nan, dtype=dtype) for _ in range(2))
        values = pair(70, 2, dims, dtype=dtype)
        x, grad = x[..., 1 if extra == 3 else 0 :][..., :dims].transpose(0, 1), grad[..., :dims].transpose(0, 1)
        x.copy_(values[0]), grad.copy_(values[1])
        assert is_aligned(x, grad) == (extra == 16)
        for shift in (None, torch.zeros(2, dims, dtype=torch.float64)):
            check_results(emulate_moments(emulated, x, grad, shift, 2), x, grad, shift)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("token", [23, 70])
@pytest.mark.parametrize("group", [0, 1])
def test_emulated_moments_keep_nan_in_its_group(emulated: Any, group: int, token: int, bad: float) -> None:
    """Of a token that is in the sample and of one that is not; the mean of a coordinate is of its own tokens."""
    x, grad = pair(100, 2, 40)
    x[token, group, 3] = bad
    for shift in (None, torch.zeros(2, 40, dtype=torch.float64)):
        count, about, *sums = emulate_moments(emulated, x, grad, shift)
        assert float(count) == 100 and about.isfinite().sum() == 80 - (shift is None)
        for found in sums:
            assert found[1 - group].isfinite().all() and not found[group].isfinite().all()
        weight, plain, _, outer = (found[group] for found in sums)
        assert plain.isfinite().sum() == 39 and not weight.isfinite() and not outer.isfinite().any()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "dims", "splits"), [(1, 1, 1), (3, 300, 1), (130, 8, 2), (700, 520, 2), (67, 45, 3), (5000, 16, 1)]
)
def test_emulated_taylor(emulated: Any, tokens: int, dims: int, splits: int, dtype: torch.dtype, power: int) -> None:
    x, grad = pair(tokens, dims, dtype=dtype)
    expected = (x.double() * grad.double()).abs().pow(power).sum(0)
    torch.testing.assert_close(emulate_taylor(emulated, x, grad, power, splits), expected, rtol=3e-6, atol=0)


def test_emulated_squares_do_not_underflow(emulated: Any) -> None:
    x, grad = torch.full((2, 9, 8), 1e-15, dtype=torch.bfloat16)
    expected = (x.double() * grad.double()).square().sum(0)
    torch.testing.assert_close(emulate_taylor(emulated, x, grad, 2, 1), expected, rtol=1e-12, atol=0)


def test_splits_fill_the_device_and_bound_the_float_sums(emulated: Any) -> None:
    def choose(*arguments: int) -> int:
        return int(emulated.emulate_choose_splits(*map(ctypes.c_int64, arguments)))

    assert choose(36, 394, 396, 1024) == 11  # DeiT-Base, batch 128, H100: one full wave
    assert choose(1000, 394, 396, 1024) >= 1
    assert choose(1, 1, 396, 1024) == 1
    assert choose(10**6, 10**6, 396, 1024) >= 10**6 // 1024
