"""A mid-size real run by the command line: Fashion-MNIST's 70,000 images, a small ViT, under 40 minutes on a CPU.

python -m benchmarks.training.fashion_mnist --data DIR --out DIR --json FILE    run it: DIR has the idx files
python -m benchmarks.training.fashion_mnist --table FILE --write docs/ACCURACY.md    the page's table from it
python -m benchmarks.training.fashion_mnist --table FILE --plot docs/fashion-mnist.png

On Debian the images are in the package dataset-fashion-mnist (/usr/share/datasets/fashion-mnist).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.table import rewrite
from benchmarks.timing import provenance

BEGIN, END = "<!-- fashion-mnist:begin -->", "<!-- fashion-mnist:end -->"
MODEL = {
    "img_size": 28,
    "patch_size": 7,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 2,
}
# Clothes are centred and upright: a mild crop, a flip, nothing else; a network this small bears no more.
IMAGES = "--scale 0.8 1 --ratio 0.9 1.1 --aa none --reprob 0 --aug-repeats 1 --mixup 0 --cutmix 0 --color-jitter 0"
RUN = f"{IMAGES} --drop-path 0 --batch-size 256 --no-model-ema --sched-on-updates --workers 1"
# Evaluated at the end only: no epoch is chosen by the test images.
STAGES = {
    "pretrain": "skd finetune --model vit_tiny_patch16_224 --model-kwargs {model} --data {data} "
    f"--out {{out}}/pretrained --epochs 10 --lr 2e-3 --min-lr 1e-5 --warmup-epochs 1 --eval-every 10 {RUN}",
    "convert": "skd convert --checkpoint {out}/pretrained/model.safetensors --data {data} "
    "--out {out}/converted.safetensors",
    "plan": "skd plan --supernet {out}/converted.safetensors --data {data} --out {out}/planned.safetensors",
    "evaluate": "skd evaluate --supernet {out}/planned.safetensors --data {data}",
    "train": "skd train --supernet {out}/converted.safetensors --data {data} --out {out}/trained "
    f"--epochs 15 --lr 1e-3 --min-lr 1e-5 --warmup-epochs 0 --eval-every 15 {RUN}",
    "extract": "skd extract --supernet {out}/trained/supernet.safetensors --macs 0.5 --out {out}/half.safetensors",
    "check": "skd evaluate --model {out}/half.safetensors --data {data}",
}


def run(data: str, out: Path) -> dict[str, Any]:
    """All stages in order, each a command in a process of its own; what they reported, and their seconds."""
    out.mkdir(parents=True, exist_ok=True)
    stages = {}
    for name, template in STAGES.items():
        command = template.format(
            data=shlex.quote(data), out=shlex.quote(str(out)), model=shlex.quote(json.dumps(MODEL))
        )
        result = out / f"{name}.json"
        print(f"$ {command}", flush=True)
        start = time.perf_counter()
        words = shlex.split(command)[1:]
        subprocess.run([sys.executable, "-m", "skd", *words, "--json", str(result)], check=True)
        seconds = time.perf_counter() - start
        stages[name] = {"command": template, "seconds": seconds, "result": json.loads(result.read_text())}
    return summary(stages)


def summary(stages: dict[str, Any]) -> dict[str, Any]:
    """The part of what the stages reported that is worth keeping."""
    trained, planned = stages["train"]["result"], stages["evaluate"]["result"]
    return {
        "commands": {name: stage["command"] for name, stage in stages.items()},
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "model": MODEL,
        "pretrained_top1": stages["pretrain"]["result"]["curve"][0]["top1"],
        "planned": {"curve": planned["curve"], "area": planned["area"]},
        "trained": {"curve": trained["curve"], "area": trained["area"], "entries": trained["entries"]},
        "best_epoch": trained["best_epoch"],
        "extracted_top1": stages["check"]["result"]["top1"],
        **provenance(),
    }


def table(result: dict[str, Any]) -> str:
    """The page's text: one row per budget, planned only and trained."""
    planned = {round(row["budget"], 6): row for row in result["planned"]["curve"]}
    minutes = sum(result["seconds"].values()) / 60
    lines = [
        f"{result['device']}, {result['cores']} cores, torch {result['versions']['torch']}, {result['date']}; "
        f"{minutes:.0f} minutes in all, {result['seconds']['pretrain'] / 60:.0f} of them for the pre-training.",
        f"The network before conversion has {result['pretrained_top1']:.2f} % top-1 on the 10,000 test images.",
        "",
        "| MACs (full) | of full | MACs (linear) | parameters | planned, no training | trained |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["trained"]["curve"]:
        other = planned.get(round(row["budget"], 6))
        untrained = f"{other['top1']:.2f}" if other else ""
        lines.append(
            f"| {row['macs'] / 1e6:.2f} M | {row['macs_fraction']:.1%} | {row['macs_linear'] / 1e6:.2f} M "
            f"| {row['params']:,} | {untrained} | {row['top1']:.2f} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """PNG of both curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axhline(result["pretrained_top1"], color="0.6", linestyle=":", label="the network before conversion")
    for name, label, style in (
        ("trained", "trained (WPAC, then PIAD)", "o-C2"),
        ("planned", "planned only (WPAC)", "^--C0"),
    ):
        rows = result[name]["curve"]
        macs, top1 = [row["macs"] / 1e6 for row in rows], [row["top1"] for row in rows]
        axes.plot(macs, top1, style[:-2], color=style[-2:], markersize=5, label=label)
    axes.set(xlabel="MACs per image, full convention (millions)", ylabel="top-1 on Fashion-MNIST's test images (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.fashion_mnist", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for networks and reports")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="a result to show in place of running")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the table between FILE's markers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.png)")
    args = parser.parse_args(arguments)
    if args.table is not None:
        result = json.loads(args.table.read_text())
    elif args.data and args.out and args.json:
        result = run(args.data, args.out)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        parser.error("give --data, --out and --json, or --table")
    if args.write is not None:
        rewrite(args.write, table(result), BEGIN, END)
    if args.plot is not None:
        plot(result, args.plot)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
