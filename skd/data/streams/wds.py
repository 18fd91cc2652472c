"""Web data sets: shards in tar format."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image
from timm.data.readers.class_map import remap_target
from timm.data.readers.reader_wds import ReaderWds, _decode, log_and_continue
from webdataset import DataPipeline

from skd.data.modes import extensions
from skd.data.readers import Item, LabelError

_FIRST = ("jpg", "png", "webp")  # timm's order, where a sample has several images


class Shards(ReaderWds):  # type: ignore[misc]
    remap_class: bool
    ds: Any

    def __init__(self, labelled: bool, **arguments: Any) -> None:
        arguments.pop("download", None)
        others = sorted({ending[1:] for ending in extensions()} - {*_FIRST})
        super().__init__(**{"input_key": ";".join([*_FIRST, *others]), **arguments})
        self.labelled = labelled
        self.unread: list[tuple[str, str]] = []
        self._maps, self.remap_class = self.remap_class, False  # here, where the image has a name

    def _lazy_init(self) -> None:
        """timm's pipeline, up to where it decodes a sample and renames its parts."""
        super()._lazy_init()
        stages = self.ds.pipeline[:-2]
        for stage in stages:
            filled = getattr(stage, "kw", {})
            if filled.get("handler") is log_and_continue:
                filled["handler"] = self._note
        self.ds = DataPipeline(*stages, self._items)

    def _note(self, error: Exception) -> bool:
        """A shard that is not there, or whose rest cannot be read, is left out; the others are read."""
        named = [part for part in error.args[1:] if isinstance(part, str)]
        reason = str(error.args[0]) if error.args else ""
        self.unread.append((named[-1] if named else "a shard", f"{type(error).__name__}: {reason}"))
        return True

    def _items(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            name = os.path.join(str(sample["__url__"]), str(sample["__key__"]))
            ending = next((key for key in self.input_key.split(";") if key in sample), None)
            if ending is None:
                has = ", ".join(key for key in sample if not key.startswith("__"))
                yield {"image": Item(None, name, f"no image by its name ({has})"), "target": None}
                continue
            yield self._item(sample, f"{name}.{ending}", sample[ending])

    def _item(self, sample: dict[str, Any], name: str, content: bytes) -> dict[str, Any]:
        """Raises LabelError: the sample has a label that is of no use."""
        if not self.labelled:
            return {"image": Item(content, name), "target": None}
        keys, field = self.target_keys or self.target_key, self.split_info.alt_label
        if not keys and not field and "cls" not in sample:
            return {"image": Item(None, name, "it has no label (cls)"), "target": None}
        try:
            decoded = _decode({**sample, "jpg": _PIXEL}, "jpg", "", keys, field)
        except (KeyError, TypeError, ValueError) as error:
            raise LabelError(f"{name} has a label that cannot be used: {error}") from None
        if decoded is None:
            return {"image": Item(None, name, "its label is below 0"), "target": None}
        target = decoded["target"]
        if self._maps:
            try:
                target = remap_target(target, self.class_to_idx, self._source_names, self.dense_target)
            except KeyError as key:
                raise LabelError(f"{name} has a label that the class map does not have: {key}") from None
        return {"image": Item(content, name), "target": target}


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    return file.getvalue()


_PIXEL = _png()  # for timm's function, which wants an image beside the label
