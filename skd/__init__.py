"""Stratified Knowledge-Density super-networks: one pre-trained Vision Transformer, every size.

    timm model + images -> convert -> SuperNet -> train (or only plan) -> extract -> plain timm model -> save

After Li, Qi, Geng, "Stratified Knowledge-Density Super-Network for Scalable Vision Transformers", AAAI 2026
(arXiv 2511.11683).
"""

import skd._requirements  # noqa: F401  (first: it says what is missing)
from skd.architecture import create_model
from skd.convert import convert
from skd.cost import Cost, cost
from skd.dropout_list import DropoutList, Operation
from skd.evaluate import evaluate
from skd.extract import extract
from skd.files import load, save
from skd.importance import importance
from skd.planning import plan, rank_operations
from skd.supernet import SuperNet
from skd.training import History, TrainConfig, finetune, finetune_config, train

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "DropoutList",
    "History",
    "Operation",
    "SuperNet",
    "TrainConfig",
    "convert",
    "cost",
    "create_model",
    "evaluate",
    "extract",
    "finetune",
    "finetune_config",
    "importance",
    "load",
    "plan",
    "rank_operations",
    "save",
    "train",
]
