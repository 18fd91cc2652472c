"""Data: where images come from, how they are prepared, and batches that are the same for any number of workers.

train, validation, calibration = loaders("folder", model, TrainConfig(batch_size=256))

or, one by one:

source = open_source("folder", "train", in_chans=3)
check_classes(source, model.num_classes)
match_classes(source, label_names(model))
loader = train_loader(source, data_config(model), batch_size=256, seed=0, workers=8)
loader.set_epoch(3)
for images, labels in loader: ...
"""

from skd.data.classes import check_classes, label_names, match_classes
from skd.data.counted import generator, seeded
from skd.data.digits import MEAN, PREPROCESSING, STD, Batches, Split, batched, digits, shifted
from skd.data.from_config import Loaders, Sources, loaders
from skd.data.iteration import Loader
from skd.data.loading import calibration_loader, eval_loader, train_loader
from skd.data.readers import Source
from skd.data.sources import open_source
from skd.data.transforms import data_config, eval_transform, train_transform
from skd.settings import Augmentation

__all__ = [
    "MEAN",
    "PREPROCESSING",
    "STD",
    "Augmentation",
    "Batches",
    "Loader",
    "Loaders",
    "Source",
    "Sources",
    "Split",
    "batched",
    "calibration_loader",
    "check_classes",
    "data_config",
    "digits",
    "eval_loader",
    "eval_transform",
    "generator",
    "label_names",
    "loaders",
    "match_classes",
    "open_source",
    "seeded",
    "shifted",
    "train_loader",
    "train_transform",
]
