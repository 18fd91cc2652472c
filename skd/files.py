"""Super-networks and extracted models as safetensors files that rebuild themselves; nothing is pickled.

The tensors have timm's names; where a module is skipped, those of its layers are there with a size of 0. The JSON
header, under the metadata key "skd", says how to build what they fit:

    format          1, 2 where there are corrections, or 3 where there are moments
    kind            "supernet" or "model"
    architecture    timm's name, or null: then model_args are the class's own constructor arguments
    model_class     timm's: "VisionTransformer", "VisionTransformerDistilled", "Eva" or "Beit"
    model_args      keyword arguments
    norm_eps        of all norms, where it is not timm's default (directly built models), else null
    widths          [[attention, MLP], ...], the widths of each block's modules
    dropout_list    what `DropoutList.to_json` wrote, or null
    corrections     [[entry, [module, ...]], ...]; absent in files of earlier versions
    moments         [module, ...], whose features have moments; absent in files of earlier versions
    attention_group coordinates of a head that one step of planning removes, or null; absent in earlier files
    data            mean, std, interpolation, crop_pct, input_size, ...
    label_names     class names, or null
    versions        of skd, torch and timm when written
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import nn

from skd import __version__
from skd.corrections import Correction
from skd.dropout_list import DropoutList
from skd.extract import extract
from skd.moments import FeatureMoments
from skd.supernet import SuperNet
from skd.support.devices import usable_device
from skd.support.outputs import replacing, usual_mode
from skd.support.taps import frozen
from skd.vit import Module, Network, OutputLayer, TimmModel, describe, image_size, probe, unwrapped
from skd.vit.construction import Construction, build, construction

KEY = "skd"
FORMAT = 3
CORRECTED = 2  # the format of files with corrections and without moments
PLAIN = 1  # the format of files with neither, which the earliest versions read too
# Largest relative difference of logits after a round trip, by dtype; the arithmetic is the same, so nearly zero.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class Header(Construction):
    """The JSON header, as above."""

    format: int
    kind: str
    widths: list[list[int]]
    dropout_list: str | None
    corrections: list[tuple[int, list[str]]]
    moments: list[str]
    attention_group: int | None
    data: dict[str, object]
    label_names: list[str] | None
    versions: dict[str, str]


def save(obj: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a super-network, an extracted model or any timm model that `skd.convert` takes to a safetensors file.

    Drop rates are not part of the file (timm leaves them out of a model's arguments): a loaded model has none.
    The file is rebuilt and compared with `obj` (keys, shapes, logits of a random image) before it takes its place:
    a file that exists can be loaded, and a failure leaves what was there before.

    Raises:
        ValueError: `obj` is something else, `path` is not a file in an existing folder, or the model cannot be
            rebuilt from timm's constructor arguments.
        OSError: the file cannot be written (a full disk, no permission).
    """
    obj = unwrapped(obj)
    path = Path(os.path.realpath(path))  # a link stays, and its target is replaced
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(f"path is {str(path)!r}; it must be a file in an existing folder")
    header, tensors = _contents(obj)
    tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        _write(tensors, header, temporary)
        _verify(obj, partial(_read, temporary))


def check_saveable(obj: SuperNet | TimmModel) -> None:
    """Check that a file of `obj` could be rebuilt, without writing one.

    Raises:
        ValueError: it could not.
    """
    header, tensors = _contents(obj)
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta and owners.setdefault(tensor.data_ptr(), name) != name:
            raise ValueError(f"obj cannot be saved: {owners[tensor.data_ptr()]} and {name} are one tensor")
    _verify(obj, lambda _: (json.loads(json.dumps(header)), tensors))


def _contents(obj: SuperNet | TimmModel) -> tuple[Header, dict[str, torch.Tensor]]:
    header = header_of(obj)
    tensors = _tensors(obj, header) | (_added_tensors(obj) if isinstance(obj, SuperNet) else {})
    return header, {key: tensor.detach() for key, tensor in tensors.items()}


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Read what `save` wrote.

    Returns:
        A `SuperNet` with its dropout list, or a timm model; on `device`, in evaluation mode.

    Raises:
        ValueError: no such device, or one without data (meta); no such file, truncated or padded, not written by
            `save`, by a newer version, of an unknown architecture, or with tensors that do not fit it.
    """
    device = usable_device(device)
    header, state = _read(Path(path), device)
    try:
        return _rebuild(header, state, device)
    except MemoryError:
        raise
    except Exception as error:  # timm raises many kinds of errors for a damaged header
        raise ValueError(f"path {str(path)!r} cannot be rebuilt: {type(error).__name__}: {error}") from error


def header_of(obj: SuperNet | TimmModel) -> Header:
    """What the file of `obj` says about it; ValueError where nothing says how it was built."""
    supernet = isinstance(obj, SuperNet)
    model = obj.model if supernet else obj
    network = obj.network if supernet else describe(model)
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    corrections = [(entry, list(own.layers)) for entry, own in obj.corrections.items()] if supernet else []
    moments = list(obj.moments) if supernet else []
    return {
        "format": FORMAT if moments else CORRECTED if corrections else PLAIN,
        "kind": "supernet" if supernet else "model",
        **construction(model, network),
        "widths": [[module.full_width for module in modules] for modules in network.by_block],
        "dropout_list": obj.dropout_list.to_json() if supernet else None,
        "corrections": corrections,
        "moments": moments,
        "attention_group": network.attention_group,
        "data": resolve_model_data_config(model) | {"input_size": [model.in_chans, *image_size(model)]},
        "label_names": None if names is None else [str(name) for name in names],
        "versions": {"skd": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }


def _tensors(obj: nn.Module, header: Header) -> dict[str, torch.Tensor]:
    """The state dict of `obj`, together with the tensors that stand for skipped modules."""
    if all(_flat(header["widths"])):
        return obj.state_dict()
    try:
        with torch.device("meta"):
            whole = build(header)
            placeholders = _placeholders(whole, describe(whole), header["widths"])
    except Exception as reason:
        raise ValueError(f"obj cannot be rebuilt from its constructor arguments: {reason}") from reason
    dtype = next(obj.parameters()).dtype
    return obj.state_dict() | {key: torch.empty(shape, dtype=dtype) for key, shape in placeholders.items()}


def _added_tensors(supernet: SuperNet) -> dict[str, torch.Tensor]:
    """The tensors of all corrections and moments.

    ``corrections.7.blocks.3.mlp.fc2.weight`` is of entry 7, ``moments.blocks.3.mlp.fc2.mean`` of what enters fc2.
    """
    moments = {
        f"{_moments_prefix(module)}.{kind}": tensor
        for module in supernet.infos
        if module.name in supernet.moments
        for kind, tensor in supernet.moments[module.name]._asdict().items()
    }
    return moments | {
        f"{_correction_prefix(entry, module)}.{kind}": tensor
        for entry, correction in supernet.corrections.items()
        for module in supernet.infos
        if module.name in correction.layers
        for kind, tensor in correction.layers[module.name]._asdict().items()
        if tensor is not None
    }


def _correction_prefix(entry: int, module: Module) -> str:
    return f"corrections.{entry}.{module.path}.{module.output_name}"


def _moments_prefix(module: Module) -> str:
    return f"moments.{module.path}.{module.output_name}"


def _with_moments(supernet: SuperNet, header: Header, tensors: dict[str, torch.Tensor]) -> SuperNet:
    """`supernet` with the moments that the header lists; their tensors are taken out of `tensors`."""
    modules, found = {module.name: module for module in supernet.infos}, dict[str, FeatureMoments]()
    for name in header.get("moments", []):
        own = (tensors.pop(f"{_moments_prefix(modules[name])}.{kind}") for kind in FeatureMoments._fields)
        found[name] = FeatureMoments(*own)
    supernet.moments = found
    return supernet


def _with_corrections(supernet: SuperNet, header: Header, tensors: dict[str, torch.Tensor]) -> SuperNet:
    """`supernet` with the corrections that the header lists."""
    modules, found = {module.name: module for module in supernet.infos}, dict[int, Correction]()
    for entry, names in header.get("corrections", []):
        layers = {}
        for name in names:
            prefix = _correction_prefix(entry, modules[name])
            layers[name] = OutputLayer(tensors.pop(f"{prefix}.weight"), tensors.pop(f"{prefix}.bias", None))
        found[entry] = Correction(tuple(supernet.widths(entry)), layers)
    if tensors:
        raise ValueError(f"{len(tensors)} tensors are of no correction and no module, such as {min(tensors)}")
    supernet.corrections = found
    return supernet


def _placeholders(whole: TimmModel, network: Network, widths: list[list[int]]) -> dict[str, tuple[int, ...]]:
    """The shapes, each with a 0, of the tensors that stand for skipped modules.

    There is one for each parameter along which the coordinates of a skipped module lie. Through them a file names
    every layer of `whole`, so that code which cuts each layer to the size of its tensor (the code in docs/FILES.md,
    earlier versions of skd) can rebuild the model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for module, width in zip(network.modules, _flat(widths), strict=True):
        if width == 0:
            sizes = {name: list(parameter.shape) for name, parameter in module.of(whole).named_parameters()}
            for name, (axis, _) in module.coordinates(whole).items():
                sizes[name][axis] = 0
                shapes[f"{module.path}.{name}"] = tuple(sizes[name])
    return shapes


def _flat(widths: list[list[int]]) -> list[int]:
    return [width for block in widths for width in block]


def _write(tensors: dict[str, torch.Tensor], header: Header, path: Path) -> None:
    try:
        save_file(tensors, path, metadata={KEY: json.dumps(header)})
    except SafetensorError as error:
        raise OSError(f"the file could not be written: {error}") from None
    except RuntimeError as error:  # tied tensors
        raise ValueError(f"obj cannot be saved: {error}") from None
    usual_mode(path)


def _read(path: Path, device: str | torch.device) -> tuple[Header, dict[str, torch.Tensor]]:
    if not path.is_file():
        raise ValueError(f"path is {str(path)!r}; there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise ValueError(f"path {str(path)!r} is a safetensors file, but skd did not write it")
            # Moments stay on the CPU; there every tensor is pages of the file.
            state = {
                key: file.get_tensor(key).to("cpu" if key.startswith("moments.") else device)
                for key in file.keys()  # noqa: SIM118 (not a dict)
            }
    except SafetensorError as error:
        raise ValueError(f"path {str(path)!r} is truncated, padded or no safetensors file: {error}") from None
    try:
        header: Header = json.loads(metadata[KEY])
        written = int(header["format"])
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        raise ValueError(f"path {str(path)!r} has a damaged header") from None
    if not 1 <= written <= FORMAT:
        raise ValueError(f"path {str(path)!r} has format {written}; this version of skd reads 1 to {FORMAT}")
    return header, state


def _rebuild(header: Header, state: dict[str, torch.Tensor], device: str | torch.device) -> SuperNet | TimmModel:
    """Build what a file holds. Shapes are compared on the meta device first, so a wrong header takes no memory."""
    if header["kind"] not in ("supernet", "model"):
        raise ValueError(f"kind is {header['kind']!r}; it may be 'supernet' or 'model'")
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if not len(blocks) <= len(header["widths"]) == header["model_args"].get("depth", len(header["widths"])):
        raise ValueError(f"the file has {len(blocks)} blocks; its header has {len(header['widths'])}")
    added = {key: tensor for key, tensor in state.items() if key.startswith(("corrections.", "moments."))}
    state = {key: tensor for key, tensor in state.items() if key not in added}
    with torch.device("meta"):
        whole = build(header)
        network = describe(whole)
        placeholders = _placeholders(whole, network, header["widths"])
        model = _narrowed(whole, network, header["widths"])
    _check_fit(model, state, placeholders)
    state = {key: tensor for key, tensor in state.items() if key not in placeholders}
    model.load_state_dict(state, assign=True)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        # Buffers that are not saved have data only in a model that was not built on the meta device.
        dtype = next(model.parameters()).dtype
        model = _narrowed(build(header), network, header["widths"]).to(device, dtype)
        model.load_state_dict(state, assign=True)
    label_names = header["label_names"]
    model.pretrained_cfg = {
        **getattr(model, "pretrained_cfg", {}),
        **header["data"],
        "architecture": header["architecture"],
        "label_names": label_names,
    }
    if header["architecture"] is None:
        model._model_args = header["model_args"] | {"norm_eps": header["norm_eps"]}
    if header["kind"] == "supernet":
        network = describe(model).with_attention_group(header.get("attention_group"))
        dropout_list = DropoutList.from_json(header["dropout_list"] or "")
        supernet = SuperNet(model, dropout_list, copy=False, network=network).eval()
        return _with_corrections(_with_moments(supernet, header, added), header, added)
    if added:
        raise ValueError(f"a model has no corrections and no moments, but the file has {min(added)}")
    return model.eval()


def _narrowed(model: TimmModel, network: Network, widths: list[list[int]]) -> TimmModel:
    """`model` at the widths of a file: the model itself if they are full, or else what extraction makes of it."""
    flat = _flat(widths)
    full = [module.full_width for module in network.modules]
    if flat == full:
        return model
    supernet = SuperNet(model, copy=False, network=network)
    supernet.dropout_list = DropoutList(supernet.modules_in_order, [full, flat])
    return extract(supernet, entry=1)


def _check_fit(model: TimmModel, state: dict[str, torch.Tensor], placeholders: dict[str, tuple[int, ...]]) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} | placeholders
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = [
        f"{key} is {found.get(key, 'missing')}, it should be {expected.get(key, 'absent')}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit the architecture: {'; '.join(wrong[:3])}")


@torch.no_grad()
def _verify(
    obj: SuperNet | TimmModel, read: Callable[[torch.device], tuple[Header, dict[str, torch.Tensor]]]
) -> None:
    """Check that what `read` gives, on a device, can be rebuilt to a network with the logits of `obj`.

    Raises:
        ValueError: it cannot.
    """
    model = obj.model if isinstance(obj, SuperNet) else obj
    parameter = next(model.parameters())
    try:
        copy = _rebuild(*read(parameter.device), parameter.device)
    except Exception as reason:
        raise ValueError(f"obj cannot be rebuilt from its constructor arguments: {reason}") from reason
    image = probe(model)
    entries: list[dict[str, int]] = [{}]
    if isinstance(obj, SuperNet):
        entries += [{"entry": entry} for entry in {len(obj.dropout_list) - 1, *obj.corrections}]
    with frozen(obj):
        for entry in entries:
            expected, found = obj(image, **entry).double(), copy(image, **entry).double()
            error = (found - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp(min=1e-30)
            if error > TOLERANCE[parameter.dtype] or not torch.equal(expected.isnan(), found.isnan()):
                raise ValueError(
                    f"obj cannot be rebuilt from its constructor arguments: logits differ by {float(error):.1e}; "
                    "was a layer replaced by hand?"
                )
