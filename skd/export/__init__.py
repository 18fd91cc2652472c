"""Networks in formats that others load: `skd.export`, one file for each format.

folders       timm's folder; with a model.py of its own where timm cannot build the network
onnx_file     ONNX
pt2           a program of torch.export, and a compiled package of AOTInductor
manifest      what is in a folder of several networks
card          a page about a network, for a hub
hub           uploading
description   what a file says of classes and images
comparison    what was written against the network
writing       where it goes: all of it or nothing
"""

from skd.export.manifest import Member, read_manifest
from skd.export.writing import FORMATS, export

__all__ = ["FORMATS", "Member", "export", "read_manifest"]
