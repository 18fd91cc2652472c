"""What an exported file says of its classes and of the images that it takes."""

from __future__ import annotations

import json

from skd import __version__
from skd.files import header_of
from skd.vit import TimmModel


def description(model: TimmModel) -> dict[str, str]:
    """Texts by name: the version of skd, and as JSON the preprocessing and the names of the classes (null: none)."""
    header = header_of(model)
    return {
        "skd": __version__,
        "preprocessing": json.dumps(header["data"]),
        "num_classes": json.dumps(model.num_classes),
        "label_names": json.dumps(header["label_names"]),
    }
