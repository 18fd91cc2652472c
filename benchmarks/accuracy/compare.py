"""Which way to plan, train and correct gives the best sub-networks: contenders on the same networks and images.

python -m benchmarks.accuracy.compare --data DIR --out DIR --plan ablation    hours on a CPU; goes on where it stopped
python -m benchmarks.accuracy.compare --out DIR --json FILE    collects what is finished
python -m benchmarks.accuracy.compare --out DIR --known FILE --data DIR    goes on from a result, without its folder
python -m benchmarks.accuracy.compare --table FILE --write docs/ACCURACY.md --plot docs/accuracy.svg

A unit is one contender on one network, and a file under DIR/units as soon as it is finished; pre-trained networks
are kept under DIR/networks. A unit is measured again if its contender or its set are described differently, but not
if skd itself has changed: then delete DIR/units. A second process may share the folder with `--part`; each has one
thread. A network that is pre-trained on another kind of processor is another network: with `--known`, add networks
rather than contenders of the networks that FILE has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import measuring, summary
from benchmarks.accuracy.contenders import CONTENDERS, PLANS, Unit
from benchmarks.accuracy.images import SIZES, TASKS, Images, described, load, pretrained
from benchmarks.result import Info, rewrite
from benchmarks.timing import as_json, provenance, write_json
from skd.demo.running import reproducible
from skd.support import outputs

WHERE = ("device", "cores", "versions", "commit", "date")  # provenance


def settings(unit: Unit) -> Info:
    """What a stored unit must have been measured with to be used."""
    shared: dict[str, object] = {
        "shares": measuring.SHARES,
        "target": measuring.TARGET,
        "planning": measuring.PLANNING,
    }
    everything = {
        "contender": described(CONTENDERS[unit.contender]),
        "task": described(TASKS[unit.task]),
        "size": SIZES[unit.size],
        **shared,
    }
    stored = as_json(everything)
    assert isinstance(stored, dict)
    return Info(stored)


def file_of(unit: Unit, out: Path) -> Path:
    words = unit.contender.replace(", ", "-").replace(" ", "-")
    return out / "units" / f"{unit.task}-{unit.size}-{unit.seed}-{words}.json"


def finished(unit: Unit, out: Path) -> Info | None:
    """The stored figures of a unit; None if there are none, or those of other settings."""
    file = file_of(unit, out)
    if not file.exists():
        return None
    found = Info(json.loads(file.read_text()))
    return found if found.part("settings") == settings(unit) else None


def run(units: Sequence[Unit], data: str | None, out: Path, hours: float) -> int:
    """Measure the units that are not there, in order, until the time is over; how many were measured."""
    end, known, done, where = time.monotonic() + 3600 * hours, dict[str, Images](), 0, provenance()
    (out / "units").mkdir(parents=True, exist_ok=True)
    for unit in units:
        if finished(unit, out) is not None:
            continue
        if time.monotonic() >= end:
            print(f"{hours:g} hours are over; the same command goes on with {unit.name}", flush=True)
            break
        if unit.task not in known:
            known = {unit.task: load(unit.task, data)}
        start = time.process_time()
        with reproducible(unit.seed):
            model = pretrained(*unit.network, known[unit.task], out / "networks")
            before = time.process_time()
            found = measuring.measured(unit, CONTENDERS[unit.contender], model, known[unit.task])
        seconds = {"network": round(before - start, 2), "unit": round(time.process_time() - before, 2)}
        record = Info(unit._asdict()) | found | {"settings": settings(unit), "total_seconds": Info(seconds)}
        outputs.write_json(file_of(unit, out), {**record, **where})
        done += 1
        print(line(unit, Info(record)), flush=True)
    return done


def line(unit: Unit, record: Info) -> str:
    """A unit in one line: top-1 by budget, with what compensation makes of it."""
    points = []
    for row in record.rows("rows"):
        after = row["compensated"]
        shown = f"{row.number('alone'):.2f}" + ("" if after is None else f">{row.number('compensated'):.2f}")
        points.append(f"{row.number('share'):.0%} {shown}")
    seconds = record.part("total_seconds")
    return f"{unit.name} ({seconds.number('unit'):.0f} s): full {record.number('full'):.2f}; " + ", ".join(points)


def collected(units: Sequence[Unit], out: Path) -> Info:
    """All finished units as one result; what they share stands once."""
    records = [record for unit in units if (record := finished(unit, out)) is not None]
    if not records:
        raise ValueError(f"--out is {str(out)!r}; it has no finished unit of these")
    latest = max(records, key=lambda record: record.text("date"))
    where = {key: latest[key] for key in WHERE}
    rows = [
        {key: value for key, value in record.items() if key != "settings" and value != where.get(key, ...)}
        for record in records
    ]
    contenders = {unit.contender: described(CONTENDERS[unit.contender]) for unit in units}
    images: dict[str, object] = {name: described(task) for name, task in TASKS.items()}
    document = as_json({"units": rows, "contenders": contenders, "tasks": images, "sizes": SIZES, **where})
    assert isinstance(document, dict)
    return Info(document)


def take_known(units: Sequence[Unit], result: Info, out: Path) -> None:
    """Write the units of a collected result back as files, but for those that are there, or are of other settings."""
    (out / "units").mkdir(parents=True, exist_ok=True)
    shared = {key: result[key] for key in WHERE}
    wanted = {tuple(unit): unit for unit in units}
    for row in result.rows("units"):
        unit = wanted.get((row["task"], row["size"], int(row.number("seed")), row["contender"]))
        if unit is None or finished(unit, out) is not None:
            continue
        described_as = [("contenders", unit.contender), ("tasks", unit.task), ("sizes", unit.size)]
        known, now = [result.part(kind)[name] for kind, name in described_as], settings(unit)
        if known == [now["contender"], now["task"], now["size"]]:
            outputs.write_json(file_of(unit, out), {**shared, **row, "settings": now})


def part_of(units: Sequence[Unit], part: str) -> list[Unit]:
    """Those of every n-th network, from the i-th on, for a part "i/n"."""
    number, count = map(int, part.split("/"))
    networks = list(dict.fromkeys(unit.network for unit in units))
    own = set(networks[number::count])
    return [unit for unit in units if unit.network in own]


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.compare", description=about)
    parser.add_argument("--data", metavar="DIR", help="folder with Fashion-MNIST's idx files; run the plan")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of networks and finished units")
    parser.add_argument("--plan", choices=[*PLANS, "all"], default="all", help="which units (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help='such as "harder/*/0/loss*"')
    parser.add_argument("--hours", type=float, default=5.0, help="begin no unit after so long (default: %(default)s)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="for N processes that share --out")
    parser.add_argument("--known", type=Path, metavar="FILE", help="a result to take finished units from")
    parser.add_argument("--json", type=Path, metavar="FILE", help="collect finished units into a result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="a result to show in place of running")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite the tables between FILE's markers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.svg, .png)")
    args = parser.parse_args(arguments)
    if args.out is None and (args.table is None or args.known is not None):
        parser.error("give --out, or --table without --known")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = arguments_of(arguments)
    if args.table is None:
        names = list(PLANS) if args.plan == "all" else [args.plan]
        units = list(dict.fromkeys(unit for name in names for unit in PLANS[name]()))
        units = [unit for unit in part_of(units, args.part) if unit.matches(args.only)]
        if args.known is not None:
            take_known(units, Info(json.loads(args.known.read_text())), args.out)
        if args.data is not None:
            run(units, args.data, args.out, args.hours)
        result = collected(units, args.out)
        write_json(args.json, result)
    else:
        result = Info(json.loads(args.table.read_text()))
    if args.write is not None:
        rewrite(args.write, summary.tables(result), summary.BEGIN, summary.END)
    if args.plot is not None:
        summary.plot(result, args.plot)
    print(summary.tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
