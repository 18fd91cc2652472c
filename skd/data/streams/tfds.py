"""TensorFlow data sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets
from timm.data.readers.reader_tfds import ReaderTfds

from skd.data.readers import Item


class Examples(ReaderTfds):  # type: ignore[misc]
    def __init__(self, labelled: bool, **arguments: Any) -> None:
        if not labelled:
            arguments["target_key"] = arguments.get("input_key", "image")  # timm's reader wants a feature
        super().__init__(**arguments)
        self.unread: list[tuple[str, str]] = []

    def _input_decoders(self) -> Any:
        return _undecoded(super()._input_decoders())

    def __iter__(self) -> Iterator[tuple[Item, Any]]:
        for image, target in super().__iter__():
            yield Item(image), target


def _undecoded(decoders: Any) -> Any:
    """TensorFlow's decoder of the image, in a nest of names, gives way to none."""
    if isinstance(decoders, dict):
        return {name: _undecoded(decoder) for name, decoder in decoders.items()}
    return tensorflow_datasets.decode.SkipDecoding()
