"""What `benchmarks.precompile` leaves in a folder, and how a machine with a GPU puts it to use.

    manifest.json       for which versions it is, and what it holds
    skd_kernels/_C.*    the compiled extension
    triton.tar.gz       a Triton cache: kernels, and what Triton compiles with gcc to start them

Triton's cache keys name the installation of Triton that made them. The folder is of use only where Triton has the
same version; then `use` makes that part of the key equal by a sitecustomize.py, which every Python process reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu_run import ROOT

MANIFEST, ARCHIVE = "manifest.json", "triton.tar.gz"
SITE = '''"""Makes the part of Triton's cache keys that names its installation that of a cache made elsewhere."""

import importlib.util
import pathlib
import runpy
import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "triton.runtime.cache":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.triton_key = lambda: {key!r}

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
# Python reads one file of this name: the one that it would have read is read here.
for folder in map(pathlib.Path, sys.path):
    other = folder / "sitecustomize.py"
    if other.is_file() and not other.samefile(__file__):
        runpy.run_path(str(other))
        break
'''


@dataclass(frozen=True)
class Manifest:
    """What a folder holds, and for which machine.

    Attributes:
        python: major and minor version, such as "3.12".
        triton: its version.
        key: the part of Triton's cache keys that names the installation that compiled the kernels.
        torch: the version that the kernels and the extension were made with.
        architectures: of the kernels, 10 * major + minor of the compute capability.
        compiled: how many kernels are in the cache, and libraries that start them.
        sources: `digest` of what was compiled.
    """

    python: str
    triton: str
    key: str
    torch: str
    architectures: list[int]
    compiled: int
    sources: str

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises ValueError if the folder is not one of `benchmarks.precompile`."""
        try:
            return Manifest(**json.loads((folder / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} is not what `python -m benchmarks.precompile` leaves: {error}") from None

    def refusal(self, architecture: int | None = None) -> str | None:
        """Why this Python cannot use the folder on a GPU of that architecture, or None."""
        python = "{}.{}".format(*sys.version_info)
        if python != self.python:
            return f"it is for Python {self.python}, and this is {python}"
        triton = installed("triton")
        if triton != self.triton:
            return f"it is for triton {self.triton}, and {triton} is installed"
        if architecture is not None and architecture not in self.architectures:
            return f"it is for the architectures {self.architectures}, and this GPU is of {architecture}"
        return None if digest() == self.sources else "it was made of other sources than these"


def digest() -> str:
    """Of all that is compiled: the extension's sources and the Triton kernels."""
    found = hashlib.sha256()
    patterns = ("setup.py", "csrc/*.cpp", "csrc/*.cu", "csrc/*.h", "skd_kernels/gpu/*.py")
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class InUse:
    """What `use` has put in place.

    Attributes:
        variables: of the environment, that make Python processes use the cache.
        extension: whether there was an extension too.
    """

    variables: dict[str, str]
    extension: bool


def use(folder: Path, scratch: Path, architecture: int | None = None) -> InUse:
    """Unpack the cache into `scratch` and put the extension in place.

    Raises:
        ValueError: the folder is not for this Python, this GPU and these sources, or it is damaged.
    """
    manifest = Manifest.read(folder)
    if reason := manifest.refusal(architecture):
        raise ValueError(f"{folder} cannot be used: {reason}")
    cache, site = scratch / "triton", scratch / "site"
    try:
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(cache, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        shutil.rmtree(cache, ignore_errors=True)
        raise ValueError(f"{folder / ARCHIVE} cannot be unpacked: {error}") from None
    relocate(cache)
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(key=manifest.key))
    extensions = list((folder / "skd_kernels").glob("_C.*"))
    for extension in extensions:
        target = ROOT / "skd_kernels" / extension.name
        shutil.copy(extension, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)  # a process that has the old one loaded keeps it
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return InUse({"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}, bool(extensions))


def relocate(cache: Path) -> None:
    """Triton writes the whole paths of a kernel's files into its cache: they become those of `cache`."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in paths}}))


def compiled_in(cache: Path) -> dict[str, str]:
    """The name of each kernel in a Triton cache, and of what starts them, by its folder and when it was made."""
    found = [*cache.glob("*/*.cubin"), *cache.glob("*/*.so")]
    return {f"{path.parent.name} {path.stat().st_mtime_ns}": path.name.partition(".")[0] for path in found}


def compiled_since(cache: Path, before: dict[str, str]) -> Counter[str]:
    """How many of each name were compiled into a cache since; the kernels of torch.compile together."""
    added = (name for key, name in compiled_in(cache).items() if key not in before)
    return Counter("torch.compile" if name.startswith("triton_") else name for name in added)
