"""README's lines on what was measured, made from the committed results; no figure is rounded in our favour.

PYTHONPATH=. python tests/make_measured_lines.py                      print them
PYTHONPATH=. python tests/make_measured_lines.py --write README.md    put them between the file's two marker lines
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy.summary import groups
from benchmarks.result import Info, rewrite

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
MODELS = ("tiny", "small", "base")
MISSING = (
    "**Not measured**: the published runs on ImageNet have not been repeated with skd "
    "([docs/TRAINING.md](docs/TRAINING.md#what-to-expect) has the published figures), and several GPUs have never "
    "been tried."
)


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def below(value: float, digits: int = 2) -> str:
    """A number as text, rounded down."""
    return f"{math.floor(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"


def above(value: float, digits: int = 2) -> str:
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"


def accuracy() -> str:
    """Means over the networks of all three, at three budgets: trained, planned only, and by the published method."""
    named = groups(Info(result("accuracy-comparison")))
    fashion = next(
        group for group in named if (group.task, group.size, group.headless) == ("fashion", "small", False)
    )
    seeds = fashion.curves["published"]
    trained, planned, published = (
        [mean(fashion.curves[name][seed][share] for seed in seeds) for share in (0.25, 0.15, 0.12)]
        for name in ("groups of 4, original teaches, compensated", "groups of 4, planned, compensated", "published")
    )
    full = mean({row.number("seed"): row.number("full") for row in fashion.records["published"]}.values())
    texts = [
        ", ".join(each(value, 1) for value in row)
        for row, each in ((trained, below), (planned, below), (published, above))
    ]
    return (
        f"**Accuracy** (Fashion-MNIST, a small ViT with {full:.1f} % top-1, mean of "
        f"{len(seeds)} seeds; `attention_group=4`, compensated): at 25, 15 and 12 % of the "
        f"MACs sub-networks that were trained, the original network as their teacher, have {texts[0]} %; those that "
        f"were only planned, without training, {texts[1]} %; those of "
        f"the published method, trained for as many steps, {texts[2]} % ([docs/ACCURACY.md](docs/ACCURACY.md))."
    )


def steps() -> str:
    """Training steps, on average over a list of sub-networks."""
    found = result("h100-steps-mean")
    times = [found["results"][model]["mean"] for model in MODELS]
    said = []
    for way in ("published", "slices", "torch.compile"):
        ratios = [below(time[way] / time["ours, graph"]) for time in times]
        said.append(f"{ratios[0]}, {ratios[1]} and {ratios[2]} times")
    return (
        f"**Training step** ({found['device']}, DeiT-Tiny, Small and Base, mean over sub-networks): the published "
        f"way takes {said[0]} as long as ours, library calls on slices of the weights {said[1]}, torch.compile on "
        f"slices {said[2]} ([docs/PERFORMANCE.md](docs/PERFORMANCE.md))."
    )


def slower() -> str:
    """The line on cases in which the library is faster."""
    base = result("h100-steps-mean")["results"]["base"]["1.0"]
    kernel = next(row for row in result("h100-quick")["results"]["base"] if row["question"] == "fc1 + GELU")
    return (
        f"**Where ours is slower**, for example: at the full width of DeiT-Base a step takes "
        f"{above(base['ours, graph'], 1)} ms, with torch.compile on slices "
        f"{below(base['torch.compile'], 1)} ms; the first product of the MLP reaches "
        f"{below(kernel['ours_tflops'], 0)} TFLOP/s where the library's product alone reaches "
        f"{above(kernel['library_tflops'], 0)} ([docs/PERFORMANCE.md](docs/PERFORMANCE.md#in-short))."
    )


def statistics() -> str:
    """The passes of a calibration, on whole tensors."""
    found = result("h100-statistics")
    infos = [entry["extra_info"] for entry in found["benchmarks"]]
    said = []
    for operation in dict.fromkeys(info["operation"] for info in infos):
        ratios = [info["ratio"] for info in infos if info["operation"] == operation]
        plain, compiled = ([ratio[way] for ratio in ratios] for way in ("eager", "torch.compile"))
        said.append(
            f"for `{operation}` PyTorch takes {below(min(plain))} to {below(max(plain))} times as long as ours, "
            f"torch.compile {below(min(compiled))} to {below(max(compiled))} times"
        )
    return f"**Statistics of a calibration** (the same GPU, batch {infos[0]['batch']}): {'; '.join(said)}."


def lines() -> str:
    said = [accuracy(), steps(), slower(), statistics(), MISSING]
    wrapped = (textwrap.wrap(line, 116, break_long_words=False, break_on_hyphens=False) for line in said)
    return "\n".join("* " + "\n  ".join(line) for line in wrapped)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make README's lines on what was measured.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the lines between FILE's markers")
    path = parser.parse_args().write
    if path is None:
        print(lines())
    else:
        rewrite(path, lines(), BEGIN, END)


if __name__ == "__main__":
    main()
