"""Sub-networks without any training, with and without `skd.compensate`, on Fashion-MNIST: minutes on a CPU.

python -m benchmarks.accuracy.compensation --data DIR --seeds 2 --json FILE    run it: DIR has the idx files
python -m benchmarks.accuracy.compensation --table FILE --write docs/ACCURACY.md    the page's table from it

A small ViT is pre-trained on the first 12,000 images, briefly, and stands in for a pre-trained one. It is converted,
planned by each planner and measured on the 10,000 test images. The 1,024 images of conversion, planning and
compensation are others than those of the pre-training.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

import skd
from benchmarks.accuracy.images import CALIBRATION, TRAINED, load
from benchmarks.result import Info, rewrite, rows_of
from benchmarks.timing import JSON, provenance, write_json
from skd.data.digits import Batches, Split, batched
from skd.demo.running import reproducible
from skd.support.curve import entries_within

BEGIN, END = "<!-- compensation:begin -->", "<!-- compensation:end -->"
SHARES = (0.33, 0.25, 0.2, 0.15, 0.12)  # of the full network's MACs
PLANNERS = {"paper": 10, "loss": 5}  # the rounds of each
BATCH, EPOCHS, RATE = 64, 6, 2e-3


def pretrained(train: Split) -> VisionTransformer:
    """The network that stands in for a pre-trained one: width 64, 6 blocks, 17 tokens."""
    model = VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=2
    )
    steps = EPOCHS * (len(train.labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train.labels)).split(BATCH)[: len(train.labels) // BATCH]:
            pixels = train.images[batch]
            pixels = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
            loss = torch.nn.functional.cross_entropy(model(pixels), train.labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def planned(converted: skd.SuperNet, planner: str, calibration: Batches, test: Batches) -> Info:
    """Top-1 at each share of the MACs, without and with compensation; bytes of the corrections, and seconds."""
    supernet, seconds = copy.deepcopy(converted), Info()
    start = time.perf_counter()
    supernet.dropout_list = skd.plan(supernet, calibration, target=0.9, rounds=PLANNERS[planner], planner=planner)
    seconds["plan"] = time.perf_counter() - start
    entries = list(entries_within(supernet, SHARES).values())
    before = skd.evaluate(supernet, test, entries=entries)
    start = time.perf_counter()
    corrections = skd.compensate(supernet, calibration, entries=entries)
    seconds["compensate"] = time.perf_counter() - start
    after = skd.evaluate(supernet, test, entries=entries)
    rows: JSON = [
        Info(share=share, entry=entry, alone=one, compensated=other, bytes=corrections[entry].nbytes)
        for share, entry, one, other in zip(SHARES, entries, before, after, strict=True)
    ]
    return Info(curve=rows, seconds=seconds)


def run(folder: str, seeds: int) -> Info:
    train, rest, test = load("fashion", folder)
    results: list[JSON] = []
    for seed in range(seeds):
        with reproducible(seed):
            model = pretrained(train)
            converted = skd.convert(model, batched(rest, 256))
            found = {
                planner: planned(converted, planner, batched(rest, 256), batched(test, 1000)) for planner in PLANNERS
            }
            results.append(Info(seed=seed, full=skd.evaluate(converted, batched(test, 1000)), planners=Info(found)))
        print(json.dumps(results[-1]), flush=True)
    return Info(runs=results, images=Info(trained=TRAINED, calibration=CALIBRATION, test=10_000), **provenance())


def table(result: Info) -> str:
    """The page's text: one row per share, means over the seeds."""
    runs = result.rows("runs")
    full = np.mean([run.number("full") for run in runs])
    lines = [
        f"{result['device']}, one thread, torch {result.part('versions')['torch']}, {result['date']}; means of "
        f"{len(runs)} seed(s), top-1 on 10,000 test images. The full network has {full:.2f} %.",
        "",
    ]
    rows = []
    for index, share in enumerate(SHARES):
        cells = [f"{share:.0%}"]
        for planner in PLANNERS:
            found = [run.part("planners").part(planner).rows("curve")[index] for run in runs]
            cells += [f"{np.mean([row.number(name) for row in found]):.2f}" for name in ("alone", "compensated")]
            cells.append(f"{np.mean([row.number('bytes') for row in found]) / 1000:.0f} kB")
        rows.append(cells)
    each = [f"{planner}{what}" for planner in PLANNERS for what in (" planner", ", compensated", ", corrections")]
    return "\n".join([*lines, *rows_of(["MACs", *each], rows, 0)])


def main(arguments: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.compensation", description=about)
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files")
    parser.add_argument("--seeds", type=int, default=2, help="how many networks (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="a result to show in place of running")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the table between FILE's markers")
    args = parser.parse_args(arguments)
    if args.table is not None:
        result = Info(json.loads(args.table.read_text()))
    elif args.data:
        result = run(args.data, args.seeds)
        write_json(args.json, result)
    else:
        parser.error("give --data, or --table")
    if args.write is not None:
        rewrite(args.write, table(result), BEGIN, END)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
