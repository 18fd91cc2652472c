"""ONNX: one file in float32 that takes any number of images, compared with the network before it is kept."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from skd.export.comparison import compare, sample
from skd.export.description import description
from skd.vit import TimmModel

NEEDS = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # as for `compare`
LARGEST = 2**31 - 2**24  # bytes of weights: Protocol Buffers end at 2 GiB


def write(model: TimmModel, path: Path) -> str:
    """Write `model` to the file `path`: input "images" (B, channels, height, width), output "logits" (B, classes).

    The preprocessing and the names of the classes are in the file's metadata_props.

    Raises:
        ImportError: one of the packages that this needs is not installed.
        ValueError: the weights do not fit into one file, or ONNX Runtime computes something else.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ImportError(f"exporting to ONNX needs {', '.join(missing)}: pip install 'skd[onnx]'")
    size = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    if size > LARGEST:
        raise ValueError(
            f"format is 'onnx', but the weights take {size:,} bytes in float32 and one file of ONNX at most "
            f"{LARGEST:,}; take a smaller sub-network, or format 'pt2'"
        )
    single = copy.deepcopy(model).cpu().float().eval()
    images = sample(single, 2)
    with _quiet():
        program = torch.onnx.export(
            single,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(description(model))
    program.save(path, external_data=False)
    compare(single, partial(_run, path), TOLERANCE, "what ONNX Runtime computes")
    return "onnx"


def _run(path: Path, images: torch.Tensor) -> torch.Tensor:
    """The logits that ONNX Runtime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its warnings of things that do not concern its caller."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
