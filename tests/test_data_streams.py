"""Streams: an epoch is a function of its number, the workers and the ranks, and of nothing that came before."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_data_loaders import STILL, STRONG, config, flat, numbers, same
from test_data_sources import divided

from skd.data import calibration_loader, eval_loader, open_source, train_loader

SHARDS, IN_SHARD = 4, 12


def write_shards(folder: Path) -> Path:
    """Images as of `png_folder`, labels 0, 1, 2, 0, ...; "train" and "validation" are the same."""
    names = [f"part-{shard}.tar" for shard in range(SHARDS)]
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for number in range(shard * IN_SHARD, (shard + 1) * IN_SHARD):
                picture = io.BytesIO()
                Image.new("L", (16, 16), 4 * number).save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("cls", str(number % 3).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    split = {"num_samples": SHARDS * IN_SHARD, "filenames": names, "shard_lengths": [IN_SHARD] * SHARDS}
    splits = {name: {"name": name, **split} for name in ("train", "validation")}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> str:
    pytest.importorskip("webdataset")
    return f"wds/{write_shards(tmp_path)}"


@pytest.fixture
def source(shards: str) -> Any:
    return open_source(shards, "train", in_chans=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_a_function_of_its_number(source: Any, workers: int) -> None:
    assert source.iterable and len(source) == 48
    loader = train_loader(source, config(), batch_size=8, seed=1, workers=workers, **STRONG)
    epochs = [list(loader)]
    for epoch in (1, 0, 1):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    assert same(epochs[0], epochs[2]) and same(epochs[1], epochs[3]) and not same(epochs[0], epochs[1])
    loader.set_epoch(1, 2)
    assert same(loader, epochs[1][2:]) and len(loader) == len(epochs[0]) == 6
    plain = numbers(train_loader(source, config(), batch_size=8, seed=1, workers=workers, **STILL))
    assert sorted(flat(plain)) == list(range(48)) != flat(plain)


def test_one_shard_is_shuffled_too(shards: str) -> None:
    """In every epoch anew, though there is no order of shards to change."""
    source = open_source(shards, "part-1.tar", in_chans=1, training=True, num_samples=12)
    loader = train_loader(source, config(), batch_size=12, seed=1, **STILL)
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append(flat(numbers(loader)))
        assert sorted(orders[-1]) == list(range(12, 24))
    assert orders[0] == orders[2] != orders[1]


def test_workers_fill_their_last_batch(source: Any) -> None:
    """Half of 48 images is one batch and a half, so two workers would be a batch short of the three there are."""
    loader = train_loader(source, config(), batch_size=16, seed=1, workers=2, **STILL)
    assert [len(batch) for batch in numbers(loader)] == [16, 16, 16]


def test_ranks_share_the_shards(source: Any) -> None:
    parts = [train_loader(source, config(), batch_size=8, seed=1, rank=rank, world=2, **STILL) for rank in (0, 1)]
    read = [numbers(part) for part in parts]
    assert [[len(batch) for batch in part] for part in read] == [[4] * 6] * 2
    assert sorted(flat(read[0] + read[1])) == list(range(48))


def test_a_worker_without_a_shard(source: Any) -> None:
    """An error, not an epoch that is shorter than its length says: other ranks would wait forever."""
    loader = train_loader(source, config(), batch_size=24, seed=1, rank=4, world=6)
    with pytest.raises(OSError, match="ended after 0 of 2 batches; it needs a shard for each"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_and_calibration(shards: str, source: Any, workers: int) -> None:
    fixed = eval_loader(open_source(shards, "validation", in_chans=1), config(), batch_size=7, workers=workers)
    read = numbers(fixed)
    assert sorted(flat(read)) == list(range(48)) and numbers(fixed) == read
    if not workers:
        assert flat(read) == list(range(48)) and len(fixed) == 7
    some = calibration_loader(source, config(), images=20, batch_size=8, workers=workers)
    chosen = numbers(some)
    assert [len(batch) for batch in chosen] == [8, 8, 4] and numbers(some) == chosen
    assert len(set(flat(chosen))) == 20 and sorted(flat(chosen)) != list(range(20))


@pytest.mark.parametrize("split, world, workers", [("validation", 3, 0), ("validation", 2, 3), ("part-1.tar", 2, 2)])
def test_ranks_evaluate_every_image_once(shards: str, split: str, world: int, workers: int) -> None:
    """Also where the ranks and workers do not divide the shards."""
    source = open_source(shards, split, in_chans=1, num_samples=12 if split.endswith(".tar") else None)
    loaders = [
        eval_loader(source, config(), batch_size=8, workers=workers, rank=rank, world=world) for rank in range(world)
    ]
    parts = [flat(numbers(loader)) for loader in loaders]
    assert sorted(flat(parts)) == (list(range(12, 24)) if split.endswith(".tar") else list(range(48)))
    assert max(map(len, parts)) - min(map(len, parts)) <= max(1, workers)


def test_labels_and_what_a_stream_cannot(shards: str, source: Any) -> None:
    fixed = open_source(shards, "validation", in_chans=1)
    with pytest.raises(ValueError, match=r"has the label 2; the head has the classes 0\.\.1"):
        list(eval_loader(fixed, config(classes=2), batch_size=8))
    with pytest.raises(ValueError, match="cannot repeat images"):
        train_loader(source, config(), batch_size=8, seed=1, aug_repeats=3)
    with pytest.raises(ValueError, match="its images have no numbers"):
        eval_loader(fixed, config(), batch_size=8, indices=[0])
    with pytest.raises(ValueError, match="opened for evaluation"):
        train_loader(fixed, config(), batch_size=8, seed=1)
    with pytest.raises(ValueError, match="opened for training"):
        eval_loader(source, config(), batch_size=8)


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    name, cache = f"hfids/{divided(tmp_path / 'x', 'train', 'val')}", tmp_path / "cache"
    source = open_source(name, "validation", in_chans=1, data_dir=cache, num_samples=6)
    assert numbers(eval_loader(source, config(), batch_size=4)) == [[0, 1, 2, 3], [4, 5]]
    training = open_source(name, "train", in_chans=1, data_dir=cache, num_samples=3)
    loader = train_loader(training, config(), batch_size=3, seed=1, **STILL)
    assert sorted(flat(numbers(loader))) == [0, 1, 2] and numbers(loader) == numbers(loader)
    wrong = open_source(name, "train", in_chans=1, data_dir=cache, num_samples=3, target_key="fine")
    with pytest.raises(ValueError, match="has no such column"):
        list(train_loader(wrong, config(), batch_size=3, seed=1))
