"""What an installed skd must do: `tests/test_wheel.py` and cibuildwheel run it where a wheel has been installed.

python tests/installed.py      an AssertionError if something is wrong; with SKD_CUDA=on a CUDA build is expected
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

import skd
import skd_kernels as kernels
from skd.cli import main

MODEL = {
    **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10},
    **{"embed_dim": 32, "depth": 2, "num_heads": 2},
}
DATA = ["--data", "digits", "--calibration-images", "128", "--workers", "0"]


def check_kernels() -> None:
    """The extension is in use, and its kernels agree with the reference in float64."""
    info = kernels.build_info()
    assert info["compiled"], info["reason"]
    assert info["cuda"] is (os.environ.get("SKD_CUDA") == "on"), info
    generator = torch.Generator().manual_seed(0)
    x, grad, tokens, into, out_of = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((64, 3, 16), (64, 3, 16), (2, 9, 24), (72, 24), (24, 24))
    )
    for function, arguments in (
        (kernels.taylor_scores, (x, grad)),
        (kernels.weighted_covariance, (x, grad)),
        (lambda *given: kernels.masked_attention(*given, num_heads=3), (tokens, into, None, out_of, None, 5)),
    ):
        with kernels.use("reference"):
            expected = function(*arguments)
        with kernels.use("compiled"):
            single = [value.float() if torch.is_tensor(value) else value for value in arguments]
            found = function(*single).double()
        assert (found - expected).norm() <= 1e-5 * expected.norm(), function


def check_commands(folder: Path) -> None:
    """Convert, plan and extract; the file that comes out computes what the super-network's entry does."""
    network, half = folder / "network.safetensors", folder / "half.safetensors"
    model = ["--model", "vit_tiny_patch16_224", "--model-kwargs", json.dumps(MODEL)]
    for command in (
        ["convert", *model, *DATA, "--out", str(network)],
        ["plan", "--supernet", str(network), *DATA, "--rounds", "3", "--out", str(network)],
        ["extract", "--supernet", str(network), "--macs", "0.5", "--out", str(half)],
        ["evaluate", "--model", str(half), "--data", "digits", "--workers", "0"],
        ["train", "--config", "deit_tiny", "--model-kwargs", json.dumps(MODEL), "--dry-run", "--device", "cpu"],
    ):
        assert main(command) == 0, command
    supernet, small = skd.load(network), skd.load(half).eval()
    assert skd.cost(small).macs <= skd.cost(supernet).macs / 2
    images = torch.randn(2, 1, 8, 8)
    entry = next(i for i in range(len(supernet.dropout_list)) if skd.cost(supernet, entry=i) == skd.cost(small))
    with torch.no_grad():
        torch.testing.assert_close(small(images), supernet.eval()(images, entry=entry), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    for package in (skd, kernels):
        assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__file__} is not what was installed"
    check_kernels()
    with tempfile.TemporaryDirectory() as name:
        check_commands(Path(name))
    versions = {name: importlib.metadata.version(name) for name in ("skd", "torch", "timm")}
    print(json.dumps(versions | {"built with torch": kernels.build_info()["built_with_torch"]}))
