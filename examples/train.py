"""Training a super-network with skd's own loaders, which are those of the command line.

python examples/train.py [DATA [FOLDER]]

DATA is "digits" (the default) or what else --data takes (docs/USE.md). Weights, history and checkpoints go to FOLDER;
without it nothing is written.
"""

import sys
from dataclasses import replace

import timm
import torch

import skd

data = sys.argv[1] if len(sys.argv) > 1 else "digits"
folder = sys.argv[2] if len(sys.argv) > 2 else None
torch.manual_seed(0)

# With other data: timm.create_model("deit_small_patch16_224", pretrained=True), and skd.TrainConfig() as it is.
size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
model = timm.create_model("deit_small_patch16_224", **size)
config = skd.TrainConfig(
    epochs=4, batch_size=64, lr=2e-3, workers=0, calibration_images=256,
    drop_path=0, mixup=0, cutmix=0, model_ema=False,  # of the network
    aa=None, reprob=0, hflip=0, scale=(0.9, 1.0), aug_repeats=1,  # of the images
)  # fmt: skip
train, validation, calibration = skd.data.loaders(data, model, config)

# Four epochs stand in for pre-training.
skd.finetune(model, train, validation, replace(config, progressive_epochs=0, budgets=(1.0,)))

supernet = skd.convert(model, calibration)
history = skd.train(supernet, train, validation, config, calibration=calibration, out=folder)
print(f"{len(history.epochs)} epochs; {len(supernet.dropout_list)} sub-networks")

half = skd.extract(supernet, macs=0.5)
print(f"half of the MACs: {skd.evaluate(half, validation):.1f} % top-1, {skd.cost(half)}")
