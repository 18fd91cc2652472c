"""A timm model becomes a super-network, its function unchanged; sub-networks are cut out of it and saved.

python examples/convert_and_extract.py [FOLDER]      FOLDER, the present one by default, is where the files go
"""

import sys
from pathlib import Path

import timm
import torch

import skd
from skd.data import batched, digits

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
torch.manual_seed(0)
train, test = (batched(split, 64) for split in digits())

# Eight epochs stand in for pre-training; else: timm.create_model("deit_small_patch16_224", pretrained=True).
size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
model = timm.create_model("deit_small_patch16_224", **size)
quick = {"epochs": 8, "batch_size": 64, "lr": 2e-3, "drop_path": 0, "mixup": 0, "cutmix": 0, "model_ema": False}
skd.finetune(model, train, test, skd.finetune_config(**quick, eval_every=8))

supernet = skd.convert(model, train)
images = test[0][0]
with torch.no_grad():
    error = (supernet(images) - model.eval()(images)).abs().max()
print(f"largest difference between the logits of the model and of the super-network: {error:.1e}")

supernet.dropout_list = skd.plan(supernet, train[:4], compensated=False)  # they are cut as they are: no correction
print(f"{len(supernet.dropout_list)} sub-networks, planned without training")

for share in (1.0, 0.75, 0.5, 0.25):
    small = skd.extract(supernet, macs=share)
    path = folder / f"digits-{100 * share:.0f}.safetensors"
    skd.save(small, path)
    again = skd.load(path)  # timm alone can do it too: docs/FILES.md
    cost = skd.cost(again)
    print(f"{path.name}: {cost.macs:,} MACs, {cost.params:,} parameters, {skd.evaluate(again, test):.1f} % top-1")
