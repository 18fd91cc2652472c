"""Sources that are streams: timm's readers of shards in tar format, of Hugging Face's streams and of TensorFlow's.

`StreamSource` has what the three kinds share. Each kind makes one of timm's readers, which imports the library that
it needs, and takes every image from it undecoded, as an `Item`. timm's readers would decode the images themselves:
they convert to 8 bits (Pillow clips 16-bit images at 255), ignore EXIF, and silently drop images that fail. Here
images are decoded by the same rules as in all other sources, and every failure is reported.
"""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from skd.data.pixels import extensions
from skd.data.source import About, BadImage, LabelError, Source, opened

_FIRST = ("jpg", "png", "webp")  # timm's order, where a sample of a shard has several images


class Item(NamedTuple):
    """An image of a stream that is not decoded yet: its bytes or PIL image, and its name where it has one.

    `missing` says why there is no image.
    """

    content: bytes | Image.Image | None
    name: str | None = None
    missing: str = ""


class StreamReader(Protocol):
    """The part of timm's stream readers that skd uses. Each builds its pipeline, `ds`, when it is first read."""

    ds: Any
    common_seed: int
    worker_seed: int
    dist_rank: int
    dist_num_replicas: int
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Any, object]]: ...

    def set_epoch(self, epoch: int) -> None: ...

    def set_loader_cfg(self, *, num_workers: int) -> None: ...


class StreamSource(Source):
    """Images in the order of a stream: they have no numbers, and each worker reads a part of them.

    Args:
        reader: from `reader_of`.
        training: shuffled, and cut into whole batches of the same number in every worker.
        about: of `Source`.

    Attributes:
        training: as given.
        unread: names of images that could not be read and why, since it was last emptied.
    """

    iterable = True

    def __init__(self, reader: StreamReader, name: str, mode: str, *, training: bool, **about: Unpack[About]) -> None:
        super().__init__(name, mode, **about)
        self._reader = reader
        self.training = training
        self.samples = int(getattr(reader, "num_samples", 0) or 0)
        self.unread: list[tuple[str, str]] = []

    @staticmethod
    @abstractmethod
    def reader_of(name: str, labelled: bool, arguments: dict[str, object]) -> StreamReader:
        """Make timm's reader, which imports its library.

        Args:
            name: what follows the prefix.
            labelled: False: the label of every image is of no use.
            arguments: of timm's reader.
        """

    @abstractmethod
    def _undecoded(self) -> Iterator[tuple[Item, object]]:
        """This worker's images, undecoded, and their labels as the data set has them."""

    def __len__(self) -> int:
        return self.samples

    def prepare(
        self, *, seed: int, worker_seed: int, epoch: int, workers: int, rank: int, world: int, rows: int
    ) -> None:
        """Set the order of an epoch and this rank's share of it, before the workers start.

        A reader keeps its pipeline, whose generators have moved on after an epoch. The pipeline is therefore built
        anew, so that an epoch is the same whether or not others came before it.
        """
        reader = self._reader
        reader.ds = None
        reader.common_seed, reader.worker_seed = seed, worker_seed
        reader.dist_rank, reader.dist_num_replicas = rank, world
        reader.batch_size = rows
        reader.set_epoch(epoch)
        reader.set_loader_cfg(num_workers=workers)

    def stream(self, pixels: bool = False) -> Iterator[tuple[Image.Image | torch.Tensor, int]]:
        """This worker's images and labels; images that cannot be read are left out and noted in `unread`.

        With `pixels`, images are tensors, (C, height, width) uint8, and JPEGs are decoded faster.

        In training, images of a further pass over this worker's part take their place, so that every worker gives as
        many images as the reader counts.

        Raises:
            BadImage: the reader failed, or none of the images to train with can be read.
            LabelError: a label is not one integer, or not in the class map.
        """
        owed = yield from self._pass(None, pixels)
        while owed and self.training:
            left = yield from self._pass(owed, pixels)
            if left == owed:
                raise BadImage(self.name, "no image of a worker's part can be read")
            owed = left

    def _pass(self, most: int | None, pixels: bool) -> Generator[tuple[Image.Image | torch.Tensor, int], None, int]:
        """One pass over this worker's part, which ends early once it has given `most` images.

        Returns:
            How many images could not be read; with `most`, how many are missing.
        """
        bad = read = 0
        for position, (item, label) in self._numbered():
            try:
                image = self._decoded(item, position, pixels)
            except BadImage as error:
                self.unread.append((error.file, error.reason))
                bad += 1
                continue
            yield image, self._label(label, position)
            read += 1
            if read == most:
                break
        return bad if most is None else most - read

    def _numbered(self) -> Iterator[tuple[int, tuple[Item, object]]]:
        """The reader's items, numbered. Errors of the reader become a BadImage or LabelError of the stream."""
        try:
            yield from enumerate(self._undecoded())
        except KeyError as key:
            raise LabelError(f"{self.name} has no such column, or its class map no such label: {key}") from None
        except (MemoryError, BadImage, LabelError):
            raise
        except Exception as reason:
            raise BadImage(self.name, reason) from reason

    def _decoded(self, item: Item, position: int, pixels: bool) -> Image.Image | torch.Tensor:
        """The image of an item.

        Raises:
            BadImage: it cannot be read.
        """
        name = item.name or self.file(position)
        content = item.content
        if content is None:
            raise BadImage(name, item.missing)
        with self._decoding(position, name):
            image = opened(io.BytesIO(content), not pixels) if isinstance(content, bytes) else content
            return (self._pixels if pixels else self._prepared)(image, position, name)

    def file(self, index: int) -> str:
        """As in `Source`. Each worker counts its images separately, so the number of the worker comes first."""
        worker = get_worker_info()
        return f"{self.name}[{index if worker is None else f'{worker.id}:{index}'}]"


Sample = Mapping[str, bytes | str]  # the files of a sample by their endings, and what webdataset adds to them


class Labelled(TypedDict):
    """What a pipeline gives to timm's reader: an image, and its label, not yet mapped."""

    image: Item
    target: object


class WebReader(StreamReader, Protocol):
    """The part of timm's ReaderWds that skd uses: also how it reads and maps labels."""

    remap_class: bool
    input_key: str
    target_key: str
    target_keys: Sequence[str]
    split_info: Any
    class_to_idx: Mapping[str, int]
    dense_target: bool
    _source_names: Any

    def _lazy_init(self) -> None: ...


class WebSource(StreamSource):
    """wds/FOLDER: web data sets, which are shards in tar format."""

    _reader: WebReader

    def __init__(self, reader: WebReader, name: str, mode: str, *, training: bool, **about: Unpack[About]) -> None:
        super().__init__(reader, name, mode, training=training, **about)
        self._maps, reader.remap_class = reader.remap_class, False  # `_item` maps: its errors can name the image

    @staticmethod
    def reader_of(name: str, labelled: bool, arguments: dict[str, object]) -> StreamReader:
        from timm.data.readers.reader_wds import ReaderWds

        others = sorted({ending[1:] for ending in extensions()} - {*_FIRST})
        given = {key: value for key, value in arguments.items() if key != "download"}
        return ReaderWds(name=name, **{"input_key": ";".join([*_FIRST, *others]), **given})

    def _undecoded(self) -> Iterator[tuple[Item, object]]:
        if self._reader.ds is None:
            self._build()
        yield from self._reader

    def _build(self) -> None:
        """Build timm's pipeline without its last two stages, which decode a sample and rename its parts."""
        from timm.data.readers.reader_wds import log_and_continue
        from webdataset import DataPipeline

        self._reader._lazy_init()
        stages = self._reader.ds.pipeline[:-2]
        for stage in stages:
            filled = getattr(stage, "kw", {})
            if filled.get("handler") is log_and_continue:
                filled["handler"] = self._note
        self._reader.ds = DataPipeline(*stages, self._items)

    def _note(self, error: Exception) -> bool:
        """Note a shard that is missing, or the rest of which cannot be read; the other shards are still read."""
        named = [part for part in error.args[1:] if isinstance(part, str)]
        reason = str(error.args[0]) if error.args else ""
        self.unread.append((named[-1] if named else "a shard", f"{type(error).__name__}: {reason}"))
        return True

    def _items(self, samples: Iterable[Sample]) -> Iterator[Labelled]:
        for sample in samples:
            name = os.path.join(str(sample["__url__"]), str(sample["__key__"]))
            ending = next((key for key in self._reader.input_key.split(";") if key in sample), None)
            if ending is None:
                has = ", ".join(key for key in sample if not key.startswith("__"))
                yield {"image": Item(None, name, f"no image by its name ({has})"), "target": None}
                continue
            content = sample[ending]
            assert isinstance(content, bytes)
            yield self._item(sample, f"{name}.{ending}", content)

    def _item(self, sample: Sample, name: str, content: bytes) -> Labelled:
        """The image and the label of a sample.

        Raises:
            LabelError: the label cannot be used.
        """
        from timm.data.readers.class_map import remap_target
        from timm.data.readers.reader_wds import _decode

        if not self.labelled:
            return {"image": Item(content, name), "target": None}
        reader = self._reader
        keys, field = reader.target_keys or reader.target_key, reader.split_info.alt_label
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
                target = remap_target(target, reader.class_to_idx, reader._source_names, reader.dense_target)
            except KeyError as key:
                raise LabelError(f"{name} has a label that the class map does not have: {key}") from None
        return {"image": Item(content, name), "target": target}


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    return file.getvalue()


_PIXEL = _png()  # timm's function for labels decodes an image too, so it gets this small one


class HubSource(StreamSource):
    """hfids/NAME: data sets of Hugging Face as streams."""

    @staticmethod
    def reader_of(name: str, labelled: bool, arguments: dict[str, object]) -> StreamReader:
        from timm.data.readers.reader_hfids import ReaderHfids

        return ReaderHfids(name=name, **_with_target(labelled, arguments))

    def _undecoded(self) -> Iterator[tuple[Item, object]]:
        reader: Any = self._reader
        if reader.ds is None:
            import datasets

            reader._lazy_init()
            stream: Any = reader.ds
            reader.ds = stream.cast_column(reader.input_key, datasets.Image(decode=False))
        for image, target in reader:
            yield _file_item(image), target


def _with_target(labelled: bool, arguments: dict[str, object]) -> dict[str, object]:
    """Name a column of labels, which timm's reader wants even where there are no labels."""
    return arguments if labelled else {**arguments, "target_key": arguments.get("input_key", "image")}


class HubImage(TypedDict):
    """An image of a Hugging Face data set that is not decoded: its bytes, or the file that has them."""

    path: str | None
    bytes: bytes | None


def _file_item(image: HubImage | None) -> Item:
    """The undecoded image: its bytes, or those of the file that it names."""
    if image is None:
        return Item(None, None, "the column has no image")
    path = image["path"]
    name = path if path and "/" in path else None  # without its folder a name may belong to many files
    if image["bytes"]:
        return Item(image["bytes"], name)
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return Item(file.read(), name)
    except Exception as error:  # each file system raises its own kinds of errors
        return Item(None, name, f"{type(error).__name__}: {error}")


class TensorFlowSource(StreamSource):
    """tfds/NAME: TensorFlow's data sets."""

    @staticmethod
    def reader_of(name: str, labelled: bool, arguments: dict[str, object]) -> StreamReader:
        from timm.data.readers.reader_tfds import ReaderTfds

        reader = ReaderTfds(name=name, **_with_target(labelled, arguments))
        reader._input_decoders = partial(_without_decoders, reader._input_decoders)
        return reader

    def _undecoded(self) -> Iterator[tuple[Item, object]]:
        for image, target in self._reader:
            yield Item(image), target


def _without_decoders(decoders: Callable[[], object]) -> object:
    """Replace TensorFlow's decoder of the images, which lies in nested dicts, by one that leaves them undecoded."""
    from tensorflow_datasets import decode

    def skipped(nest: object) -> object:
        if isinstance(nest, dict):
            return {name: skipped(decoder) for name, decoder in nest.items()}
        return decode.SkipDecoding()

    return skipped(decoders())


# The kinds of streams by the prefix of their names.
STREAMS: dict[str, type[StreamSource]] = {"wds": WebSource, "hfids": HubSource, "tfds": TensorFlowSource}
