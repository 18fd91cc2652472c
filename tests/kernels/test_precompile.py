"""Kernels compiled without a GPU: which ones, by which keys, and how another machine finds them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from operations import Mlp, check
from triton.tools.tensor_descriptor import TensorDescriptor

import skd_kernels as kernels
from benchmarks import precompile, pretend
from skd_kernels.gpu import mlp
from skd_kernels.gpu.launch import Launch, _describe, record

ROOT = Path(__file__).parents[2]
CHEAP = ("sums_kernel", "column_sums_kernel")  # less than a second each
OF_THE_MACHINE = {"cuda_utils"}  # one library, whose key in newer versions of Triton names the folder of the driver


def call(device: str = "cuda") -> None:
    """Forward and backward of a small layer, as a program would call it."""
    shapes = ((2, 5, 32), (48, 32), (48,), (32, 48), (32,))
    leaves = [torch.zeros(shape, dtype=torch.float16, device=device).requires_grad_() for shape in shapes]
    width = torch.tensor(20, dtype=torch.int32, device=device)
    kernels.masked_mlp(*leaves, width, scores=torch.zeros(48, device=device)).sum().backward()


def with_tensors(wanted: pretend.Wanted, device: str) -> pretend.Wanted:
    """The launch with tensors in place of pointers."""

    def make(pointer: pretend.Pointer) -> torch.Tensor:
        return torch.empty(1, dtype=pointer.dtype, device=device)

    arguments = {name: pretend.replace_tensors(value, make) for name, value in wanted.arguments.items()}
    return replace(wanted, arguments=arguments)


def keys(launches: list[pretend.Wanted]) -> set[str]:
    """What Triton specialises the launches on, as `launch.record` writes it."""
    found = set()
    for wanted in launches:
        options: dict[str, Any] = wanted.options
        settings = (options["num_warps"], options["num_stages"], options.get("maxnreg"))
        found.add(_describe(wanted.kernel, with_tensors(wanted, "meta").arguments, settings, "").key())
    return found


def recorded() -> list[Launch]:
    """The same launches, recorded by running the host code on meta tensors."""
    x, w1, b1, w2, b2 = (
        torch.empty(shape, dtype=torch.float16, device="meta")
        for shape in ((2, 5, 32), (48, 32), (48,), (32, 48), (32,))
    )
    width = torch.empty((), dtype=torch.int32, device="meta")
    with record(90) as recorder:
        _, *saved = mlp.mlp_forward._init_fn(x, w1, b1, w2, b2, width, None, "gelu", False, True)
        mlp.mlp_backward._init_fn(x, x, *saved, width, 48, False, torch.float16, [True] * 6)
    return recorder.launches


def test_a_program_on_a_pretended_device_starts_what_it_would_start() -> None:
    before = torch.empty, torch.Tensor.to, torch.cuda.is_available
    found = pretend.wanted_by(90, call)
    assert keys(list(found.values())) == {launch.key() for launch in recorded()}
    assert (torch.empty, torch.Tensor.to, torch.cuda.is_available) == before
    assert torch.zeros(1).device.type == "cpu" and not torch.zeros(1, device="meta").is_cuda


def test_the_device_is_pretended_before_the_benchmarks_look_for_it() -> None:
    code = "import sys, benchmarks.pretend; raise SystemExit('benchmarks.timing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_test_for_a_gpu_goes_to_its_end_on_a_pretended_device() -> None:
    """Its questions about contents are answered as if all were right; no error is printed."""
    ended = []

    def run() -> None:
        check(Mlp((2, 75, 144), full=256, dtype=torch.bfloat16, device="cuda", act="silu", gated=True), 45)
        ended.append(True)

    found = pretend.wanted_by(90, run)
    assert ended and {launch.kernel.__name__ for launch in found.values()} > {"product_kernel", "pack_kernel"}


def test_memory_that_begins_anywhere_is_noted() -> None:
    """Triton compiles other code for a pointer that is not a multiple of 16 bytes."""

    def run() -> None:
        from skd_kernels.gpu.sums import column_sums

        rows = torch.zeros(9, 33, dtype=torch.float16, device="cuda")[:, 1:]
        column_sums(rows, torch.tensor(3, device="cuda"), torch.zeros(32, dtype=torch.float16, device="cuda"))

    pointers = [v for launch in pretend.wanted_by(90, run).values() for v in launch.arguments.values()]
    assert any(isinstance(value, pretend.Pointer) and value.remainder == 2 for value in pointers)


# The cache ------------------------------------------------------------------------------------------

COMPILE = """
import sys
from pathlib import Path

import triton.runtime.cache

if sys.argv[2]:
    triton.runtime.cache.triton_key = lambda: sys.argv[2]
from benchmarks import precompile, pretend
from test_precompile import CHEAP, call

wanted = [w for w in pretend.wanted_by(90, call).values() if w.kernel.__name__ in CHEAP]
failed = precompile.compile_all(wanted, 90, Path(sys.argv[1]), 2)
print(len(wanted), failed, triton.runtime.cache.triton_key(), sep="|")
"""


def compile_cheap(cache: Path, key: str = "", **environment: str) -> list[str]:
    """How many kernels another process compiles into a cache, what failed, and its key of the installation."""
    paths = [*filter(None, [environment.get("PYTHONPATH")]), str(ROOT), str(Path(__file__).parent)]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(cache), key],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `precompile` would leave for the cheap kernels, made by another installation of Triton."""
    import triton

    place = tmp_path_factory.mktemp("prebuilt")
    cache = place / "cache"
    count, failed, key = compile_cheap(cache, "another installation")
    assert failed == "[]" and int(count) >= 2
    precompile.pack(cache, place / precompile.ARCHIVE)
    compiled = precompile.compiled_in(cache)
    assert set(CHEAP) < set(compiled.values())  # what starts them is there too
    (place / "cache").rename(place / "gone")  # its paths lead nowhere any more
    python = "{}.{}".format(*sys.version_info)
    precompile.Manifest(
        python, triton.__version__, key, torch.__version__, [90], len(compiled), precompile.digest()
    ).write(place)
    return place


def test_a_tensor_that_is_described_is_found_by_its_type(tmp_path: Path) -> None:
    """Whatever its size and place: the launch on one that is there finds what was compiled without it."""
    described = (w for w in pretend.wanted_by(90, call).values() if w.arguments.get("EPILOGUE") == "linear")
    wanted = with_tensors(next(described), "cpu")
    tensors = {n: v for n, v in wanted.arguments.items() if isinstance(v, TensorDescriptor)}
    assert len(tensors) == 3
    for shape, new in (([64, 64], True), ([200, 72], False)):
        before = precompile.compiled_in(tmp_path)
        changed = {n: replace(v, shape=shape, strides=[shape[1], 1]) for n, v in tensors.items()}
        launch = replace(wanted, arguments=wanted.arguments | changed)
        assert precompile.compile_all([launch], 90, tmp_path, 1) == []
        added = precompile.compiled_since(tmp_path, before)
        assert added["product_kernel"] == new and (new or set(added) <= OF_THE_MACHINE)


def test_another_machine_compiles_nothing(folder: Path, tmp_path: Path) -> None:
    used = precompile.use(folder, tmp_path, 90)
    assert not used.extension  # none was made
    environment, cache = used.variables, tmp_path / "triton"
    before = precompile.compiled_in(cache)
    assert len(before) == precompile.Manifest.read(folder).compiled
    assert compile_cheap(cache, **environment)[2] == "another installation"
    assert set(precompile.compiled_since(cache, before)) <= OF_THE_MACHINE


@pytest.mark.slow
def test_without_its_key_everything_is_compiled_and_counted(folder: Path, tmp_path: Path) -> None:
    precompile.use(folder, tmp_path)
    before = precompile.compiled_in(tmp_path / "triton")
    compile_cheap(tmp_path / "triton")
    added = precompile.compiled_since(tmp_path / "triton", before)
    # What starts them does not depend on who compiles the kernels.
    assert set(added) - OF_THE_MACHINE == set(CHEAP)
    added = Counter({name: added[name] for name in CHEAP})
    assert added.total() == len([name for name in before.values() if name in CHEAP])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"triton": "3.0.0"}, "it is for triton 3.0.0, and"),
        ({"python": "3.1"}, "it is for Python 3.1, and this is"),
        ({"sources": "0"}, "it was made of other sources than these"),
    ],
)
def test_other_versions_and_sources_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    document = json.loads((folder / precompile.MANIFEST).read_text())
    (tmp_path / precompile.MANIFEST).write_text(json.dumps(document | change))
    with pytest.raises(ValueError, match=reason):
        precompile.use(tmp_path, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(ValueError, match=r"is not what `python -m benchmarks.precompile` leaves"):
        precompile.use(tmp_path / "nothing", tmp_path)


def test_another_gpu_and_a_damaged_archive_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it is for the architectures \[90\], and this GPU is of 80"):
        precompile.use(folder, tmp_path / "scratch", 80)
    shutil.copy(folder / precompile.MANIFEST, tmp_path)
    for damaged in ((folder / precompile.ARCHIVE).read_bytes()[:500], b"", None):
        (tmp_path / precompile.ARCHIVE).unlink(missing_ok=True)
        if damaged is not None:
            (tmp_path / precompile.ARCHIVE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"triton.tar.gz cannot be unpacked"):
            precompile.use(tmp_path, tmp_path / "scratch")
    assert not list(tmp_path.glob("scratch/*"))


def test_a_sitecustomize_that_was_there_is_still_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "sitecustomize.py").write_text("print('read')")
    environment = precompile.use(folder, tmp_path).variables
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(tmp_path / "there")])
    code = "import triton.runtime.cache as cache; print(cache.triton_key())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["read", "another installation"]


def test_a_compiler_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precompile, "_compile", lambda *_: os._exit(1))
    assert precompile.compile_all([], 90, tmp_path, 2) == 2 * [
        "a process that compiled has died; its other kernels are not known"
    ]


def test_kernels_of_torch_compile_are_counted_together(tmp_path: Path) -> None:
    for name in ("a/triton_poi_fused_add_0", "b/triton_red_fused_1", "c/flash_forward"):
        path = tmp_path / f"{name}.cubin"
        path.parent.mkdir()
        path.touch()
    assert precompile.compiled_since(tmp_path, {}) == Counter({"torch.compile": 2, "flash_forward": 1})
    before = precompile.compiled_in(tmp_path)
    assert precompile.compiled_since(tmp_path, before) == Counter()
    os.utime(tmp_path / "c" / "flash_forward.cubin", (0, 0))  # compiled again in its place
    assert precompile.compiled_since(tmp_path, before) == Counter({"flash_forward": 1})
