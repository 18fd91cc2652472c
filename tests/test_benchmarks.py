"""The tools of benchmarks/: contenders agree, `op` prints, pytest-benchmark compares. Nothing is timed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_batches, tiny_vit

from benchmarks import op, result, steps, table, test_passes, test_steps, timing
from benchmarks import train_fashion_mnist as fashion_mnist
from benchmarks import train_throughput as throughput
from benchmarks.accuracy import summary
from benchmarks.op import OURS, Case
from benchmarks.registry import COMPILED, LAYERS, MASKED, OPERATIONS, STATISTICS
from benchmarks.result import Info, Result
from benchmarks.timing import peak_of_call, peak_of_process, side_by_side
from skd.convert import convert
from skd.data import data_config
from skd_kernels import _dispatch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {
    "token_moments": (700, 3, 8),
    "taylor_scores": (5000, 40),
    "masked_mlp": (2, 7, 24, 50, 33),
    "masked_attention": (2, 7, 3, 8, 5),
    "residual_norm": (2, 7, 24),
}


def plain(name: str) -> list[str]:
    """Our contender and those without torch.compile, which would take seconds."""
    return [OURS, *OPERATIONS[name].ways]


def case_of(name: str, dtype: torch.dtype = torch.float32, total_bytes: int = 0) -> Case:
    return Case(OPERATIONS[name], SHAPES[name], dtype, "cpu", total_bytes)


def test_every_operation_of_the_library_is_in_the_registry() -> None:
    """Whoever adds one is told here that it is not measured."""
    assert set(OPERATIONS) == set(_dispatch._operations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_contenders_agree(name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients."""
    sums_in_float32 = name in STATISTICS and dtype == torch.float64
    case = case_of(name, dtype)
    contenders = case.contenders([OURS] if sums_in_float32 else plain(name))
    assert set(case.check(contenders)) == set(contenders)


def test_a_wrong_contender_is_caught() -> None:
    case = case_of("taylor_scores")
    eager = case.operation.plain
    with pytest.raises(RuntimeError, match="taylor_scores at 5000,40: signed is off by"):
        case.check({"signed": lambda x, grad: (x * grad).sum(0)})
    with pytest.raises(RuntimeError, match="ours is off by"):
        case.check({OURS: lambda x, grad: eager(x, grad) * (1 + 1e-5)})
    with pytest.raises(RuntimeError, match="nan is off by nan"):
        case.check({"nan": lambda x, grad: grad[0] * float("nan")})


@pytest.mark.parametrize("name", LAYERS)
def test_a_contender_with_a_wrong_gradient_is_caught(name: str) -> None:
    case = case_of(name)
    right = case.contenders(plain(name)[1:2])

    def wrong(x: torch.Tensor, *others: torch.Tensor) -> Any:
        """Its value is right."""
        return next(iter(right.values()))(2 * x - x.detach(), *others)

    with pytest.raises(RuntimeError, match="wrong is off by"):
        case.check({"wrong": wrong})


def test_inputs_take_turns_and_outgrow_the_cache() -> None:
    rotated = Case(OPERATIONS["taylor_scores"], (64, 16), torch.bfloat16, "cpu", total_bytes=20 * 4096).rotated
    assert len(rotated) == 20 and len({x.data_ptr() for x, _ in rotated}) == 20
    assert all(torch.equal(x, rotated[0][0]) for x, _ in rotated)


def test_another_width_shares_inputs_and_compilations() -> None:
    case = case_of("masked_mlp")
    other = case.at(7)
    assert other.shape == (2, 7, 24, 50, 7) and case.shape[-1] == 33
    assert other.inputs is case.inputs and other.compiled is case.compiled


def test_work_counts_inputs_and_outputs_once() -> None:
    shape = OPERATIONS["token_moments"].shape("base", 128)
    assert shape == (25216, 36, 64)
    found = OPERATIONS["token_moments"].work(shape, torch.bfloat16, False)
    assert found.bytes == 2 * 25216 * 36 * 64 * 2 + 8 * (36 * 64 + 36 * (1 + 64 + 64 + 64 * 64))
    scores = OPERATIONS["taylor_scores"].work((10, 8), torch.float32, False)
    assert (scores.bytes, scores.flops) == (2 * 80 * 4 + 64, 160)
    norm = OPERATIONS["residual_norm"].work
    assert norm((1, 1, 1), torch.bfloat16, False).bytes == 4 + 2 + 4 + 2
    assert norm((1, 1, 1), torch.bfloat16, True).bytes == 12 + (4 + 2 + 4) + (4 + 2)


def test_side_by_side_calls_in_turn_and_in_every_order() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = side_by_side(contenders, 20, clock=lambda call: (call(), 2.0)[1])
    assert found == {"a": 2.0, "b": 2.0} and calls[:2] == ["a", "b"]
    rounds = ["".join(calls[first : first + 2]) for first in range(2, len(calls), 2)]
    assert len(rounds) == 20 and set(rounds) == {"ab", "ba"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_op_prints_a_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ",".join(str(size) for size in SHAPES[name])
    before = torch.get_num_threads()
    arguments = [name, "--shape", shape, "--dtype", "bfloat16", "--device", "cpu", "--threads", "1"]
    arguments += ["--contenders", ",".join(plain(name)), "--rounds", "1", "--seconds", "0", "--megabytes", "1"]
    assert op.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{name} {shape} bfloat16 on cpu, threads: 1; ours: ")
    assert [line.split()[0] for line in lines[2:]] == ["contender", *plain(name)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3,4"], "--shape is '3,4'; token_moments takes T,G,D"),
        (["--shape", "3,4,0"], "--shape is '3,4,0'"),
        (["--shape", "3,4,5", "--contenders", "ours,best"], r"contenders has \['best'\]"),
        (["--shape", "3,4,5", "--implementation", "fastest"], "name is 'fastest'"),
    ],
)
def test_op_names_a_wrong_argument(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert op.main(["token_moments", "--device", "cpu", "--megabytes", "1", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


SUITE = """
import pytest
from benchmarks.timing import CLOCK, record

@pytest.mark.benchmark(timer=CLOCK.read)
def test_recorded(benchmark):
    record(benchmark, SECONDS)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "status"), [(1.09, 0), (1.11, 1)])
def test_a_regression_of_recorded_times_is_found(tmp_path: Path, seconds: float, status: int) -> None:
    """By pytest-benchmark itself, whose clock repeats what contenders in turn took."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command.append(str(tmp_path / "test_suite.py"))
    old = tmp_path / "old.json"
    # As by hand, also where several processes run these tests: in those pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT)}
    for value, options in (
        (1.0, ["--benchmark-json", str(old)]),
        (seconds, ["--benchmark-compare", str(old), "--benchmark-compare-fail", "median:10%"]),
    ):
        (tmp_path / "test_suite.py").write_text(SUITE.replace("SECONDS", str(value)))
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert json.loads(old.read_text())["benchmarks"][0]["stats"]["median"] == 1.0
    assert done.returncode == status, done.stdout


def run_of(ratios: dict[str, float]) -> dict[str, Any]:
    info = {"operation": "taylor_scores", "model": "tiny", "dtype": "float32", "threads": 1, "batch": 16}
    info |= {"implementation": "compiled", "median_ms": {"ours": 1.5}, "gigabytes_per_second": 12.0}
    info |= {"percent_of_copy": 97.2, "ratio": ratios}
    return {
        "machine_info": {"device": "A", "cores": 2, "build": {"torch": "2.11"}},
        "commit_info": {"id": "0123456789", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"name": "a", "stats": {"median": 1.0}, "extra_info": info}],
    }


def test_table_is_written_between_its_markers(tmp_path: Path) -> None:
    file, readme = tmp_path / "a.json", tmp_path / "README.md"
    file.write_text(json.dumps(run_of({"eager": 4.25, COMPILED: 3.0})))
    readme.write_text(f"before\n{result.BEGIN}\nold\n{result.END}\nafter\n")
    assert table.main([str(file), "--write", str(readme)]) == 0
    before, inside, after = result.split(readme.read_text())
    assert (before, after) == ("before\n", "\nafter\n")
    assert (
        inside.splitlines()[-1]
        == "| `taylor_scores` | Tiny | float32 | 16 | 1 | compiled | 1.5 | 12 | 97 | 4.25x | 3.00x |"
    )
    readme.write_text("no markers")
    assert table.main([str(file), "--write", str(readme)]) == 1
    assert readme.read_text() == "no markers"


def test_the_table_of_steps_tells_the_host_time_where_it_was_taken() -> None:
    info = Info(step="tiny", fraction=0.5, macs_fraction=0.498, compilations={}, tflops={"ours": 1.0})
    info |= {"median_ms": {"ours": 2.0, "ours, scores": 2.1}, "ratio": {"ours, scores": 1.05}}
    info |= {"percent_of_matmul": {"ours": 50.0}, "peak_mb": {}}
    lines = table.step_table([info, Info(info | {"host_ms": {"ours": 0.3, "ours, scores": 0.31}})])
    assert lines[2] == lines[3] == "| Tiny | 50 % | 2 | 1 | 50 | 1.05x |"
    assert lines[4:] == ["", "Milliseconds of the host at 50 % of the MACs: ours: 0.3; ours, scores: 0.31."]


@pytest.mark.slow
def test_a_contender_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    make = steps.make

    def failing(name: str, *arguments: Any) -> steps.Step:
        if name == "ours":
            raise RuntimeError("no compiler")
        return make(name, *arguments)

    monkeypatch.setattr(test_steps, "SIZES", replace(test_steps.SIZES, batch=2, averaged=1, step_fractions=(1.0,)))
    monkeypatch.setattr(steps, "names", lambda device: ["ours", "slices", "published"])
    monkeypatch.setattr(steps, "make", failing)
    found = test_steps.Steps("tiny")
    assert list(found.all) == ["slices", "published"] and found.failed == {"ours": "RuntimeError: no compiler"}
    info = Info(found.info({"slices": 2e-3, "published": 4e-3}, 1e9)) | {"fraction": 1.0, "macs_fraction": 1.0}
    lines = table.step_table([Info(info), Info(info | {"median_ms": {"slices": 2.0}, "ratio": {}})])
    assert lines[2].endswith("| 2.00x |") and lines[3].endswith("|  |")
    assert lines[-1] == "ours failed: RuntimeError: no compiler."


def test_a_contender_that_is_not_ready_in_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers catch what they can, and go on."""

    def stubborn(*_: Any) -> None:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            with contextlib.suppress(Exception):
                time.sleep(5)

    sizes = replace(test_steps.SIZES, batch=1, averaged=1, step_fractions=(1.0,), ready=0.2)
    monkeypatch.setattr(test_steps, "SIZES", sizes)
    monkeypatch.setattr(steps, "names", lambda device: ["ours"])
    monkeypatch.setattr(steps, "make", stubborn)
    with pytest.raises(RuntimeError, match=r"no contender takes a step: .*not ready after 0.2 seconds"):
        test_steps.Steps("tiny")
    time.sleep(0.3)  # the alarm is off


@pytest.mark.parametrize("trains", [True, False])
def test_a_captured_step_that_does_not_train_is_no_contender(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    """A graph in which nothing was captured would be the fastest of all."""
    step = steps.make("slices", "tiny", steps.images_and_labels(1, "cpu"), "cpu")
    calls: list[str] = []

    def capture(call: Any, warm_up: int) -> Any:
        return SimpleNamespace(replay=call if trains else lambda: calls.append("nothing"))

    monkeypatch.setattr(timing, "captured", capture)
    if trains:
        steps.replayed(step, 0)()
        return
    with pytest.raises(RuntimeError, match="leaves the weights as they were"):
        steps.replayed(step, 0)
    assert calls


def test_the_time_of_a_step_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the operators stand in: one call has so many of each, and the table takes the document."""
    x = torch.ones(300, 300)
    found = steps.kernel_times(lambda: x @ x + x, rounds=2)
    assert found["aten::mm"][1] == 1.0 and found["aten::add"][1] == 1.0 and found["aten::mm"][0] > 0
    results = Info(ours={"1.0": {"step_ms": 1.0, "kernel_ms_per_step": found}})
    assert Result.of("a.json", Info(results=results)).kind == result.PROFILE
    assert table.profile_table(results)[0] == "| milliseconds a step | ours, 100 % |"


def test_the_peak_memory_of_a_call() -> None:
    """What was there before does not count, nor what is released before more is taken."""
    x = torch.ones(1_000_000)

    def call() -> None:
        (x + 1) + 1  # 4 MB twice, then one of them is free
        x.double()  # 8 MB

    assert peak_of_call(call, "cpu") == 8.0


@pytest.mark.slow
def test_the_peak_memory_of_a_process() -> None:
    small, large = (peak_of_process(ones, size, "cpu") for size in (1, 50_000_000))
    assert 190 < large - small < 220


def ones(size: int, device: str) -> None:
    torch.ones(size, device=device)


@pytest.mark.parametrize(
    "path",
    sorted(path for pattern in ("[cg]pu*", "h100-*") for path in RESULTS.glob(f"{pattern}.json")),
    ids=lambda path: path.name,
)
def test_committed_results_name_no_machine(path: Path) -> None:
    run = json.loads(path.read_text())
    assert not {"node", "release", "machine_id"} & (set(run) | set(run.get("machine_info", {})))
    assert not re.search(r'"/|"[a-z_]+@', path.read_text()), "a path or an account"


def test_the_published_conversion_is_ours() -> None:
    batches = random_batches()
    found, expected = (
        test_passes.convert_published(tiny_vit(), batches),
        convert(tiny_vit(), batches, centering="batch"),
    )
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", MASKED)
def test_all_contenders_of_the_masked_layers_agree(name: str) -> None:
    """At an odd width too; a wrong one is caught."""
    operation = OPERATIONS[name]
    full = Case(operation, operation.shape("tiny", 1), torch.float32, "cpu")
    full.compiled = operation.plain  # type: ignore[assignment]  # torch.compile takes seconds
    for width in (5, full.shape[-1] // 2, full.shape[-1]):
        case = full.at(width)
        assert len(case.check(case.contenders())) == 5
    full.compiled = lambda *arguments, **named: operation.plain(*arguments, **named) * 1.01  # type: ignore[assignment]
    case = full.at(5)
    with pytest.raises(RuntimeError, match=f"{name} at .*,5: torch.compile is off by"):
        case.check(case.contenders())


@pytest.mark.parametrize("name", MASKED)
def test_work_of_the_masked_layers_follows_the_width(name: str) -> None:
    operation = OPERATIONS[name]
    whole, half = (operation.work(operation.shape("base", 128, share), torch.bfloat16, True) for share in (1.0, 0.5))
    assert half.flops == whole.flops // 2 and whole.bytes // 2 < half.bytes < whole.bytes
    flops = OPERATIONS["masked_mlp"].work((2, 5, 192, 768, 5), torch.float32, False).flops
    assert flops == 2 * 10 * 192 * 5 * 2


def test_contenders_of_a_training_step_have_one_gradient() -> None:
    batch = steps.images_and_labels(2, "cpu")
    made = {name: steps.make(name, "tiny", batch, "cpu", backend="eager") for name in steps.names("cpu")}
    assert set(made) > {"ours, compiled", "torch.compile", "published"}
    exact = steps.exact_gradient("tiny", batch, 300)
    for step in made.values():
        assert steps.check(step, exact, 300, 1e-3) < 1e-3
    for name in ("ours", "ours, scores"):
        scores = made[name].step.state.supernet.scores  # type: ignore[attr-defined]
        assert (scores is not None and all(bool(s.any()) for s in scores)) == (name == "ours, scores")


def test_fashion_mnist_in_the_docs_is_the_committed_result() -> None:
    """All budgets, both columns; and nothing of the machine it ran on but its processor."""
    file = ROOT / "benchmarks" / "results" / "fashion-mnist.json"
    found = Info(json.loads(file.read_text()))
    _, inside, _ = result.split((ROOT / "docs" / "ACCURACY.md").read_text(), fashion_mnist.BEGIN, fashion_mnist.END)
    assert inside == fashion_mnist.table(found)
    assert len(found["trained"]["curve"]) == 7 and (ROOT / "docs" / "fashion-mnist.png").is_file()
    assert sum(found["seconds"].values()) < 40 * 60
    assert "/home" not in file.read_text() and "/tmp" not in file.read_text()


def test_input_measures_every_loader_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to augment draw alike, and both stages take time; the page has the committed result."""
    pytest.importorskip("webdataset")
    monkeypatch.setattr(throughput, "SHARDS", 1)
    data, config = throughput.write(tmp_path, 4), data_config(tiny_vit()) | {"num_classes": 2}
    for source in data.values():
        loaders = [throughput.make_loader(source, config, way, 4, "cpu") for way in throughput.WAYS]
        before, now = (next(iter(loader))[0] for loader in loaders)
        assert (before - now).abs().mean() < 0.2
        assert all(min(throughput.stages(loader)) > 0 for loader in loaders)
    document = Info(json.loads((RESULTS / "input-cpu.json").read_text()))
    assert throughput.table(document) in (ROOT / "docs" / "TRAINING.md").read_text()


FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "benchmarks")))
def test_every_benchmark_can_be_imported(path: Path) -> None:
    """What they use of the library's inside may get another name; pytest does not collect them here."""
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_the_docstring_of_the_package_says_what_its_files_are() -> None:
    text = importlib.import_module("benchmarks").__doc__ or ""
    named = {line.split()[0].rstrip("/") for line in text.splitlines() if line.startswith("    ")}
    there = {path.name for path in (ROOT / "benchmarks").iterdir() if path.name[0] != "."}
    assert named | {"__init__.py"} == there - {"__pycache__", "README.md"}


def test_the_readme_of_the_benchmarks_names_every_command() -> None:
    """And no command that is not there."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    named = set(re.findall(r"python -m ([\w.]+)", text))
    starters = (path for path in FILES if '__name__ == "__main__"' in path.read_text())
    commands = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in starters}
    assert named == commands - {"benchmarks.on_gpu"}  # run_on_gpu.sh starts it
    for path in re.findall(r"pytest (benchmarks/\S+\.py)", text):
        assert (ROOT / path).is_file(), path


def test_the_comparison_in_the_docs_is_the_committed_result() -> None:
    file = RESULTS / "accuracy-comparison.json"
    expected = summary.tables(Info(json.loads(file.read_text()))) if file.exists() else "Not measured yet."
    _, inside, _ = result.split((ROOT / "docs" / "ACCURACY.md").read_text(), summary.BEGIN, summary.END)
    assert inside == expected
