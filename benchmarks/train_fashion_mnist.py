"""A mid-size real run by the command line: Fashion-MNIST's 70,000 images, a small ViT, under 40 minutes on a CPU.

python -m benchmarks.train_fashion_mnist --data DIR --out DIR --json FILE    run it: DIR has the idx files
python -m benchmarks.train_fashion_mnist --table FILE --write docs/ACCURACY.md    the page's table from it
python -m benchmarks.train_fashion_mnist --table FILE --plot docs/fashion-mnist.png

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

from benchmarks.result import Info, rewrite, rows_of
from benchmarks.timing import provenance, write_json

BEGIN, END = "<!-- fashion-mnist:begin -->", "<!-- fashion-mnist:end -->"
MODEL = Info(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=2)
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


def run(data: str, out: Path) -> Info:
    """All stages in order, each a command in a process of its own; what is worth keeping of what they reported."""
    out.mkdir(parents=True, exist_ok=True)
    names = {"data": shlex.quote(data), "out": shlex.quote(str(out)), "model": shlex.quote(json.dumps(MODEL))}
    seconds, reports = Info(), {}
    for stage, template in STAGES.items():
        command, result = template.format(**names), out / f"{stage}.json"
        print(f"$ {command}", flush=True)
        start = time.perf_counter()
        words = shlex.split(command)[1:]
        subprocess.run([sys.executable, "-m", "skd", *words, "--json", str(result)], check=True)
        seconds[stage] = time.perf_counter() - start
        reports[stage] = Info(json.loads(result.read_text()))
    trained, planned = reports["train"], reports["evaluate"]
    return Info(
        commands=Info(STAGES),
        seconds=seconds,
        model=MODEL,
        pretrained_top1=reports["pretrain"].rows("curve")[0]["top1"],
        planned={key: planned[key] for key in ("curve", "area")},
        trained={key: trained[key] for key in ("curve", "area", "entries")},
        best_epoch=trained["best_epoch"],
        extracted_top1=reports["check"]["top1"],
        **provenance(),
    )


def table(result: Info) -> str:
    """The page's text: one row per budget, planned only and trained."""
    planned = {round(row.number("budget"), 6): row for row in result.part("planned").rows("curve")}
    seconds, torch, top1 = result.times("seconds"), result.part("versions")["torch"], result.number("pretrained_top1")
    minutes = sum(seconds.values()) / 60
    lines = [
        f"{result['device']}, {result['cores']} cores, torch {torch}, {result['date']}; "
        f"{minutes:.0f} minutes in all, {seconds['pretrain'] / 60:.0f} of them for the pre-training.",
        f"The network before conversion has {top1:.2f} % top-1 on the 10,000 test images.",
        "",
    ]
    rows = []
    for row in result.part("trained").rows("curve"):
        other = planned.get(round(row.number("budget"), 6))
        macs = f"{row.number('macs') / 1e6:.2f} M", f"{row.number('macs_fraction'):.1%}"
        cells = [*macs, f"{row.number('macs_linear') / 1e6:.2f} M", f"{row.number('params'):,}"]
        rows.append([*cells, f"{other.number('top1'):.2f}" if other else "", f"{row.number('top1'):.2f}"])
    columns = ["MACs (full)", "of full", "MACs (linear)", "parameters", "planned, no training", "trained"]
    return "\n".join([*lines, *rows_of(columns, rows, 0)])


def plot(result: Info, path: Path) -> None:
    """PNG of both curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axhline(result.number("pretrained_top1"), color="0.6", linestyle=":", label="the network before conversion")
    for name, label, style in (
        ("trained", "trained (WPAC, then PIAD)", "o-C2"),
        ("planned", "planned only (WPAC)", "^--C0"),
    ):
        rows = result.part(name).rows("curve")
        macs, top1 = [row.number("macs") / 1e6 for row in rows], [row.number("top1") for row in rows]
        axes.plot(macs, top1, style[:-2], color=style[-2:], markersize=5, label=label)
    axes.set(xlabel="MACs per image, full convention (millions)", ylabel="top-1 on Fashion-MNIST's test images (%)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_fashion_mnist", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for networks and reports")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="a result to show in place of running")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the table between FILE's markers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.png)")
    args = parser.parse_args(arguments)
    if args.table is not None:
        result = Info(json.loads(args.table.read_text()))
    elif args.data and args.out and args.json:
        result = run(args.data, args.out)
        write_json(args.json, result)
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
