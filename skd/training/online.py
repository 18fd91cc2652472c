"""Importance followed during training: Taylor scores from the steps' own backward passes, no images read for it."""

from __future__ import annotations

import numpy as np
import torch

from skd.importance import read_scores, score_buffers
from skd.planning import Proposal, ranked
from skd.supernet import SuperNet
from skd.support.ranks import gathered, rank_of, size_of, summed
from skd.training.types import Group


class OnlineImportance:
    """Sums of |x g| (METHOD 2, step 2) over the steps since the dropout list last grew.

    Such sums have to be divided by the probability that a step includes the coordinate. Here it is 1, because only
    the coordinates of the last entry are read, and in a nested list every entry includes them, however entries are
    drawn. Sensitivity is not
    measured by skipping modules; the module's share of all scores, summed over its heads, takes its place.

    Attributes:
        steps: how many the sums are of.
    """

    def __init__(self, supernet: SuperNet, group: Group = None) -> None:
        binary = [info.name for info in supernet.infos if info.binary and info.full_width]
        if binary:
            raise ValueError(
                f"importance is 'online', but {binary[0]} takes only the widths 0 and full and has no scores: "
                "use importance='passes'"
            )
        self.supernet, self.group = supernet, group
        self.buffers = score_buffers(supernet)
        self.steps = 0

    def follow(self, wanted: bool) -> None:
        """From now on backward passes of the super-network add to the sums, or no longer do."""
        self.supernet.scores = self.buffers if wanted else None

    def propose(self, convention: str, sensitivity: str = "count") -> Proposal:
        """Operations at the widths of the list's last entry, as `skd.planning.propose` has them; sums restart."""
        listed = self.supernet.dropout_list
        widths = listed.entry(len(listed) - 1)
        sums = iter(summed([buffer for buffer in self.buffers if buffer is not None], self.group))
        scores: dict[str, np.ndarray] = {}
        shares: dict[str, float] = {}
        for info, buffer in zip(self.supernet.infos, self.buffers, strict=True):
            # This makes a copy in float64: without a group `raw` may be the buffer itself, which `restart` clears.
            raw = read_scores(info, None if buffer is None else next(sums), widths[info.name])
            scores[info.name] = raw.astype(np.float64)
            shares[info.name] = float(scores[info.name].sum()) * info.coordinates_per_unit
        largest = max(max(shares.values()), 1e-300)
        self.restart()
        gamma = {name: share / largest for name, share in shares.items()}
        return ranked(self.supernet, scores, gamma, widths, convention, sensitivity)

    def restart(self) -> None:
        self.steps = 0
        for buffer in self.buffers:
            if buffer is not None:
                buffer.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """(ranks, ...) sums of each module, by name, on every rank."""
        named = zip(self.supernet.infos, self.buffers, strict=True)
        return {info.name: gathered(buffer[None], self.group) for info, buffer in named if buffer is not None}

    def load_state(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Restore the sums.

        If the number of ranks is the same, each rank takes its own part; otherwise rank 0 takes the total and the
        other ranks start from zero, because only the sum over ranks is ever used.
        """
        self.restart()
        self.steps = steps
        rank, ranks = rank_of(self.group), size_of(self.group)
        for info, buffer in zip(self.supernet.infos, self.buffers, strict=True):
            if buffer is not None:
                parts = state[info.name].to(buffer)
                if len(parts) == ranks:
                    buffer.copy_(parts[rank])
                elif rank == 0:
                    buffer.copy_(parts.sum(0))
