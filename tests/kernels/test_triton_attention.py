"""masked_attention in Triton, without a GPU: interpreted in a process of its own, and how it is chosen."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from interpretation import run_interpreted

import skd_kernels as kernels

SHAPES = {"x": (2, 5, 16), "w_qkv": (48, 16), "b_qkv": None, "w_proj": (16, 16), "b_proj": (16,)}


def test_interpreted() -> None:
    run_interpreted("interpreted_attention.py")


@pytest.mark.slow
def test_more_cases_interpreted() -> None:
    run_interpreted("interpreted_attention.py", slow=True)


def test_packed_rows_are_copied_16_bytes_at_a_time() -> None:
    """At every width: that is what padding heads to 8 coordinates is for.

    Blocks of 32 tokens by 16 coordinates have only 8 bytes for each of 128 threads; logarithms are read 4 bytes at a
    time.
    """
    pytest.importorskip("triton")
    from benchmarks.registers import compile_for
    from skd_kernels import gpu

    names = {"flash_forward", "flash_backward"}
    compiled = [item for item in gpu.launches(90, quick=True) if item.name in names]
    assert {item.name for item in compiled} == names
    for item in compiled:
        ptx = compile_for(item, 90).asm["ptx"]
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx
        sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
        others = {"flash_forward": {"0x8"}, "flash_backward": {"0x8", "0x4"}}.get(item.name, set())
        assert "0x10" in sizes and set(sizes) <= {"0x10"} | others, item.name
        # A block of 32 x 16 elements, one at a time, would take each of 128 threads four loads.
        assert len(re.findall(r"ld\.global[.\w]*\.[bu]16", ptx)) < 4, item.name


def test_a_width_on_the_device_takes_the_kernels() -> None:
    pytest.importorskip("triton")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        chosen = kernels.explain("masked_attention", **SHAPES, width=(), num_heads=2, device="cuda", dtype=dtype)
        assert chosen.chosen == "triton"
        chosen = kernels.explain("masked_attention", **SHAPES, width=5, num_heads=2, device="cuda", dtype=dtype)
        assert chosen.chosen == "slices" and chosen.refused["triton"] == "slices is preferred"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "no kernel for torch.float64"),
        ({"device": "xpu"}, "no kernel for xpu"),
        ({"x": (0, 5, 16)}, "is empty"),
        ({"num_heads": 1, "w_proj": (16, 129)}, "heads of 129 coordinates; the kernels take up to 128"),
        ({"w_qkv": (48, 2**27)}, "2\\^31 elements"),
    ],
)
def test_what_the_kernels_refuse(change: dict[str, object], reason: str) -> None:
    pytest.importorskip("triton")
    call = {**SHAPES, "width": (), "num_heads": 2, "device": "cuda"} | change
    found = kernels.explain("masked_attention", **call)
    assert found.chosen == "reference"
    with kernels.use("triton"), pytest.raises(ValueError, match=reason):
        kernels.explain("masked_attention", **call)


def test_the_cpu_is_never_chosen_for_interpretation() -> None:
    """Not even where the interpreter is on: it is a thousand times slower than the reference."""
    code = """
import torch, skd_kernels as kernels
x, w_qkv, w_proj = torch.ones(1, 3, 8), torch.ones(24, 8), torch.ones(8, 8)
print(kernels.explain("masked_attention", x, w_qkv, None, w_proj, None, torch.tensor(3), num_heads=1).chosen)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() in ("compiled", "slices"), result.stderr
    x = torch.ones(1, 3, 8)
    given = (x, torch.ones(24, 8), None, torch.ones(8, 8), None, torch.tensor(3))
    assert kernels.explain("masked_attention", *given, num_heads=1).chosen in ("compiled", "slices")
    with kernels.use("triton"), pytest.raises(ValueError, match="triton: Triton has no CPU target"):
        kernels.masked_attention(x, torch.ones(24, 8), None, torch.ones(8, 8), None, 3, num_heads=1)


def test_without_triton_the_package_imports_and_says_so() -> None:
    code = """
import sys, importlib.machinery
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import skd_kernels as kernels
shapes = dict(x=(2, 5, 16), w_qkv=(48, 16), b_qkv=None, w_proj=(16, 16), b_proj=None)
print(kernels.explain("masked_attention", **shapes, width=(), num_heads=2, device="cuda"))
assert "triton" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "masked_attention: reference" in result.stdout, result.stderr
    assert "not triton: triton is not installed" in result.stdout


def test_more_images_than_cudnn_takes_go_to_the_kernels() -> None:
    """Where the host knows the width, the library is first, but for what it has failed at."""
    pytest.importorskip("triton")
    for images, dtype, chosen in (
        (70_000, torch.bfloat16, "triton"),
        (70_000, torch.float32, "slices"),
        (65_535, torch.float16, "slices"),
    ):
        shapes = {"x": (images, 3, 16), "w_qkv": (48, 16), "b_qkv": (48,), "w_proj": (16, 16), "b_proj": (16,)}
        found = kernels.explain("masked_attention", **shapes, width=8, num_heads=2, device="cuda", dtype=dtype)
        assert found.chosen == chosen
        assert ("cuDNN fails at the attention of 70000" in found.refused.get("slices", "")) == (chosen == "triton")
