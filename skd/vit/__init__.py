"""The only code that names the classes and fields of timm's transformers.

All of skd speaks to the protocols `Module` and `Network`:

    protocol      what the method asks of a module and of a network
    families/     one file per family of transformers; `describe` finds a model's
    network       what the families have in common around their blocks
    attention     plain attention: rotated, every head keeps its leading coordinates
    heads         attention by whole heads, in PyTorch
    mlp           MLPs: sorted, the first neurons are kept
    conversions   bases and orders beyond METHOD's, from unweighted second moments
    skipped       what stands in place of a module that is skipped
    residual      the residual stream between modules: sums and norms in one pass
    block         `SuperBlock`, and how a plain block is cut out of it
    refit         what enters a module's output layer, for a fit of it
    layers        operations on linear layers that the modules share
    patches       the patch embedding as one product
    images        the images that a model takes
    outside       MACs of what is not in a block
    models        models by name, and out of their wrappers
    weights       a user's own weights into a model, and new heads
    construction  how a model is built again
    registered    which cut networks timm alone can build
    standalone    a cut network built again without skd: `skd.export` copies this file
"""

from skd.vit.block import SuperBlock
from skd.vit.families import describe
from skd.vit.images import check_images, image_size, probe
from skd.vit.models import MODEL_SOURCES, create_model, unwrapped
from skd.vit.protocol import Module, Network, OutputLayer, Rotation, TimmLayer, TimmModel, Transform, Width

__all__ = [
    "MODEL_SOURCES",
    "Module",
    "Network",
    "OutputLayer",
    "Rotation",
    "SuperBlock",
    "TimmLayer",
    "TimmModel",
    "Transform",
    "Width",
    "check_images",
    "create_model",
    "describe",
    "image_size",
    "probe",
    "unwrapped",
]
