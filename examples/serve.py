"""One super-network serves every size: each request runs the largest one that is within its latency target.

python examples/serve.py      asks a small family from eight threads and compares every answer with a cut network
FAMILY=supernet.safetensors uvicorn --app-dir examples --factory serve:create_app      serves a file of your own

The second needs fastapi and uvicorn, and answers `curl --data-binary @cat.jpg 'localhost:8000/predict?target_ms=20'`.
"""

import io
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
from PIL import Image

import skd
from skd.data import batched, digits


class Server:
    """Answers with the largest size whose latency for one image, measured at the start, is within the target."""

    def __init__(self, family: skd.Family, sizes: int = 8) -> None:
        last = len(family.sizes) - 1
        entries = sorted({round(last * step / (sizes - 1)) for step in range(sizes)})
        data = timm.data.resolve_model_data_config(family.model)
        self.transform = timm.data.create_transform(**data)
        self.mode = "L" if data["input_size"][0] == 1 else "RGB"  # Pillow's names
        self.labels = family.model.pretrained_cfg.get("label_names")
        image = torch.zeros(1, *data["input_size"])
        self.sizes = [(milliseconds(family.sizes[entry], image), family.sizes[entry]) for entry in entries]

    def choose(self, target_ms: float) -> skd.family.Size:
        """The largest size within the target, or the smallest of all."""
        return next((size for ms, size in self.sizes if ms <= target_ms), self.sizes[-1][1])

    def answer(self, image: torch.Tensor, target_ms: float) -> dict[str, object]:
        """The class of an image (channels, height, width), its probability, and the size that found it."""
        size = self.choose(target_ms)
        probabilities = size(image[None])[0].softmax(0)
        best = int(probabilities.argmax())
        found = {"class": best, "probability": float(probabilities[best]), "entry": size.entry, "macs": size.macs}
        return found | ({"label": self.labels[best]} if self.labels else {})


def milliseconds(size: skd.family.Size, image: torch.Tensor, repeats: int = 7) -> float:
    """The median time of one call; the first is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        size(image)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def create_app(family: skd.Family | None = None):
    """The application. FastAPI runs the function of a path in a pool of threads, so requests overlap."""
    from fastapi import Body, FastAPI

    server, app = Server(family or skd.Family(os.environ["FAMILY"])), FastAPI()

    @app.post("/predict")
    def predict(target_ms: float, body: bytes = Body(media_type="application/octet-stream")) -> dict:
        image = Image.open(io.BytesIO(body))
        return server.answer(server.transform(image.convert(server.mode)), target_ms)

    @app.get("/sizes")
    def sizes() -> list[dict]:
        return [{"entry": size.entry, "macs": size.macs, "milliseconds": ms} for ms, size in server.sizes]

    return app


def small_family(folder: Path) -> tuple[skd.SuperNet, skd.Family]:
    """A network of the digits with random weights, planned: its super-network, and the file opened as a family."""
    torch.manual_seed(0)
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4}
    train = batched(digits()[0], 64)[:2]
    supernet = skd.convert(timm.create_model("deit_small_patch16_224", num_classes=10, **size), train)
    supernet.dropout_list = skd.plan(supernet, train, rounds=2)
    skd.compensate(supernet, train, macs=[0.5, 0.25])
    skd.save(supernet, folder / "digits.safetensors")
    return supernet, skd.Family(folder / "digits.safetensors")


def main(folder: Path, requests: int = 400) -> None:
    supernet, family = small_family(folder)
    server = Server(family)
    for ms, size in server.sizes:
        print(f"entry {size.entry}: {size.macs:,} MACs, {ms:.2f} ms")
    memory = family.memory()
    print(f"{len(family.sizes)} sizes in {memory['total']:,} bytes; a copy of each would take {memory['copies']:,}")

    images = batched(digits()[1], 8)[0][0]
    cut = {size.entry: skd.extract(supernet, entry=size.entry) for _, size in server.sizes}
    with torch.no_grad():
        expected = {entry: network(images).argmax(1).tolist() for entry, network in cut.items()}
    targets = [2 * server.sizes[0][0] * step / requests for step in range(requests)]  # from far below to far above

    def is_right(number: int) -> bool:
        found = server.answer(images[number % 8], targets[number * 7 % requests])
        return expected[found["entry"]][number % 8] == found["class"]

    with ThreadPoolExecutor(8) as threads:
        right = list(threads.map(is_right, range(requests)))
    print(f"{requests} requests from 8 threads, {right.count(False)} wrong answers")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
