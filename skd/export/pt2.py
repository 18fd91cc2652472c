"""A program of torch.export, and a package of AOTInductor beside it where a compiler is found."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from skd.export.comparison import compare, sample
from skd.export.description import description
from skd.files import TOLERANCE
from skd.vit import TimmModel


def write(model: TimmModel, path: Path, compiled: bool | None = None, device: str | torch.device = "cpu") -> str:
    """Write `model` to the file `path`, and as a package of AOTInductor to `compiled_path(path)`.

    Both take any number of images. The program holds what `description` says, under the same names:
    ``torch.export.load(path, extra_files={"preprocessing": ""})``.

    Args:
        compiled: whether the package is written; None: where there is a C++ compiler.
        device: that both files run on.

    Raises:
        ValueError: `compiled` without a compiler.
    """
    if compiled and not has_compiler():
        raise ValueError("compiled is True, but there is no C++ compiler (g++, or what CXX names)")
    model = copy.deepcopy(model).to(device).eval()
    images = sample(model, 2)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files=description(model))
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    compare(model, torch.export.load(path).module(), tolerance, "the program")
    if has_compiler() if compiled is None else compiled:
        package = str(compiled_path(path))
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        compare(model, torch._inductor.aoti_load_package(package), tolerance, "the compiled package")
    return "pt2"


def compiled_path(path: Path) -> Path:
    """Where the package of AOTInductor goes: half.pt2 has half.aoti.pt2 beside it."""
    return path.with_suffix(".aoti.pt2")


def has_compiler() -> bool:
    """Whether AOTInductor finds a C++ compiler: that of the environment variable CXX, or else its own choice."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError):  # InvalidCxxCompiler; or a file that cannot be run
        return False
    return True
