"""explain, use and build_info."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import skd_kernels as kernels
from skd_kernels._dispatch import TensorSpec, forced
from skd_kernels.gpu import entry

SHAPES = ((2, 5, 12), (20, 12), (20,), (12, 20), (12,))


def test_explain_from_shapes_alone() -> None:
    explanation = kernels.explain(kernels.masked_mlp, *SHAPES, 7)
    assert explanation.operation == "masked_mlp"
    assert explanation.chosen == "slices"
    assert "reference" in explanation.refused
    assert "masked_mlp: slices" in str(explanation)


def test_explain_from_tensors_and_names() -> None:
    tensors: list[Any] = [torch.zeros(shape) for shape in SHAPES]
    assert kernels.explain("masked_mlp", *tensors, torch.tensor(3)).chosen == "slices"
    assert kernels.explain("taylor_scores", (4, 8), (4, 8), dtype=torch.bfloat16).chosen == "compiled"
    assert kernels.explain("weighted_covariance", (4, 2, 8), (4, 2, 8)).chosen == "compiled"


def test_why_the_compiled_statistics_are_refused() -> None:
    x = torch.zeros(4, 8, requires_grad=True)
    assert "a gradient is asked for" in kernels.explain("taylor_scores", x, x).refused["compiled"]
    with torch.no_grad():
        assert kernels.explain("taylor_scores", x, x).chosen == "compiled"
    meta = kernels.explain("taylor_scores", (4, 8), (4, 8), device="meta")
    assert meta.refused["compiled"] == "there is no kernel for meta"
    double = kernels.explain("token_moments", (4, 2, 8), (4, 2, 8), dtype=torch.float64, device="cuda")
    assert double.chosen == "reference"


def test_a_device_width_is_not_read_by_the_host() -> None:
    width = torch.empty((), dtype=torch.int32, device="meta")
    explanation = kernels.explain("masked_mlp", *SHAPES, width, device="meta")
    assert explanation.chosen == "reference"
    assert "stall the host" in explanation.refused["slices"]


def test_old_gpus_are_refused_by_name_also_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_by_us() -> bool:  # the compiler asks too, and would look for the device
        return sys._getframe(1).f_code.co_name == "_capability"

    monkeypatch.setattr(torch.cuda, "is_available", asked_by_us)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))

    def reason(x: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        return x + 1, entry.refuses_triton(TensorSpec((1, 2, 4), torch.float16, "cuda"))

    expected = "it needs compute capability 8.0; the device has 7.5"
    for function in (reason, torch.compile(reason, backend="eager", fullgraph=True)):
        assert function(torch.zeros(1))[1] == expected


def test_explain_rejects_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="op is 'conv'"):
        kernels.explain("conv")
    with pytest.raises(ValueError, match="missing a required argument"):
        kernels.explain("masked_mlp", (2, 5, 12))


def test_use_forces_and_restores() -> None:
    with kernels.use("reference"):
        explanation = kernels.explain("masked_mlp", *SHAPES, 7)
        assert explanation.chosen == "reference"
        assert "is in force" in explanation.refused["slices"]
    assert kernels.explain("masked_mlp", *SHAPES, 7).chosen == "slices"


def test_use_raises_when_the_call_is_not_eligible() -> None:
    width = torch.empty((), dtype=torch.int32, device="meta")
    tensors: list[Any] = [torch.zeros(shape, device="meta") for shape in SHAPES]
    with kernels.use("slices"), pytest.raises(ValueError, match=r"no implementation accepts.*stall the host"):
        kernels.masked_mlp(*tensors, width)
    with pytest.raises(ValueError, match="name is 'magic'"), kernels.use("magic"):
        pass


def ask_compiled() -> Callable[[], str | None]:
    """A compiled function that says which implementation is forced where it is called."""

    def ask(x: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        return x + 1, forced()

    compiled = torch.compile(ask, backend="eager", fullgraph=True)
    return lambda: compiled(torch.zeros(1))[1]


def test_compiled_code_obeys_nested_use() -> None:
    ask = ask_compiled()
    seen = [ask()]
    with kernels.use("reference"):
        with kernels.use("slices"):
            with kernels.use("reference"):
                seen.append(ask())
            seen.append(ask())
        seen.append(ask())
        with pytest.raises(KeyError), kernels.use("slices"):
            raise KeyError
        seen.append(ask())
    assert [*seen, ask()] == [None, "reference", "slices", "reference", "reference", None]


def test_interleaved_threads_force_nothing_upon_each_other() -> None:
    """One enters, the other enters, the first leaves, then the second: each sees its own, and nothing stays."""
    ask = ask_compiled()
    turns = [threading.Event() for _ in range(4)]
    seen: dict[str, list[tuple[str | None, str | None]]] = {"reference": [], "slices": []}

    def work(name: str, enter: int, leave: int) -> None:
        if enter:
            assert turns[enter - 1].wait(60)
        with kernels.use(name):
            seen[name].append((forced(), ask()))
            turns[enter].set()
            assert turns[leave - 1].wait(60)
            seen[name].append((forced(), ask()))
        seen[name].append((forced(), ask()))
        turns[leave].set()

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(work, "reference", 0, 2), pool.submit(work, "slices", 1, 3)]
        assert turns[1].wait(60)
        assert (forced(), ask()) == (None, None), "a third thread, while two are in their blocks"
        for thread in threads:
            thread.result()
    assert seen == {name: [(name, name), (name, name), (None, None)] for name in seen}
    assert (forced(), ask()) == (None, None)


def test_blocks_of_one_thread_may_end_in_any_order() -> None:
    """As those of generators and asyncio tasks do."""

    def block(name: str) -> Iterator[None]:
        with kernels.use(name):
            yield

    ask = ask_compiled()
    first, second = block("reference"), block("slices")
    next(first), next(second)
    assert ask() == forced() == "slices"
    first.close()
    assert ask() == forced() == "slices"
    second.close()
    assert ask() is forced() is None


def test_build_info_says_what_is_compiled() -> None:
    info = kernels.build_info()
    assert info["compiled"] is True and info["reason"] == ""
    assert info["compiler"] and info["cpu_level_in_use"]
    assert bool(info["cuda_toolkit"]) is bool(info["cuda_architectures"]) is info["cuda"]
    assert info["torch"] == torch.__version__
    masked, statistics = {"masked_mlp", "masked_attention"}, {"token_moments", "taylor_scores"}
    assert set(info["implementations"]) == masked | statistics | {"residual_norm"}


WITHOUT = """
import sys, warnings
sys.modules["skd_kernels._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import skd_kernels, torch
    x = torch.ones(9, 2, 4)
    compiled = torch.compile(skd_kernels.weighted_covariance, fullgraph=True, backend="aot_eager")
    found = compiled(x, x), skd_kernels.weighted_covariance(x, x), skd_kernels.taylor_scores(x, x)
told = [str(each.message) for each in caught if "skd" in str(each.message)]
assert len(told) == 1 and "without its compiled half" in told[0], told
assert skd_kernels.build_info()["compiled"] is False
"""


def test_without_the_extension_all_works_and_one_warning_says_so() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)
