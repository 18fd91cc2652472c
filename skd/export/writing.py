"""`export`: one network, or one for each of several budgets, in a format that others load; all of it or nothing."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import nn

from skd.cost import cost
from skd.export import folders, onnx_file, pt2
from skd.export.manifest import Member, digests, write_manifest
from skd.extract import choose_entry, extract
from skd.latency import LatencyTable, as_table
from skd.supernet import SuperNet
from skd.support.curve import sizes_of
from skd.support.devices import usable_device
from skd.support.outputs import new_folder, output_file, temporary_folder
from skd.vit import describe, unwrapped


@dataclass(frozen=True)
class Format:
    """How one format is written.

    Attributes:
        ending: of its file; "" for a folder.
        write: a function that writes a model to a path and returns the layout (`Member`).
    """

    ending: str
    write: Callable[..., str]


FORMATS = {
    "timm": Format("", folders.write),
    "onnx": Format(".onnx", onnx_file.write),
    "pt2": Format(".pt2", pt2.write),
}


class Options(TypedDict, total=False):
    """The options of `export`."""

    format: str
    macs: float | None
    params: float | None
    entry: int | None
    latency_ms: float | None
    latency: LatencyTable | None
    shares: Sequence[float] | None
    convention: str
    corrected: bool | str
    top1: Mapping[int, float] | None
    compiled: bool | None
    device: str | torch.device


def export(
    network: nn.Module,
    out: str | os.PathLike[str],
    *,
    format: str = "timm",
    macs: float | None = None,
    params: float | None = None,
    entry: int | None = None,
    latency_ms: float | None = None,
    latency: LatencyTable | None = None,
    shares: Sequence[float] | None = None,
    convention: str = "full",
    corrected: bool | str = True,
    top1: Mapping[int, float] | None = None,
    compiled: bool | None = None,
    device: str | torch.device = "cpu",
) -> list[Member]:
    """Write a network in a format that is loaded without skd. What was written is loaded and compared first.

    * "timm": a folder with config.json, model.safetensors and the preprocessing. If timm can build the network, as
      it can the full one, ``timm.create_model("local-dir:OUT", pretrained=True)`` loads it, and so do "hf-hub:" and
      the TimmWrapper of transformers. Otherwise the folder has a model.py, whose ``load(folder)`` needs timm alone.
    * "onnx": a file in float32 that takes any number of images; the package extra skd[onnx] is needed.
    * "pt2": a program of torch.export that takes any number of images and, `compiled`, a package of AOTInductor
      beside it (half.pt2, half.aoti.pt2).

    Args:
        network: a super-network, or a plain model such as `skd.finetune` leaves; not changed.
        out: a new or empty folder for "timm" or with `shares`; otherwise a file, which is replaced; a
            package beside a "pt2" goes with it.
        macs, params, entry, latency_ms, convention, corrected: one sub-network, as for `skd.extract`; none for a
            plain model.
        latency: a table (`skd.measure_latency`), which `latency_ms` needs; without it, and with `shares`, its
            predictions go into the manifest.
        shares: instead of these, a share of the MACs for each of several sub-networks. `out` then gets one file or
            folder for each, and a manifest.json (``from skd.export import read_manifest`` reads it).
        top1: top-1 in percent, by entry, where it is known; for the manifest.
        compiled: of "pt2": whether the package is written, which takes a minute. None: where there is a compiler.
        device: of "pt2": where the files run.

    Returns:
        What was written; of `shares` each different sub-network once, the largest first. Paths of files are those in
        the manifest's folder, or else in the folder that has `out`.

    Raises:
        ValueError: an unknown format, a bad `out` or choice, an option of another format, a network that nothing can
            rebuild, or a file that does not compute what the network does.
        ImportError: packages that "onnx" needs are missing.
        OSError: it cannot be written.
    """
    network = unwrapped(network)
    write = _writer(format, compiled, device)
    choices = _choices(network, macs, params, entry, latency_ms, latency, shares, convention)
    _check_others(network, convention, corrected, top1, latency)
    ending = FORMATS[format].ending
    place = _place(out, ending if shares is None else "")
    package = pt2.compiled_path(place) if format == "pt2" and shares is None else None
    if package is not None:
        output_file(package, "the compiled package")
    members = list[Member]()
    with temporary_folder(place) as work:
        family = work / "family"
        for choice in choices:
            name = place.name if shares is None else f"macs-{choice.share}{ending}"
            (own := work / f"one-{len(members)}").mkdir()
            model, member = _member(network, choice, corrected, top1 or {}, latency)
            member["layout"] = write(model, own / name)
            member["files"] = digests(own)
            members.append(member)
            if package is not None:
                package.unlink(missing_ok=True)  # of the program that is replaced now
            _move(own, place.parent if shares is None else family)
        if shares is not None:
            write_manifest(family, members)
            os.replace(family, place)
    return members


def _writer(format: str, compiled: bool | None, device: str | torch.device) -> Callable[[nn.Module, Path], str]:
    """The function that writes a model to a path in this format."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it may be one of {list(FORMATS)}")
    where = usable_device(device)
    if format == "pt2":
        return partial(FORMATS[format].write, compiled=compiled, device=where)
    if compiled is not None or where.type != "cpu":
        given = f"compiled is {compiled}" if compiled is not None else f"device is {str(device)!r}"
        raise ValueError(f"{given}, but format is {format!r}; it goes with 'pt2' alone")
    return FORMATS[format].write


class _Choice(NamedTuple):
    """An entry of the dropout list, None for a plain model; and the share of the MACs that it was chosen for."""

    entry: int | None
    share: float | None = None


def _choices(
    network: nn.Module,
    macs: float | None,
    params: float | None,
    entry: int | None,
    latency_ms: float | None,
    latency: LatencyTable | None,
    shares: Sequence[float] | None,
    convention: str,
) -> list[_Choice]:
    """The sub-networks to write, each once, the largest first."""
    budget = {"macs": macs, "params": params, "entry": entry, "latency_ms": latency_ms, "shares": shares}
    given = [name for name, value in budget.items() if value is not None]
    if not isinstance(network, SuperNet):
        describe(network)  # which refuses what is no timm model
        if given:
            raise ValueError(f"{given[0]} is given with a plain model; only a super-network has sub-networks")
        return [_Choice(None)]
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(budget)} must be given; got {given or 'none'}")
    if latency_ms is not None:
        return [_Choice(choose_entry(network, latency_ms=latency_ms, latency=latency, convention=convention))]
    if shares is None:
        return [_Choice(choose_entry(network, macs=macs, params=params, entry=entry, convention=convention))]
    is_list = isinstance(shares, Collection) and not isinstance(shares, str)
    if not is_list or not shares or not all(isinstance(x, float | int) and 0 < x <= 1 for x in shares):
        raise ValueError(f"shares is {shares!r}; it must be a list of numbers above 0 and at most 1")
    found = {
        choose_entry(network, macs=share, convention=convention): share for share in sorted(map(float, set(shares)))
    }
    return [_Choice(entry, share) for entry, share in sorted(found.items())]


def _check_others(
    network: nn.Module,
    convention: str,
    corrected: bool | str,
    top1: Mapping[int, float] | None,
    latency: LatencyTable | None,
) -> None:
    """Refuse what says nothing about the network."""
    if isinstance(network, SuperNet):
        if latency is not None:
            as_table(latency).check(network)
        for entry in top1 or {}:
            network.widths(entry)  # which refuses what is no entry
        return
    for name, value, usual in (
        ("convention", convention, "full"),
        ("corrected", corrected, True),
        ("top1", top1, None),
        ("latency", latency, None),
    ):
        if value != usual:
            shown = "a table" if isinstance(value, LatencyTable) else repr(value)
            raise ValueError(f"{name} is {shown}, with a plain model; only a super-network has sub-networks")


def has_correction(network: SuperNet, entry: int, corrected: bool | str) -> bool:
    """Whether an entry is written with a correction, for `corrected` as `skd.extract` takes it."""
    return corrected == "moments" or (bool(corrected) and entry in network.corrections)


def _member(
    network: nn.Module,
    choice: _Choice,
    corrected: bool | str,
    top1: Mapping[int, float],
    latency: LatencyTable | None,
) -> tuple[nn.Module, Member]:
    """The model to write, and what is known of it before it is written."""
    if isinstance(network, SuperNet) and choice.entry is not None:
        (row,) = sizes_of(network, [choice.entry])
        macs, linear, params, fraction = row["macs"], row["macs_linear"], row["params"], row["macs_fraction"]
        compensated = has_correction(network, choice.entry, corrected)
        known = top1.get(choice.entry)
        ms = None if latency is None else float(latency.predict(network, choice.entry)[0])
        model = extract(network, entry=choice.entry, corrected=corrected).eval()
    else:
        full, model = cost(network), copy.deepcopy(network).eval()
        macs, linear, params, fraction = full.macs, cost(network, convention="linear").macs, full.params, None
        compensated, known, ms = False, None, None
    return model, {
        "entry": choice.entry,
        "share": choice.share,
        "macs": macs,
        "macs_linear": linear,
        "macs_fraction": fraction,
        "params": params,
        "compensated": compensated,
        "latency_ms": ms,
        "top1": None if known is None else float(known),
        "layout": "",
        "files": {},
    }


def _place(out: str | os.PathLike[str], ending: str) -> Path:
    """Where the result goes: a new folder where there is no ending, else a file."""
    if not ending:
        return new_folder(out)
    place = output_file(out, "out")
    if Path(out).suffix != ending:  # not that of a file that a link leads to
        raise ValueError(f"out is {str(out)!r}; the name of such a file must end in {ending}")
    return place


def _move(work: Path, folder: Path) -> None:
    """Move everything in `work` to `folder`."""
    folder.mkdir(exist_ok=True)
    for path in work.iterdir():
        os.replace(path, folder / path.name)
