"""Cut the subset that the tests use out of the full golden folder: ``python make.py SOURCE [DESTINATION]``.

SOURCE holds wpac.npz, piad.npz, piad.json and planner_units.json. Arrays are copied bit for bit, with two exceptions.
The transformed neurons are left out, because they are a permutation of the original ones (asserted here). Of the
float32 weights that SGD reached only the lowest bit is kept, and a sample in full: the tests replay the training in
float64, and the bit says which of the two float32 neighbours of a result was stored.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

# Gradient arrays kept in full; all the others are checked by their norms.
GRADIENTS = ("cls_token", "pos_embed", "head.", "norm.", "blocks.1.", "blocks.2.mlp.")
SAMPLE = 32  # one of so many SGD weights is kept in full
EPOCH_KEYS = (
    "epoch",
    "acc_table",
    "sensitivity",
    "end_points_before",
    "reduced_before",
    "target_reduction_cumulative",
    "n_op_codes",
    "operations",
    "mask_tables_after",
    "reduced_after_by_table",
    "train_op_codes",
    "train_losses",
)
SCENARIO_KEYS = ("config", "dim_MACs", "group_size", "grad_checks", "adamw3", "op_code_checks")


def cut_wpac(wpac: dict, piad: dict) -> dict:
    """Without the images (PIAD has them), the features and what a permutation of neurons gives."""
    assert np.array_equal(wpac["images_u8"], piad["images_u8"][:96])
    assert np.array_equal(wpac["labels"], piad["labels"][:96])
    for block in range(3):
        order, prefix = wpac[f"A/block{block}/mlp_perm"], f"blocks.{block}.mlp."
        for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
            old = wpac[f"A/w/{prefix}{name}"]
            moved = old[:, order] if name == "fc2.weight" else old[order]
            assert np.array_equal(moved, wpac[f"A/t/{prefix}{name}"])
    dropped = ("images_u8", "labels", "batch0_qkv_", "A/t/blocks.0.mlp", "A/t/blocks.1.mlp", "A/t/blocks.2.mlp")
    return {key: value for key, value in wpac.items() if not any(part in key for part in dropped)}


def cut_piad(piad: dict, order: list[str]) -> dict:
    """Without optimiser arrays and most gradients; of the SGD weights only what fixes and checks a replay."""
    kept = {}
    for key, value in piad.items():
        if "/adamw3/" in key or "/weights_start_epoch" in key:
            continue
        if "/grad_op49/" in key and not key.split("/", 2)[2].startswith(GRADIENTS):
            continue
        kept[key] = value
    for epoch in range(1, 5):
        weights = np.concatenate([piad[f"A_sgd/weights_start_epoch{epoch}/{key}"].ravel() for key in order])
        kept[f"A_sgd/epoch{epoch}/weights_low_bits"] = np.packbits((weights.view(np.uint32) & 1).astype(np.uint8))
        kept[f"A_sgd/epoch{epoch}/weights_sample"] = weights[::SAMPLE]
    return kept


def cut_documents(document: dict) -> dict:
    """The two scenarios with the keys that tests read."""
    result = {}
    for name, scenario in document.items():
        result[name] = {key: scenario[key] for key in SCENARIO_KEYS if key in scenario}
        result[name]["epochs"] = [{k: epoch[k] for k in EPOCH_KEYS if k in epoch} for epoch in scenario["epochs"]]
    return result


def write_json(path: Path, document: dict) -> None:
    text = json.dumps(document, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path, nargs="?", default=Path(__file__).parent)
    arguments = parser.parse_args()
    source, destination = arguments.source, arguments.destination
    wpac, piad = dict(np.load(source / "wpac.npz")), dict(np.load(source / "piad.npz"))
    order = sorted(key.removeprefix("A/w/") for key in wpac if key.startswith("A/w/"))
    np.savez_compressed(destination / "wpac.npz", **cut_wpac(wpac, piad))
    np.savez_compressed(destination / "piad.npz", **cut_piad(piad, order))
    write_json(destination / "piad.json.gz", cut_documents(json.loads((source / "piad.json").read_text())))
    write_json(destination / "planner_units.json.gz", json.loads((source / "planner_units.json").read_text()))


if __name__ == "__main__":
    main()
