"""The checks that every operation's kernels must pass: on the CPU by the interpreter, on a GPU, or on both.

The test file of an operation derives a class from each set of checks, and names the problems to check as attributes.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from layouts import LAYOUTS
from operations import Masked, Problem, Tensors, check, relative_error, run

import skd_kernels as kernels
from skd_kernels.gpu.launch import watch

HALF = torch.float16  # the interpreter's bfloat16 products are wrong
BOTH = (torch.float32, HALF)
Cases = dict[str, list[tuple[Problem, Any]]]


def check_alignment(name: str, arguments: dict[str, Any]) -> None:
    """Check that all tensors begin at multiples of 16 bytes, except the width, on which no kernel is specialised."""
    bases = {key: getattr(value, "base", value) for key, value in arguments.items() if key != "width"}
    tensors = {key: value for key, value in bases.items() if hasattr(value, "data_ptr")}
    assert not [key for key, tensor in tensors.items() if tensor.data_ptr() % 16], name


def in_dtypes(problem: Problem, controls: Any, dtypes: Any = BOTH) -> list[tuple[Problem, Any]]:
    """Every combination, as `Everywhere.cases` has them."""
    return [(replace(problem, dtype=dtype), control) for dtype in dtypes for control in controls]


def gradients_of(
    problem: Problem, leaves: Tensors, out: tuple[torch.Tensor, ...], given: Any = None
) -> tuple[torch.Tensor, ...]:
    chosen = [leaves[name] for name in problem.names if name in leaves]
    return torch.autograd.grad(out, chosen, problem.gradients() if given is None else given)


@functools.cache
def all_of(problem: Problem, control: Any) -> dict[str, Any]:
    """All outputs and gradients by the kernels."""
    return run(problem, "triton", problem.inputs(), control)


def with_gradients(problem: Problem) -> Tensors:
    return {name: tensor.requires_grad_(name in problem.names) for name, tensor in problem.inputs().items()}


@pytest.mark.usefixtures("poisoned")
class Everywhere:
    """Checks on any device.

    Attributes:
        cases: problems by purpose; each is compared with float64.
        slow: more of them, which prove little else.
        repeated: a problem, and the controls at which its results must repeat to the bit.
        compiled: problems; for each, one graph must serve all `controls`.
    """

    device: ClassVar[str] = "cpu"
    cases: ClassVar[Cases]
    slow: ClassVar[Cases] = {}
    repeated: ClassVar[tuple[Problem, tuple[Any, ...]]]
    compiled: ClassVar[tuple[Problem, ...]]
    controls: ClassVar[tuple[Any, ...]]
    backend: ClassVar[str] = "aot_eager"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cls = metafunc.cls
        if "case" in metafunc.fixturenames:
            cases = [
                pytest.param(
                    (replace(problem, device=cls.device), control),
                    id=f"{name}: {problem} at {control}",
                    marks=[pytest.mark.slow] if cases is cls.slow else [],
                )
                for cases in (cls.cases, cls.slow)
                for name, several in cases.items()
                for problem, control in several
            ]
            metafunc.parametrize("case", cases)
        if "at" in metafunc.fixturenames:
            metafunc.parametrize("at", cls.repeated[1])
        if "whole" in metafunc.fixturenames:
            metafunc.parametrize("whole", cls.compiled, ids=str)

    def test_against_float64(self, case: tuple[Problem, Any], largest_errors: dict[str, list[float]]) -> None:
        problem, control = case
        for name, (error, plain) in check(problem, control).items():
            if not problem.is_telling():
                continue
            largest = largest_errors.setdefault(f"{problem.dtype} {name}", [0.0, 0.0])
            largest[:] = max(largest[0], error), max(largest[1], plain)

    def test_runs_repeat_to_the_bit(self, at: Any) -> None:
        """And an int is a width on the device."""
        problem = replace(self.repeated[0], device=self.device)
        inputs, controls = problem.inputs(), [at, at]
        if at is not None:
            controls.append(torch.tensor(at, device=self.device))
        buffers = [problem.scores() for _ in controls]
        first, *others = (run(problem, "triton", inputs, c, scores=s) for c, s in zip(controls, buffers, strict=True))
        for again, scores in zip(others, buffers[1:], strict=True):
            assert all(torch.equal(first[name], again[name]) for name in first)
            assert scores is None or torch.equal(scores, buffers[0])

    def test_one_compilation_serves_every_call(self, whole: Problem) -> None:
        """It gives what is given without, output, gradients and scores."""
        problem = replace(whole, device=self.device)
        leaves, (scores, expected_scores) = with_gradients(problem), (problem.scores() for _ in range(2))
        graphs: list[Any] = []

        def backend(graph: Any, example: Any) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend(self.backend)(graph, example)

        def call(control: torch.Tensor) -> Any:
            with problem.autocast():
                return problem.call(leaves, control, scores)

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        with kernels.use("triton"), torch._dynamo.config.patch(error_on_recompile=True):
            for value in self.controls:
                control = value if value is None else torch.tensor(value, dtype=torch.int32, device=self.device)
                found = compiled(control)
                with problem.autocast():
                    expected = problem.call(leaves, control, expected_scores)
                results = [
                    (*out, *gradients_of(problem, leaves, out, [value.detach() ** 2 for value in out]))
                    for out in (found, expected)
                ]
                assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        assert len(graphs) == 1
        if scores is not None and expected_scores is not None:
            assert scores.gt(0).all() and torch.equal(scores, expected_scores)


class Interpreted(Everywhere):
    """Checks without a GPU only, because the results on a GPU would be the same.

    Attributes:
        small: a problem with the fewest programs possible; the width `at_half` keeps half of its coordinates.
        large: a problem whose work is counted, at `large.full` and at a quarter of it.
        tiled: a problem with more tiles in every direction than the width `at_tiles` needs.
    """

    small: ClassVar[Masked]
    at_half: ClassVar[int]
    large: ClassVar[Masked]
    tiled: ClassVar[tuple[Masked, ...]]
    at_tiles: ClassVar[int]

    @pytest.mark.parametrize("kind", [torch.int64, torch.int32, int])
    def test_widths_of_every_kind(self, kind: Any) -> None:
        width = self.at_half if kind is int else torch.tensor(self.at_half, dtype=kind)
        self.compare(self.small, width, self.at_half)

    @pytest.mark.parametrize("above", [True, False])
    def test_a_device_width_out_of_range_does_not_lead_out_of_the_buffers(self, above: bool) -> None:
        self.compare(self.small, torch.tensor(1000 if above else -3), self.small.full if above else 0)

    def compare(self, problem: Masked, width: Any, expected: int) -> None:
        inputs = problem.inputs()
        want = run(problem, "reference", inputs, expected)
        for name, got in run(problem, "triton", inputs, width).items():
            torch.testing.assert_close(got, want[name])

    def test_views_and_strides(self) -> None:
        """Transposed x, an expanded gradient, parts of larger or transposed weights, a column, one number."""
        problem = self.small
        x, into, bias, out_of, shift = problem.inputs().values()
        wide = torch.cat([into, torch.full_like(into, torch.nan)], 1)
        tall = torch.cat([out_of.mT.contiguous(), torch.full_like(out_of.mT, torch.nan)])
        column = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
        views = LAYOUTS["transposed"](x), wide[:, : into.shape[1]], column, tall[: problem.inner].mT
        inputs = dict(zip(problem.names, (*views, shift[:1].expand(len(shift))), strict=True))
        given = [torch.ones(()).expand(problem.shape)]
        found, expected = (run(problem, name, inputs, self.at_half, given) for name in ("triton", "reference"))
        for name, got in found.items():
            torch.testing.assert_close(got, expected[name])

    @pytest.mark.parametrize(
        ("dtype", "layout"), [(torch.float32, "unaligned"), (torch.float32, "strided rows"), (HALF, "strided rows")]
    )
    def test_operands_begin_at_multiples_of_16_bytes(self, dtype: torch.dtype, layout: str) -> None:
        """Whatever they are parts of, as the kernels expect that are compiled ahead of time.

        Rows of x and of the gradient may be parts of longer ones, here with NaN between them, in place.
        """
        problem = replace(self.small, dtype=dtype)

        def laid_out(tensor: torch.Tensor) -> torch.Tensor:
            if layout == "unaligned":
                return LAYOUTS["unaligned"](tensor)
            return torch.cat([tensor, torch.full_like(tensor, torch.nan)], -1)[..., : tensor.shape[-1]]

        plain, given = problem.inputs(), problem.gradients()
        inputs = {name: laid_out(tensor) if tensor.ndim > 1 else tensor for name, tensor in plain.items()}
        strides = set()

        def look(name: str, arguments: dict[str, Any]) -> None:
            check_alignment(name, arguments)
            strides.update(arguments.get(key) for key in ("stride_a", "stride_b"))

        with watch(look):
            found = run(problem, "triton", inputs, self.at_half, [laid_out(grad) for grad in given])
        for name, want in run(problem, "triton", plain, self.at_half, given).items():
            assert torch.equal(found[name], want), name
        assert (2 * problem.shape[-1] in strides) == (layout == "strided rows")

    def test_the_graph_of_a_gradient_keeps_the_scores_out(self) -> None:
        leaves, scores = with_gradients(self.small), self.small.scores()
        assert scores is not None
        with kernels.use("triton"):
            (out,) = self.small.call(leaves, self.at_half, scores)
        torch.autograd.grad(out.sum(), leaves["x"], create_graph=True)
        assert bool(scores.any()) and not scores.requires_grad

    def test_one_buffer_of_scores_serves_several_passes(self) -> None:
        """Two forward passes before two backward passes: the first backward writes what the second needs."""
        results = []
        for name in ("triton", "reference"):
            leaves, scores = with_gradients(self.small), self.small.scores()
            assert scores is not None
            with kernels.use(name):
                outs = [self.small.call(leaves, width, scores)[0] for width in (self.at_half, self.small.full)]
            for out in outs:
                out.sum().backward()
            results.append(scores)
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("places", ["0", "1", "2", "3", "4", "12", "1234", "0134"])
    def test_only_what_is_asked_for_is_computed(self, places: str, launched: list[tuple[str, Any]]) -> None:
        problem, inputs = self.small, self.small.inputs()
        into_coordinates = set(problem.names[:3])
        everything = all_of(problem, self.at_half)
        chosen, scores = [problem.names[int(place)] for place in places], problem.scores()
        leaves = {name: tensor.detach().requires_grad_(name in chosen) for name, tensor in inputs.items()}
        assert scores is not None
        with kernels.use("triton"):
            (out,) = problem.call(leaves, self.at_half, scores)
        launched.clear()
        out.backward(problem.gradients()[0])
        started = [name for name, _ in launched]
        scored = not into_coordinates.isdisjoint(chosen)
        expected = set().union(*(problem.kernels_of[name] for name in chosen))
        assert set(started) == (expected | {problem.scored_by} if scored else expected)
        assert started.count("weight_gradient_kernel") == len(set(problem.names[1::2]) & set(chosen))
        # The gradient at x; of attention also the one at o, which all of the first three inputs need.
        before = scored if "linear" in problem.kernels_of[problem.names[1]] else 0
        assert started.count("linear") == before + ("x" in chosen)
        assert bool(scores[..., : self.at_half].gt(0).all()) == scored
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, everything[name]) if name in chosen else leaf.grad is None

    @pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_past_the_tiles_everything_is_nan(self, index: int) -> None:
        """What is saved between the passes, a packed weight too; `cases` see that it does no harm."""
        problem = self.tiled[index]
        cases = itertools.chain(*self.cases.values(), *self.slow.values())
        assert any(problem == other for other, _ in cases)
        saved: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda kept: kept
        )
        with kernels.use("triton"), hooks:
            problem.call(with_gradients(problem), self.at_tiles)
        matrices = [tensor for tensor in saved if tensor.ndim == 2]
        # The last of them, the weight out of the coordinates, is packed in pieces of 256 columns.
        assert len(matrices) == 4 and all(tensor.isnan().any() for tensor in matrices[:-1])

    def test_nothing_is_saved_without_gradients(self) -> None:
        with kernels.use("triton"):
            assert self.small.call(self.small.inputs(), self.at_half)[0].grad_fn is None

    def test_work_shrinks_with_the_width(self, multiplications: list[int]) -> None:
        """The multiplications of every dot product that the interpreter computes; whole tiles of 64 coordinates."""
        work, inputs = [], self.large.inputs()
        for width in (self.large.full, self.large.full // 4, 0):
            multiplications.clear()
            run(self.large, "triton", inputs, width)
            work.append(sum(multiplications))
        full, quarter, none = work
        assert none == 0 < quarter <= full / 4

    @pytest.fixture
    def multiplications(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Of each dot product that the interpreter has computed."""
        from triton.runtime.interpreter import InterpreterBuilder

        products: list[int] = []
        dot = InterpreterBuilder.create_dot

        def count(self: Any, a: Any, b: Any, *args: Any) -> Any:
            products.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
            return dot(self, a, b, *args)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
        return products

    def test_autocast_casts_as_linear_does(self) -> None:
        """The gradients of parameters in float32 are the sums that others would round to half precision."""
        leaves, given = with_gradients(self.small), [self.small.gradients()[0].half()]
        halved = {name: tensor.detach().half().requires_grad_() for name, tensor in leaves.items()}
        with kernels.use("triton"):
            with torch.autocast("cpu", dtype=HALF):
                found = self.small.call(leaves, self.at_half)
            expected = self.small.call(halved, self.at_half)
        assert found[0].dtype == HALF and torch.equal(found[0], expected[0])
        results = (gradients_of(self.small, *both, given) for both in ((leaves, found), (halved, expected)))
        for name, exact, half in zip(leaves, *results, strict=True):
            assert exact.dtype == torch.float32 and torch.equal(exact.half(), half)
            assert torch.equal(exact, half.float()) == (name == "x"), name

    def test_an_image_with_nan_does_not_reach_the_others(self) -> None:
        problem = replace(self.small, shape=(3, 9, 16))
        inputs = problem.inputs()
        clean = run(problem, "triton", inputs, self.at_half, wanted=("x",))
        inputs["x"][1, 3] = torch.nan
        for name, got in run(problem, "triton", inputs, self.at_half, wanted=("x",)).items():
            assert got[1].isnan().any() and torch.equal(got[[0, 2]], clean[name][[0, 2]])

    def check_operators(self, forward: Any, backward: Any, problem: Masked, arguments: Any, options: Any) -> None:
        """torch.library accepts them.

        With deterministic algorithms, what lies past the width repeats: opcheck compares whole saved buffers.
        """
        width = torch.tensor(self.at_half, dtype=torch.int32)
        torch.use_deterministic_algorithms(True)
        try:
            leaves = with_gradients(problem)
            torch.library.opcheck(forward, (*leaves.values(), width, None, *arguments))
            x, *parameters = (tensor.detach() for tensor in leaves.values())
            y, *saved = forward(x, *parameters, width, None, *arguments)
            for needs in ([True] * 6, [False, True, False, False, True, False]):
                call = (y, x, *saved, width, problem.full, *options, torch.float32, needs)
                torch.library.opcheck(backward, call, test_utils=("test_schema", "test_faketensor"))
        finally:
            torch.use_deterministic_algorithms(False)


class OnGpu(Everywhere):
    """Checks on a GPU only.

    Attributes:
        replayed: a problem whose CUDA graph is replayed at all `replays`.
        asynchronous: a problem, and a control on the device, for which the host must never wait for the device.
    """

    device = "cuda"
    backend = "inductor"
    replayed: ClassVar[Problem]
    replays: ClassVar[tuple[Any, ...]]
    asynchronous: ClassVar[tuple[Problem, Any]]

    def test_it_is_chosen_and_never_stops_the_host(self) -> None:
        problem, value = self.asynchronous
        problem = replace(problem, device="cuda")
        leaves = with_gradients(problem)
        control = torch.tensor(value, dtype=torch.int32, device="cuda")

        def step() -> None:
            sum(out.sum() for out in problem.call(leaves, control)).backward()  # type: ignore[union-attr]

        assert problem.chosen(leaves, control) == "triton"
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_one_cuda_graph_replays_every_call(self) -> None:
        """Forward and backward; the control, and nothing else, changes between replays."""
        problem = replace(self.replayed, device="cuda")
        leaves, given = with_gradients(problem), problem.gradients()
        control = torch.tensor(self.replays[0], dtype=torch.int32, device="cuda")

        def step() -> list[torch.Tensor]:
            out = problem.call(leaves, control)
            return [
                *out,
                *gradients_of(problem, leaves, out, [g.to(v.dtype) for g, v in zip(given, out, strict=True)]),
            ]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for value in self.replays:
            control.copy_(torch.tensor(value, dtype=torch.int32))
            graph.replay()
            replayed = [result.clone() for result in results]
            for found, want in zip(replayed, step(), strict=True):
                assert torch.equal(found, want)

    def check_tf32(self, problem: Masked, width: int) -> dict[str, tuple[float, float]]:
        """The errors of the kernels and of PyTorch's own way where PyTorch allows TF32; that it is used."""
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        problem = replace(problem, device="cuda")
        inputs, given = problem.inputs(), [torch.ones(problem.shape, device="cuda")]
        exact = run(problem, "reference", {n: tensor.double() for n, tensor in inputs.items()}, width, given)
        plain, found = (run(problem, name, inputs, width, given) for name in ("slices", "triton"))
        errors = {n: (relative_error(found[n], exact[n]), relative_error(plain[n], exact[n])) for n in exact}
        assert max(error for error, _ in errors.values()) > 1e-5
        return errors

    def check_last_rows(self, problem: Masked, last: int) -> float:
        """How far the last rows, or images, are off those of a call on them alone."""
        if torch.cuda.mem_get_info()[0] < 24 * 2**30:
            pytest.skip("needs 24 GiB of device memory")
        inputs = replace(problem, device="cuda").inputs()
        part = inputs["x"][:, -last:] if problem.shape[0] == 1 else inputs["x"][-last:]
        with torch.no_grad(), kernels.use("triton"):
            (found,) = problem.call(inputs, problem.full)
            (want,) = problem.call({**inputs, "x": part}, problem.full)
        return relative_error(found[:, -last:] if problem.shape[0] == 1 else found[-last:], want)
