"""The numbers of a run in TensorBoard, through its own library: the package extra ``tensorboard``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from skd.training.history import Epoch, History

FOLDER = "tensorboard"  # in the run's folder


def check_log(log: str | None, out: object) -> None:
    """Check, before any work, that a run with these settings can be tracked.

    Raises:
        ValueError: `log` is given, but no folder `out` to write to.
        ImportError: `log` is "tensorboard", which is not installed; the message names the extra.
    """
    if log is None:
        return
    if out is None:
        raise ValueError(f"log is {log!r}, but there is no `out` to write to")
    if find_spec("tensorboard") is None:
        raise ImportError(f"log is {log!r}, and tensorboard is not installed: pip install 'skd[tensorboard]'")


class Tracker:
    """Writes what is known of each epoch to event files of TensorBoard.

    A step of TensorBoard is an epoch, counted from 1, and 0 is the network before training. A resumed run goes on in
    the same folder: of epochs that it repeats TensorBoard leaves out what an earlier process wrote. If there is
    nothing in the folder yet, all epochs so far are written first.

    Args:
        folder: of the event files; it is made if it is not there.
        history: of the run so far.
    """

    def __init__(self, folder: Path, history: History) -> None:
        from torch.utils.tensorboard import SummaryWriter

        written = len(history.epochs) if any(folder.glob("events.out.tfevents.*")) else 0
        self.writer = SummaryWriter(folder, purge_step=written + 1 if written else 0)
        self.writer.add_custom_scalars_multilinechart(["top1/.*"], "sub-networks", "top-1 by budget")
        if not written and history.original_top1 is not None:
            self.writer.add_scalar("top1/original", history.original_top1, 0)
        for row in history.epochs[written:]:
            self.add(row)

    def add(self, row: Epoch) -> None:
        """Write one epoch, at once, so that nothing is lost if the process dies after it."""
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row.epoch + 1)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def scalars(row: Epoch) -> dict[str, float]:
    """The numbers of an epoch by their names in TensorBoard.

    A budget's top-1, in percent, is called ``top1/0.5000`` after its share of the MACs; the full network's is
    ``top1/1.0000``. It and the area under that curve are there in epochs that were evaluated.
    """
    found = {
        "loss": row.loss,
        "lr": row.lr,
        "list/entries": float(row.entries),
        "list/smallest": row.macs_fraction,
    }
    for point in row.curve or []:
        found[f"top1/{point['budget']:.4f}"] = point["top1"]
    return found if row.area is None else found | {"area": row.area}
