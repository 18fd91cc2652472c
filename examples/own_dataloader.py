"""Training a super-network with a DataLoader of your own: any iterable of (images, labels) is good.

python examples/own_dataloader.py
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

import skd

torch.manual_seed(0)
found = load_digits()
images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
dataset = TensorDataset(images, torch.from_numpy(found.target))
train_set, test_set = random_split(dataset, [1347, 450], torch.Generator().manual_seed(0))
train = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
test = DataLoader(test_set, batch_size=256)
# Un-augmented training images in a fixed order; importance is measured on them.
calibration = DataLoader(Subset(train_set, range(256)), batch_size=256)

size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
model = timm.create_model("deit_small_patch16_224", **size)
settings = {"batch_size": 64, "lr": 2e-3, "drop_path": 0, "mixup": 0, "cutmix": 0, "model_ema": False}
skd.finetune(model, train, test, skd.finetune_config(**settings | {"epochs": 6}))  # in place of pre-training

supernet = skd.convert(model, calibration)
skd.train(supernet, train, test, skd.TrainConfig(epochs=4, **settings), calibration=calibration)

# Any sub-network of the list runs in place, without being cut out.
entries = range(0, len(supernet.dropout_list), 20)
for entry, top1 in zip(entries, skd.evaluate(supernet, test, entries=entries), strict=True):
    print(f"entry {entry}: {skd.cost(supernet, entry=entry).macs:,} MACs, {top1:.1f} % top-1")
