"""Predicted against measured latencies of sub-networks of DeiT-Tiny on a CPU, in one thread: minutes.

python -m benchmarks.latency --json FILE                              run it
python -m benchmarks.latency --table FILE --write docs/LATENCY.md     the page's table from it

For each batch size a table of modules is measured (`skd.measure_latency`), and in the same rounds sub-networks to
which it is not fitted. Time does not depend on the weights, which are random.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import skd
from benchmarks.result import Info, rewrite, rows_of
from benchmarks.timing import as_json, provenance, write_json
from skd.latency_measuring import whole_widths
from skd.support.curve import sizes_of

BEGIN, END = "<!-- latency:begin -->", "<!-- latency:end -->"
MODEL = "deit_tiny_patch16_224"
BATCHES = (1, 8)
WHAT = (
    "Sub-networks of DeiT-Tiny with random weights, planned on eight random images: milliseconds of a batch, against "
    "those that a table predicts which was measured in the same rounds and not fitted to any of them."
)


def planned() -> skd.SuperNet:
    torch.manual_seed(0)
    images = [(torch.rand(8, 3, 224, 224), torch.randint(0, 1000, (8,)))]
    supernet = skd.convert(timm.create_model(MODEL), images)
    supernet.dropout_list = skd.plan(supernet, images, target=0.9, rounds=4)
    return supernet


def others(supernet: skd.SuperNet, count: int) -> list[int]:
    """About so many entries at even distances in MACs, without those that the table is fitted to."""
    macs, fitted = supernet.dropout_list.macs, whole_widths(supernet)
    wanted = np.linspace(macs[0], macs[-1], count)
    entries = dict.fromkeys(int(np.abs(macs - goal).argmin()) for goal in wanted)
    return [entry for entry in entries if tuple(supernet.widths(entry)) not in fitted]


def measured(supernet: skd.SuperNet, batch: int, count: int, rounds: int) -> Info:
    entries = others(supernet, count)
    settings: dict[str, Any] = {"batch_size": batch, "device": "cpu", "threads": 1, "rounds": rounds}
    table = skd.measure_latency(supernet, check=entries, **settings)
    error, rank = table.agreement or (math.nan, math.nan)
    print(f"batch {batch}: median error {error:.1%}, rank correlation {rank:.3f}, of {len(entries)} sub-networks")
    full = next(whole.ms for whole in table.whole if list(whole.widths) == supernet.widths())
    rows = sizes_of(supernet, entries, table)
    found = [
        {**row, "ms": one.ms, "error": row["latency_ms"] / one.ms - 1, "speedup": full / one.ms}
        for row, one in zip(rows, table.checked, strict=True)
    ]
    return Info(
        median_error=error,
        rank_correlation=rank,
        full_ms=full,
        subnetworks=[as_json(row) for row in found],
        table=table.to_dict(),
    )


def table_of(results: Info) -> str:
    """The page's table: each sub-network at each batch size, and below it how well the predictions agree."""
    runs = results.parts(results)
    lists = {name: run.rows("subnetworks") for name, run in runs.items()}
    columns = ["of the MACs"]
    for name in runs:
        columns += [f"{name}, measured (ms)", "predicted (ms)", "error", "speed-up"]
    by_entry = {name: {row["entry"]: row for row in rows} for name, rows in lists.items()}
    lines = []
    for row in next(iter(lists.values())):
        cells = [f"{row.number('macs_fraction'):.1%}"]
        for rows in by_entry.values():
            one = rows[row["entry"]]
            cells += [f"{one.number('ms'):.1f}", f"{one.number('latency_ms'):.1f}"]
            cells += [f"{one.number('error'):+.1%}", f"{one.number('speedup'):.2f}x"]
        lines.append(cells)
    text = "\n".join(rows_of(columns, lines, 0))
    agreed = [
        f"{name}: median error {math.ceil(1000 * run.number('median_error')) / 10:.1f} %, rank correlation "
        f"{math.floor(1000 * run.number('rank_correlation')) / 1000:.3f}, full network {run.number('full_ms'):.1f} ms"
        for name, run in runs.items()
    ]
    return f"{text}\n\n" + "\n".join(f"* {line}" for line in agreed)


def section(document: Info) -> str:
    versions = document.part("versions")
    where = (
        f"{document['device']}, one thread, torch {versions['torch']}, commit {document.text('commit')[:8]}, "
        f"{document['date']}. {document['what']}"
    )
    return f"{where}\n\n{table_of(document.part('results'))}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description="Predict latencies; time them.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--rounds", type=int, default=41, help="how often everything is timed (default: %(default)s)")
    parser.add_argument("--networks", type=int, default=20, help="sub-networks to compare (default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="instead: the table of such a result")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between PAGE's markers")
    given = parser.parse_args(arguments)
    if given.table is not None:
        text = section(Info(json.loads(given.table.read_text())))
        if given.write is None:
            print(text)
        else:
            rewrite(given.write, text, BEGIN, END)
        return 0
    supernet = planned()
    results = {f"batch {batch}": measured(supernet, batch, given.networks, given.rounds) for batch in BATCHES}
    write_json(given.json, {**provenance(), "what": WHAT, "model": MODEL, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
