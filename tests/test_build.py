"""setup.py: what it builds, what it says, what the packages hold. Only the slow tests compile.

`test_wheel.py` builds the wheel, and runs it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pybind11
import pytest
import torch

from skd.support.requirements import OLDEST_TIMM

ROOT = Path(__file__).parent.parent
SOURCES = ("csrc", "skd", "skd_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")

DECIDE_THE_BUILD = ("CUDA", "CXX", "SKD_CUDA", "TORCH_CUDA_ARCH_LIST")  # not to be taken from who runs the tests

RECIPES = {str(path.relative_to(ROOT)) for path in (ROOT / "skd" / "recipes").glob("*.yaml")}


def copy_sources(folder: Path) -> None:
    """Copy the files that are packaged, so that builds leave nothing in the checkout."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy_sources(tmp_path / "checkout")
    return tmp_path / "checkout"


def setup(
    checkout: Path, *arguments: str, path: str | None = None, **environment: str
) -> subprocess.CompletedProcess:
    variables = {key: value for key, value in os.environ.items() if not key.startswith(DECIDE_THE_BUILD)}
    if path is not None:
        variables["PATH"] = path
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=checkout, env=variables | environment, capture_output=True, text=True, check=False
    )


CPP_EXTENSION = """
from setuptools.command.build_ext import build_ext as BuildExtension

include_paths = library_paths = list
"""


@pytest.fixture
def cuda_torch(tmp_path: Path) -> Callable[[str | None], str]:
    """A PYTHONPATH with what setup.py sees of a PyTorch of this CUDA; PyTorch itself takes seconds to import."""

    def built_with(version: str | None) -> str:
        (tmp_path / "site" / "torch" / "utils").mkdir(parents=True, exist_ok=True)
        versions = f"class version:\n    cuda = {version!r}\n\n\n__version__ = '2.11.0'\n"
        (tmp_path / "site" / "torch" / "__init__.py").write_text(versions)
        (tmp_path / "site" / "torch" / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION)
        return str(tmp_path / "site")

    return built_with


@pytest.fixture
def only_a_compiler(tmp_path: Path) -> str:
    """A PATH with a C++ compiler and no nvcc."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").symlink_to("/usr/bin/true")
    return str(tmp_path / "bin")


def test_without_a_compiler_it_warns_and_goes_on(checkout: Path, tmp_path: Path) -> None:
    done = setup(checkout, "--name", path=str(tmp_path))
    assert done.returncode == 0 and done.stdout.strip().endswith("skd")
    assert "no C++ compiler, nothing is compiled" in done.stderr


def test_without_nvcc_it_says_so(checkout: Path, only_a_compiler: str, cuda_torch: Callable) -> None:
    site = cuda_torch("13.2")
    done = setup(checkout, "--name", path=only_a_compiler, PYTHONPATH=site)
    assert done.returncode == 0
    assert "CUDA kernels are not built: nvcc is not on PATH" in done.stderr and "building CPU kernels" in done.stderr
    done = setup(checkout, "--name", path=only_a_compiler, PYTHONPATH=site, SKD_CUDA="off")
    assert "CUDA kernels are not built: SKD_CUDA=off" in done.stderr


def test_cuda_on_without_nvcc_is_an_error_with_the_fix(checkout: Path, only_a_compiler: str) -> None:
    done = setup(checkout, "--name", path=only_a_compiler, SKD_CUDA="on")
    assert done.returncode != 0
    assert "SKD_CUDA=on, but nvcc is not on PATH (install the CUDA toolkit, or set CUDA_HOME" in done.stderr
    done = setup(checkout, "--name", SKD_CUDA="perhaps")
    assert done.returncode != 0 and "it may be auto, on or off" in done.stderr


def write_nvcc(folder: str, toolkit: Path, version: str = "", codes: Sequence[str] = ()) -> str:
    """Write a script that answers as nvcc does; a PATH that contains it."""
    nvcc = Path(folder) / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
case $1 in
--dryrun) echo '#$ TOP={toolkit}/bin/..' >&2 ;;
--version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
--list-gpu-code) printf '%s\\n' {" ".join(codes)} ;;
esac
""")
    nvcc.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_a_wrapped_nvcc_still_finds_its_toolkit(
    checkout: Path, only_a_compiler: str, tmp_path: Path, cuda_torch: Callable
) -> None:
    """nvcc on PATH may be a script; only nvcc itself knows where it lives."""
    path = write_nvcc(only_a_compiler, tmp_path / "toolkit")
    done = setup(checkout, "--name", path=path, PYTHONPATH=cuda_torch("13.2"))
    assert f"toolkit {tmp_path}/toolkit, architectures 8.0;9.0;10.0" in done.stderr


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    [
        ("13.2", "is of CUDA 12.8 and PyTorch of CUDA 13.2 (install a toolkit of CUDA 13, or set CUDA_HOME"),
        (None, "the PyTorch it is built against is without CUDA (install a CUDA build of PyTorch)"),
    ],
)
def test_a_toolkit_that_pytorch_refuses_is_not_used(
    checkout: Path, only_a_compiler: str, tmp_path: Path, cuda_torch: Callable, torch_cuda: str | None, reason: str
) -> None:
    path, site = write_nvcc(only_a_compiler, tmp_path / "toolkit", "12.8"), cuda_torch(torch_cuda)
    done = setup(checkout, "--name", path=path, PYTHONPATH=site)
    assert done.returncode == 0 and "building CPU kernels" in done.stderr
    assert "CUDA kernels are not built: " in done.stderr and reason in done.stderr
    done = setup(checkout, "--name", path=path, PYTHONPATH=site, SKD_CUDA="on")
    assert done.returncode != 0 and "SKD_CUDA=on, but " in done.stderr and reason in done.stderr


def test_default_architectures_are_those_that_nvcc_knows(
    checkout: Path, only_a_compiler: str, tmp_path: Path, cuda_torch: Callable
) -> None:
    path, site = write_nvcc(only_a_compiler, tmp_path, "12.6", ("sm_80", "sm_90")), cuda_torch("12.8")
    done = setup(checkout, "--name", path=path, PYTHONPATH=site)
    assert "architectures 10.0 are left out: " in done.stderr and "architectures 8.0;9.0\n" in done.stderr
    done = setup(checkout, "--name", path=path, PYTHONPATH=site, TORCH_CUDA_ARCH_LIST="10.0")
    assert "left out" not in done.stderr and "architectures 10.0\n" in done.stderr


INCLUDES = """
import setuptools

setuptools.setup = lambda **given: print(*given["ext_modules"][0].include_dirs, sep="\\n")
import runpy

runpy.run_path("setup.py")
"""


def test_the_package_s_pybind11_is_found_before_the_one_that_pytorch_brings(checkout: Path) -> None:
    """PyTorch 2.11 brings one that refuses to be included together with a target of the stable ABI."""
    done = subprocess.run(
        [sys.executable, "-c", INCLUDES],
        cwd=checkout,
        env=os.environ | {"SKD_CUDA": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    folders = [Path(line) for line in done.stdout.splitlines()]
    having = [folder for folder in folders if (folder / "pybind11" / "pybind11.h").exists()]
    assert having[0] == Path(pybind11.get_include())


def test_an_older_timm_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text('__version__ = "1.0.29"\n')
    done = subprocess.run(
        [sys.executable, "-c", "import skd"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert last == (
        "ImportError: skd needs timm 1.0.31 or newer, and timm 1.0.29 is installed (pip install --upgrade timm)"
    )
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"timm>={OLDEST_TIMM}" in needed and OLDEST_TIMM in last


def test_the_source_distribution_has_every_source(checkout: Path, tmp_path: Path, cuda_torch: Callable) -> None:
    command = ["-q", "sdist", "--dist-dir", str(tmp_path / "dist")]
    done = setup(checkout, *command, PYTHONPATH=cuda_torch(None), SKD_CUDA="off")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    wanted |= {"LICENSE", "setup.py", "skd/py.typed", "skd_kernels/py.typed", "skd_kernels/_native.py"}
    wanted |= RECIPES
    assert wanted <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests/golden")]


def test_a_wheel_has_the_recipes(checkout: Path, tmp_path: Path, cuda_torch: Callable) -> None:
    """`build_py` collects what a wheel holds beside the compiled half."""
    command = ["-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    done = setup(checkout, *command, PYTHONPATH=cuda_torch(None), SKD_CUDA="off")
    assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    assert len(RECIPES) >= 4 and RECIPES | {"skd/py.typed", "skd/recipes/__init__.py"} <= built


def pip(*arguments: str, **environment: str) -> str:
    """Run pip; the text that it and setup.py print."""
    command = [sys.executable, "-m", "pip", *arguments, "--verbose", "--no-deps", "--no-build-isolation"]
    variables = os.environ | {"SKD_CUDA": "off"} | environment
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def run_with(packages: Path, code: str) -> str:
    """The output of `code` in a new process that sees `packages`, but no editable install (-S reads no .pth)."""
    seen = [str(packages), *(path for path in sys.path if path.endswith("site-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=packages,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(seen)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERY_OPERATION = """
import torch
import skd_kernels as kernels

x, grad = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
print(kernels.__file__)
print(kernels.build_info()["compiled"])
print(*kernels.weighted_covariance(x, grad).shape)
print(*kernels.taylor_scores(x, grad).shape)
x = torch.randn(2, 5, 12)
print(*kernels.masked_mlp(x, torch.randn(20, 12), None, torch.randn(12, 20), None, 7).shape)
print(*kernels.masked_attention(x, torch.randn(36, 12), None, torch.randn(12, 12), None, 2, num_heads=3).shape)
"""


def test_what_is_installed_without_a_compiler_works(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    packages = tmp_path / "packages"
    printed = pip("install", str(checkout), "--target", str(packages), PATH=str(tmp_path / "bin"), CXX="")
    assert "no C++ compiler, nothing is compiled" in printed
    assert not list(packages.rglob("*.so"))
    file, *rest = run_with(packages, EVERY_OPERATION).splitlines()
    assert Path(file).is_relative_to(packages)
    assert rest == ["False", "3 4 4", "4", "2 5 12", "2 5 12"]


LOAD_WITH_CUDA = """
import torch
import skd_kernels as kernels

info = kernels.build_info()
print(info["reason"], info.get("cuda"), info.get("cuda_toolkit"), info.get("cuda_architectures"), sep="|")
for name in ("token_moments", "taylor_scores"):
    print(torch._C._dispatch_has_kernel_for_dispatch_key(f"skd_kernels::{name}", "CUDA"))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is a build without CUDA")
def test_an_extension_with_cuda_loads_without_a_gpu(checkout: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    said = pip("install", str(checkout), "--target", str(packages), SKD_CUDA="on", TORCH_CUDA_ARCH_LIST="9.0")
    answer = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = answer.split("release ")[1].split(",")[0]
    assert re.search(rf"filename=skd-[\d.]+-1cu{version.replace('.', '')}-cp", said), "the wheel's build tag"
    assert run_with(packages, LOAD_WITH_CUDA).splitlines() == [f"|True|{version}|9.0", "True", "True"]


@pytest.mark.slow
def test_an_editable_install_runs_from_the_checkout(checkout: Path, tmp_path: Path) -> None:
    """In a new environment that sees the packages of this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip("--python", str(python), "install", "--editable", str(checkout), PYTHONPATH="")
    code = "import skd, skd_kernels; print(skd.__file__, skd_kernels.__file__, skd_kernels.build_info()['compiled'])"
    found = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, compiled = found.stdout.split()
    assert Path(first).is_relative_to(checkout) and Path(second).is_relative_to(checkout) and compiled == "True"
