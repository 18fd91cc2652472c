"""README's code runs: the tour of the API, and the rebuilding of a saved model without skd."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import perturb, random_batches, tiny_vit

import skd

# Models whose attention is cut by heads, or not at all: projections together with and without a bias, and apart.
HEADS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_small_patch16_dinov3": {},
    "eva02_base_patch14_224": {"scale_mlp": False, "patch_size": 16},
    "vit_base_patch16_rope_224": {"num_reg_tokens": 1},
    "beit_base_patch16_224": {},
}
README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks_of_code() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def rebuild_snippet() -> str:
    return re.search(r"<!-- snippet: rebuild -->\n```python\n(.*?)```", README, flags=re.DOTALL).group(1)


def named_model() -> Any:
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("deit3_small_patch16_224", **args).eval()


def of_heads(name: str) -> Any:
    """An Eva or a Beit of the size of the others."""
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **size, **HEADS[name], init_values=0.5).eval()
    perturb(model)
    return model


MODELS = {
    "constructor": lambda: tiny_vit(torch.float32),
    "timm name": named_model,
    **{name: partial(of_heads, name) for name in HEADS},
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_rebuild_snippet_needs_no_skd(build: Any, tmp_path: Path) -> None:
    batches = random_batches(dtype=torch.float32)
    supernet = skd.convert(build(), batches)
    full = supernet.widths()
    some = min(8, full[2] // 2 if full[2] > 1 and not supernet.infos[2].binary else full[2])
    cuts = [full, [full[0], 24, some, 24], [0, 24, some, 0]]
    supernet.dropout_list = skd.DropoutList(supernet.modules_in_order, cuts)
    for entry in range(3):
        skd.save(skd.extract(supernet, entry=entry), tmp_path / "small.safetensors")
        images = batches[0][0]
        with torch.no_grad():
            torch.save((images, supernet(images, entry=entry)), tmp_path / "expected.pt")
        check = (
            rebuild_snippet()
            + "\nimport sys\nassert not any(name.split('.')[0] in ('skd', 'skd_kernels') for name in sys.modules)\n"
            + "images, expected = torch.load('expected.pt')\nmodel.eval()\n"
            + "torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)\n"
            + "assert all(parameter.numel() for parameter in model.parameters())\n"
            + "torch.save(model, 'rebuilt.pt')\n"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", check], cwd=tmp_path, check=True)
        rebuilt = torch.load(tmp_path / "rebuilt.pt", weights_only=False)
        assert skd.cost(rebuilt) == skd.cost(supernet, entry=entry)
        assert type(rebuilt.blocks[0].attn).__module__.startswith("timm.") or supernet.widths(entry)[0] == 0
        program = torch.export.export(rebuilt, (images,)).module()
        torch.testing.assert_close(program(images), rebuilt(images), rtol=1e-5, atol=1e-5)


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's first code block, on a tiny model in place of the downloaded one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: tiny_vit(torch.float32))
    code = blocks_of_code()[0].replace("params=6_000_000", "params=20_000")
    code = code.replace("epochs=300, batch_size=1024", "epochs=2, batch_size=4, lr=1e-3")
    batches = random_batches(dtype=torch.float32)
    names: dict[str, Any] = dict.fromkeys(("calibration", "train_loader", "val_loader"), batches)
    names["images"] = batches[0][0]
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "small.safetensors").is_file() and (tmp_path / "supernet.safetensors").is_file()
    assert names["logits"].shape == (4, 5)
    assert sum(p.numel() for p in names["tiny"].parameters()) <= 20_000
    assert len(names["history"].epochs) == 2 and (tmp_path / "run" / "supernet.safetensors").is_file()


def test_costs_quoted_in_the_readme() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    assert f"{skd.cost(model).macs:,} MACs in `full`" in README.replace("\n", " ")
    assert f"and {skd.cost(model, convention='linear').macs:,} in `linear`" in README
