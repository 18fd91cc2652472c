"""timm's readers of streams, made to give each image undecoded, as an `Item`, and to hide nothing that fails.

timm's own decode on the way: to 8 bits (Pillow cuts 16 off at 255), upright or not, and without those that fail. So
only `skd.data.readers.StreamSource` decodes, as it does for all other sources. Each reader is a subclass in a file of
its own, which imports the library that it reads with; `unread` is a list of what it notes (names and reasons).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from timm.data.dataset import IterableImageDataset

STREAMS = {"wds": "Shards", "hfids": "Rows", "tfds": "Examples"}


def open_stream(prefix: str, name: str, labelled: bool, **arguments: Any) -> Any:
    """timm's iterable data set around one of the readers.

    Args:
        prefix: one of `STREAMS`.
        name: what follows it.
        labelled: False: the label of every image is None.
        arguments: of timm's reader; None stands for its default.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    reader = getattr(import_module(f"{__name__}.{prefix}"), STREAMS[prefix])
    return IterableImageDataset(given.get("root"), reader=reader(labelled, name=name, **given))
