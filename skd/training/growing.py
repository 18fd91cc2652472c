"""How the dropout list of a run grows: one round of the planner before an epoch's steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from skd import planners
from skd.dropout_list import DropoutList
from skd.support.ranks import everyone
from skd.training.batches import Anew
from skd.training.run import Run


def grow(run: Run) -> None:
    """Run one round of planning at the current weights (not their average), and use the grown list on every rank."""
    supernet, config, options = run.supernet, run.config, run.config.planner_options or {}
    current = supernet.dropout_list
    if run.position.epoch == 0:  # the list may have been planned with another convention
        sizes = supernet.costs.macs(current.widths[[0, -1]], config.convention)
        current = replace(current, removed_macs=float(sizes[0] - sizes[1]))
    total = int(supernet.costs.macs(supernet.widths(), config.convention))
    target = config.target * (run.position.epoch + 1) / config.growing_epochs * total
    if run.online is not None and run.online.steps:  # the planner "paper", with scores from the training steps
        proposal = run.online.propose(config.convention, options.get("sensitivity", "count"))
        grown, sensitivity = current.extended(proposal.operations, target), proposal.sensitivity
    else:
        grown = planners.grow(
            config.chosen_planner,
            supernet,
            Anew(partial(run.stoppable, run.calibration, "Measuring importance")),
            target,
            current=current,
            convention=config.convention,
            group=run.group,
            options=options,
        )
        sensitivity = dict(grown.sensitivity or {})
    # Every rank uses the list of rank 0: the scores are the same, but the processors may sort or round differently.
    run.state.use(DropoutList.from_json(everyone(grown.to_json(), run.group)[0]))
    run.position.grown, run.position.sensitivity = True, sensitivity
