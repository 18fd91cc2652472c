"""Hugging Face data sets as streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import fsspec
from timm.data.readers.reader_hfids import ReaderHfids

from skd.data.readers import Item


class Rows(ReaderHfids):  # type: ignore[misc]
    ds: Any

    def __init__(self, labelled: bool, **arguments: Any) -> None:
        if not labelled:
            arguments["target_key"] = arguments.get("input_key", "image")  # timm's reader wants a column
        super().__init__(**arguments)
        self.unread: list[tuple[str, str]] = []

    def _lazy_init(self) -> None:
        super()._lazy_init()
        self.ds = self.ds.cast_column(self.input_key, datasets.Image(decode=False))

    def __iter__(self) -> Iterator[tuple[Item, Any]]:
        for image, target in super().__iter__():
            yield _item(image), target


def _item(image: dict[str, Any] | None) -> Item:
    """The bytes of an image, or those of the file that it is."""
    if image is None:
        return Item(None, None, "the column has no image")
    path = image["path"]
    name = path if path and "/" in path else None  # the name alone may be that of many
    if image["bytes"]:
        return Item(image["bytes"], name)
    try:
        with fsspec.open(path, "rb") as file:
            return Item(file.read(), name)
    except Exception as error:  # each file system has its own
        return Item(None, name, f"{type(error).__name__}: {error}")
