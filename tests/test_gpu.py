"""What needs a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_batches, tiny_vit

import skd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]


@pytest.fixture
def on_gpu() -> Any:
    """A converted and planned super-network, and images, on the GPU in float64."""
    batches = random_batches()
    supernet = skd.convert(tiny_vit().cuda(), batches)
    supernet.dropout_list = skd.plan(supernet, batches, rounds=2)
    return supernet, batches[0][0].cuda()


def test_the_gpu_computes_what_the_cpu_does(on_gpu: Any) -> None:
    supernet, images = on_gpu
    batches = random_batches()
    on_cpu = skd.convert(tiny_vit(), batches)
    for found, expected in zip(supernet.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-9)
    on_cpu.dropout_list = supernet.dropout_list
    last = len(supernet.dropout_list) - 1
    torch.testing.assert_close(supernet(images, entry=last).cpu(), on_cpu(images.cpu(), entry=last))


def test_a_device_entry_never_stops_the_host(on_gpu: Any) -> None:
    supernet, images = on_gpu
    entries = [torch.tensor(i, device="cuda") for i in range(len(supernet.dropout_list))]
    expected = [supernet(images, entry=i) for i in range(len(entries))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [supernet(images, entry=entry) for entry in entries]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_one_cuda_graph_replays_every_entry(on_gpu: Any) -> None:
    supernet, images = on_gpu
    entry = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        supernet(images, entry=entry)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = supernet(images, entry=entry)
    for index in range(len(supernet.dropout_list)):
        entry.fill_(index)
        graph.replay()
        torch.testing.assert_close(out, supernet(images, entry=index), rtol=1e-9, atol=1e-11)


def test_extract_and_files_keep_the_device(on_gpu: Any, tmp_path: Path) -> None:
    supernet, images = on_gpu
    sub = skd.extract(supernet, macs=0.5)
    assert next(sub.parameters()).is_cuda
    skd.save(sub, tmp_path / "sub.safetensors")
    torch.testing.assert_close(skd.load(tmp_path / "sub.safetensors", "cuda")(images), sub(images))
