"""The tables and sentences of performance say what the committed results hold. Nothing is timed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_tables, result, short, table
from benchmarks.result import Info, Result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMAND = "run: python -m benchmarks.table"


def document(name: str) -> Info:
    return Info(json.loads((RESULTS / f"h100-{name}.json").read_text()))


def committed(name: str) -> Result:
    return Result.read(RESULTS / f"h100-{name}.json")


def measured(name: str) -> Info:
    return committed(name).results


def inside(*markers: str) -> str:
    return result.split((ROOT / "docs" / "PERFORMANCE.md").read_text(), *markers)[1]


def named_in(text: str, pattern: str) -> list[Path]:
    return [RESULTS / name for name in re.findall(pattern, text, re.MULTILINE)]


def test_the_short_tables_are_fresh() -> None:
    """They are those of the committed results that they name."""
    paths = named_in(inside(*result.SHORT), r"`([\w-]+\.json)`")
    assert len(paths) >= 8
    assert inside(*result.SHORT) == short.section(paths), f"{COMMAND} RESULTS --short --write docs/PERFORMANCE.md"


def test_all_tables_are_fresh() -> None:
    paths = named_in(inside(), r"^`(\S+\.json)`: ")
    assert {path.name for path in RESULTS.glob("cpu*.json")} <= {path.name for path in paths}
    assert inside() == table.section(paths), f"{COMMAND} RESULTS --write docs/PERFORMANCE.md"


def test_the_tables_of_kernels_are_fresh() -> None:
    page, command = (
        (ROOT / "docs" / "KERNELS.md").read_text(),
        "run: python -m benchmarks.kernel_tables docs/KERNELS.md",
    )
    assert result.split(page, *kernel_tables.COUNTED)[1] == "\n".join(kernel_tables.counted_table()), command
    assert result.split(page, *kernel_tables.COMPILED)[1] == "\n".join(kernel_tables.compiled_table()), command


@pytest.mark.parametrize("name", [kernel_tables.BEFORE, kernel_tables.AFTER, kernel_tables.REGISTERS])
def test_what_was_computed_says_so(name: str) -> None:
    found = kernel_tables.read(name)
    assert "not measured" in found.text("what") and re.fullmatch("[0-9a-f]{40}", found.text("commit"))
    assert "device" not in found


def test_the_short_tables_are_of_the_same_results() -> None:
    summary = set(named_in(inside(*result.SHORT), r"`([\w-]+\.json)`"))
    assert summary == set(named_in(inside(), r"^`(\S+\.json)`: "))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("h100-*.json")), ids=lambda path: path.name)
def test_results_of_a_gpu_say_where_they_come_from(path: Path) -> None:
    """Device, versions, commit, what was not committed, and what the figures are."""
    found, whole = Result.read(path), json.loads(path.read_text())
    assert found.device == "NVIDIA H100 80GB HBM3" and found.date == "2026-11-28"
    versions = found.versions
    assert (versions["torch"], versions["triton"], versions["python"]) == ("2.11.0+cu130", "3.6.0", "3.12.3")
    assert found.commit == "38bc3b68" and "include folders" in found.changes
    if found.kind != result.RUN:
        assert re.fullmatch("[0-9a-f]{40}", whole["commit"]) and found.what.endswith(".") and whole["results"]


@pytest.mark.parametrize("contender", ["ours, graph", "slices"])
@pytest.mark.parametrize("fraction", ["1.0", "0.5", "0.25"])
def test_no_kernel_is_dropped_from_its_class(contender: str, fraction: str) -> None:
    """The classes add up to the kernels; hardly any kernel has none."""
    kernels = result.kernels_of(measured("profile-base").part(contender).part(fraction))
    found = result.grouped(kernels)
    total = sum(kernels.values())
    assert sum(found.values()) == pytest.approx(total, rel=1e-9)
    assert found.get(result.OTHER, 0.0) < 0.001 * total
    assert set(found) <= {*result.CLASSES, result.OTHER}


def test_kernels_of_one_kind_share_a_class() -> None:
    """Names that hold each other's do not mix, and an unknown kernel is listed as such."""
    classes = [result.class_of(name) for name in ("weight_gradient_kernel", "weight_gradient", "hidden_kernel")]
    assert len(set(classes)) == 3
    assert result.class_of("finish_kernel") == classes[0]
    assert result.class_of("void at::native::reduce_kernel<512, 1>") == "sums over rows"
    assert result.grouped({"made_up": 2.0, "also_made_up": 1.0}) == {result.OTHER: 3.0}


def test_a_profile_is_shown_whole() -> None:
    """Each column's classes add up to the sum below them, to rounding."""
    lines = table.profile_table(measured("profile-base"))
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    classes, sums = cells[:-2], cells[-2]
    assert sums[0] == "sum of the kernels listed" and len(classes) > 10
    for column in range(1, len(sums)):
        total = sum(float(row[column].strip() or 0) for row in classes if len(row) > column)
        assert total == pytest.approx(float(sums[column]), abs=0.005 * len(classes))


def test_mean_steps_and_their_ratios() -> None:
    lines = table.mean_table(measured("steps-mean"))
    assert lines[0] == "| DeiT | MACs | ours, graph, ms | slices, ms | torch.compile, ms | published, ms |"
    assert [line.split(" | ")[0] for line in lines[2::4]] == ["| Tiny", "| Small", "| Base"]
    assert "| Base | 100 % | 53.7 | 53.9 (1.00x) | 47 (0.88x) | 138 (2.57x) |" in lines
    assert "| Tiny | mean over a list | 12.6 | 36.6 (2.90x) | 44.6 (3.54x) | 66.8 (5.30x) |" in lines


def test_kernels_against_the_library() -> None:
    lines = table.products_table(measured("quick"))
    assert "| fc1 + GELU | Base | 0.435 | 274 | 35 | 0.174 | 683 | 87 | 0.40x |" in lines
    assert "| masked_mlp, replayed | Small | 0.837 | 0.643 | 0.476 | 0.291 | 0.211 |" in lines


def test_norms_are_shown_beside_the_kernels() -> None:
    found = measured("quick")
    times, shares = {"ours": 0.0832, "eager": 0.205}, {"ours": 93.2, "eager": 37.9}
    found["base"].append({"question": "residual_norm, forward", "norm_ms": times, "percent_of_copy": shares})
    lines = table.products_table(found)
    assert "| residual_norm, forward | Base | 0.0832 (93 %) | 0.205 (38 %) |" in lines
    assert set(table.products_table(measured("quick"))) < set(lines)


def test_the_statistics_have_their_share_of_the_copy_bandwidth() -> None:
    lines = table.operation_table(committed("statistics").infos("operation"))
    found = [line for line in lines if "| `token_moments` | Base | bfloat16 | 128 | gpu | compiled | 0.166 |" in line]
    assert len(found) == 1 and " | 1409 | 46 | 4.99x | 1.45x | 27.57x |" in found[0]


def test_gpu_time_comes_from_the_step_or_else_from_a_profile() -> None:
    rows = [Info(step="base", fraction=1.0), Info(step="base", fraction=0.75)]
    profiled = table.gpu_times([committed("profile-base"), committed("quick"), committed("statistics")])
    lines = table.gpu_time_table(rows, profiled)
    assert lines[-1] == "| Base | 100 % | 53.3 | 52.1 |" and len(lines) == 4
    own = [Info(info | {"gpu_ms": {"ours, graph": 40.04, "torch.compile": 41.0}}) for info in rows]
    assert table.gpu_time_table(own, profiled)[-2:] == [
        "| Base | 100 % | 40.0 | 41.0 |",
        "| Base | 75 % | 40.0 | 41.0 |",
    ]
    assert table.gpu_time_table(rows, {}) == []


def test_a_result_without_provenance_has_its_table_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output of benchmarks.quick as it is."""
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(measured("quick")))
    assert table.main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "`quick.json`: where it was measured is not recorded." in shown and "| fc2 | Base |" in shown


def test_a_result_that_no_table_shows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([str(RESULTS / "h100-sweep.json")]) == 1
    assert "h100-sweep.json is not a result" in capsys.readouterr().err


def said(*names: str, **changed: dict[str, Any]) -> str:
    documents = {name: Info(changed.get(name.replace("-", "_")) or document(name)) for name in names}
    results = [Result.of(f"{name}.json", found) for name, found in documents.items()]
    return re.sub(r"\s+", " ", " ".join(short.sentences(results)))


def test_what_is_slower_than_the_library_is_said() -> None:
    found = said("steps-mean", "steps-base", "profile-base", "quick", "statistics")
    for sentence in (
        "the published way takes 5.3, 4.2 and 2.9 times as long as ours (Tiny, Small, Base)",
        "**At the full width of Base `torch.compile` on slices is faster than ours: 47.0 ms against 53.7**",
        "The GPU works as long for ours as for library calls on slices, or longer: 53.3 against 52.1 ms at 100 %",
        "fc1 + GELU (274 of 683)",
        "`token_moments` Tiny bfloat16, 84 us against 130",
        "46 % (Base, bfloat16) of the copy bandwidth",
        "10.1 GB of memory at most, with slices 10.4 GB, in the published way 14.7 GB",
    ):
        assert sentence in found, sentence
        assert sentence in re.sub(r"\s+", " ", inside(*result.SHORT)), sentence


def test_a_sentence_follows_its_figures() -> None:
    """Where ours becomes faster the words change; a kernel near the library is not listed; no figures, no words."""
    mean = document("steps-mean")
    mean["results"]["base"]["1.0"]["ours, graph"] = 40.0
    assert "`torch.compile` on slices is slower than ours: 47.0 ms against 40.0" in said(
        "steps-mean", steps_mean=mean
    )
    profile = document("profile-base")
    for share in profile["results"]["ours, graph"].values():
        share["kernel_ms_per_step"] = {"hidden_kernel": [20.0, 12]}
    text = said("profile-base", profile_base=profile)
    assert "or longer" not in text and "20.0 against 52.1 ms at 100 %" in text
    quick = document("quick")
    quick["results"]["base"] = [row for row in quick["results"]["base"] if row["question"] == "fc2"]
    assert said("quick", quick=quick) == "" and short.sentences([]) == []


def test_figures_of_a_gpu_in_the_page_on_training() -> None:
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "TRAINING.md").read_text())
    mean = measured("steps-mean")
    speed = {model: f"{128e3 / mean[model]['1.0']['ours, graph']:,.0f}" for model in mean if model != "note"}
    assert f"{speed['tiny']} (DeiT-Tiny), {speed['small']} (Small) and {speed['base']} images/s (Base)" in page
    step = committed("steps-base").infos("step")[0]
    assert f"takes {step['peak_mb']['ours, graph'] / 1e3:.1f} GB at most" in page
    times = mean["base"]
    assert (
        f"{times['1.0']['ours, graph']:.1f} ms for the full network, {times['mean']['ours, graph']:.1f} ms on" in page
    )
