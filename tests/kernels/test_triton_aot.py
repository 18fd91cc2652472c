"""Every Triton kernel, compiled for real targets without a GPU: no spills, no more shared memory than there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks.registers import Resources, compile_for, compile_launch, machine_code
from skd_kernels import gpu
from skd_kernels.gpu.activations import activate, in_kernel
from skd_kernels.gpu.launch import Launch, launch, record

ROOT = Path(__file__).parents[2]


def compile_all(architecture: int, **examples: bool) -> dict[str, str]:
    """What is wrong with each kernel that has a fault."""
    faults = {}
    for item in gpu.launches(architecture, **examples):
        fault = compile_launch(item, architecture).faults(architecture)
        if fault:
            faults[f"{item.name} ({item.label})"] = fault
    return faults


def test_no_kernel_spills() -> None:
    assert gpu.launches(90, quick=True)
    assert compile_all(90, quick=True) == {}


PRODUCTS = {"product_kernel", "weight_gradient_kernel"}


def test_products_copy_tiles_by_descriptors_to_tensor_cores() -> None:
    """On sm_90; no operand is read in another way, and what a linear epilogue writes leaves in tiles as well."""
    items = [item for item in gpu.launches(90, quick=True) if item.name in PRODUCTS]
    assert {item.constants.get("EPILOGUE") for item in items} == {"linear", "activate", "gradient", None}
    for item in items:
        ptx = compile_for(item, 90).asm["ptx"]
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx
        assert "cp.async.bulk.tensor.2d.shared" in ptx and "cp.async.c" not in ptx
        if item.constants.get("EPILOGUE") == "linear":
            assert "cp.async.bulk.tensor.2d.global" in ptx and "st.global" not in ptx


def test_products_copy_asynchronously_where_there_are_no_descriptors() -> None:
    """A mask or an offset that Triton cannot see through turns 16-byte copies into loads of single elements."""
    for item in gpu.launches(80, quick=True):
        if item.name not in PRODUCTS:
            continue
        ptx = compile_for(item, 80).asm["ptx"]
        assert "mma.sync" in ptx and "cp.async.ca" not in ptx
        # All stages but one are under way before the loop, and another begins in it; how many more copies there are
        # is the compiler's affair.
        tile = item.constants["BLOCK_K"] * (item.constants["BLOCK_M"] + item.constants["BLOCK_N"])
        copies = len(re.findall(r"cp\.async\.cg\.shared\.global[^\n]*, 0x10", ptx))
        assert copies >= item.num_stages * tile * 2 // (16 * 32 * item.num_warps), item.name


@triton.jit
def activation(z, value, slope, SIZE: tl.constexpr, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation and its slope, alone."""
    i = tl.arange(0, SIZE)
    found = activate(tl.load(z + i), ACT)
    tl.store(value + i, found[0])
    tl.store(slope + i, found[1])


@pytest.mark.parametrize(("act", "most"), [("gelu", 18), ("gelu_tanh", 12), ("quick_gelu", 8), ("silu", 8)])
def test_floating_point_instructions_of_an_activation(act: str, most: int) -> None:
    """Of one element, special functions counted: on sm_90 the epilogue runs beside another program's product.

    That product takes as long as 46 of them for 768 channels (1,024 multiplications and additions a clock and
    multiprocessor, 128 lanes). The form that was there before took 34 for GELU.
    """
    elements, warps = 1024, 4
    numbers = torch.empty(elements, device="meta")
    arguments = {"z": numbers, "value": numbers, "slope": numbers}
    with record(90) as recorder:
        constants = {"SIZE": elements, "ACT": in_kernel(act, torch.bfloat16)}
        launch(activation, (1,), arguments | constants, num_warps=warps, num_stages=1)
    code = machine_code(compile_for(recorder.launches[0], 90))
    found = [name for name in code if name.startswith(("F", "MUFU", "H"))]
    special = [name for name in found if name.startswith("MUFU")]
    each = elements // (32 * warps)
    assert len(special) == 2 * each
    assert most - 2 < len(found) / each < most


# What DeiT's three sizes start takes a few minutes for each device (`-k deit`), and all examples take an hour.
EXAMPLES = pytest.mark.parametrize("deit", [True, False], ids=["deit", "every example"])


@pytest.mark.slow
@EXAMPLES
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_no_configuration_spills(architecture: int, deit: bool) -> None:
    assert compile_all(architecture, deit=deit) == {}


@pytest.mark.slow
@EXAMPLES
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_the_oldest_triton_compiles_them_too(architecture: int, deit: bool, tmp_path: Path) -> None:
    """torch 2.11, the oldest that skd supports, comes with triton 3.6."""
    packages = ["triton==3.6.0", "numpy<2.4"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *packages]
    if subprocess.run(install).returncode:
        pytest.skip("pip cannot install triton 3.6.0")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.registers", "--check", "--arch", str(architecture)]
    command += ["--deit"] if deit else []
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("triton 3.6.0\n"), result.stderr
    assert result.returncode == 0, result.stderr


# The harness itself --------------------------------------------------------------------------------


@triton.jit
def product(a, b, c, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """c = a b^T on one tile."""
    m = tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, 64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, 64):
        left = tl.load(a + m[:, None] * 1024 + start + k[None, :])
        right = tl.load(b + n[:, None] * 1024 + start + k[None, :])
        total = tl.dot(left, right.T, total)
    tl.store(c + m[:, None] * 1024 + n[None, :], total.to(tl.bfloat16))


def record_product(columns: int, num_warps: int, depth: Any = 1024) -> Launch:
    a, b, c = (torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta") for _ in range(3))
    arguments = {"a": a, "b": b, "c": c, "depth": depth, "ROWS": 128, "COLUMNS": columns}
    with record(90) as recorder:
        launch(product, (1,), arguments, num_warps=num_warps, num_stages=3)
    return recorder.launches[0]


def test_a_kernel_that_spills_is_found() -> None:
    """256 x 128 accumulators in 128 threads are 256 registers a thread."""
    assert compile_launch(record_product(128, 8), 90).faults(90) == ""
    assert "spilled" in compile_launch(record_product(256, 4), 90).faults(90)
    assert "shared memory" in Resources(8, 0, 0, 200_000).faults(80)


def test_what_triton_specialises_on_is_recorded() -> None:
    item = record_product(128, 8)
    assert item.signature["a"] == "*bf16" and item.signature["depth"] == "i32"
    assert item.divisible_by_16 == ("a", "b", "c", "depth")
    assert record_product(128, 8, 1000).divisible_by_16 == ("a", "b", "c")
    assert record_product(128, 8, 1).constants["depth"] == 1
    assert record_product(128, 8, 2**31).signature["depth"] == "i64"
    assert item.key() == record_product(128, 8, 2048).key() != record_product(128, 8, 1000).key()
    with pytest.raises(TypeError, match="depth"):
        launch_without_depth()


def launch_without_depth() -> None:
    with record(90):
        launch(product, (1,), {"a": None, "b": None, "c": None, "ROWS": 1, "COLUMNS": 1}, num_warps=4, num_stages=1)
