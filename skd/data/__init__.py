"""Data: where images come from, how they are prepared, and batches that are the same for any number of workers.

train, validation, calibration = loaders("folder", model, TrainConfig(batch_size=256))

or, one by one:

source = open_source("folder", "train", in_chans=3)
check_classes(source, model.num_classes)
match_classes(source, label_names(model))
loader = train_loader(source, data_config(model), batch_size=256, seed=0, workers=8)
loader.set_epoch(3)
for images, labels in loader: ...

The files, in the order that a data set passes them:

    opening     `open_source`: a data set by what a user calls it
    source      what every source has: labels, classes, what cannot be read; and classes matched by name
    folders     folders of images: splits, files, classes
    indexed     sources whose images have numbers: folders, arrays, idx files, timm's and torchvision's data sets
    streams     sources that are streams: web data sets, Hugging Face's, TensorFlow's
    digits      scikit-learn's digits, the data set that is built in
    building    the loaders: one by one, or those of a training run
    loading     `Loading`: how batches are made, and which images are in which
    pixels      one picture: 8 bits, timm's transforms, and from 8 bits to a model's input
    operations  what timm's training transform would do after the crop: drawn, not done
    augmenting  the device's stage, which does it to a batch
    workers     what runs in the workers: read, transform, stack
    iteration   what runs in the main process: the loaders themselves
    counted     randomness that is a function of a seed and counters

An indexed image on its way from the disk to the batch: `indexed` opens the file, `pixels` makes 8 bits and transforms
or crops them, `workers` stacks them, `iteration` hands them out, after `augmenting` and normalisation by `pixels`.
"""

from skd.data.building import Loaders, Sources, calibration_loader, eval_loader, loaders, train_loader
from skd.data.counted import generator, seeded
from skd.data.digits import MEAN, PREPROCESSING, STD, Batches, Split, batched, digits, shifted
from skd.data.indexed import IndexedSource
from skd.data.iteration import Loader
from skd.data.loading import Loading
from skd.data.opening import open_source
from skd.data.pixels import data_config, eval_transform, train_transform
from skd.data.source import Source, check_classes, label_names, match_classes
from skd.data.streams import StreamSource
from skd.support.settings import Augmentation

__all__ = [
    "MEAN",
    "PREPROCESSING",
    "STD",
    "Augmentation",
    "Batches",
    "IndexedSource",
    "Loader",
    "Loaders",
    "Loading",
    "Source",
    "Sources",
    "Split",
    "StreamSource",
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
