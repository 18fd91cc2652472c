"""One training run: what it was given, what takes its steps, where it stands, and the files that it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from skd.extract import extract
from skd.files import check_saveable, save
from skd.supernet import SuperNet
from skd.support.checks import length_of
from skd.support.outputs import replacing
from skd.support.ranks import StopAll, largest, together
from skd.support.settings import TrainConfig
from skd.training import checkpoints
from skd.training.batches import repeatable
from skd.training.checkpoints import Origin
from skd.training.history import Epoch, History, StepLog
from skd.training.online import OnlineImportance
from skd.training.optimizer import Scheduler, make_scheduler
from skd.training.origin import origin
from skd.training.screen import Screen
from skd.training.state import StepState, make_state
from skd.training.step import Stepper
from skd.training.stopping import Diverged, StopSignal
from skd.training.tracking import FOLDER, Tracker
from skd.training.types import Batches, Group
from skd.vit import TimmModel


@dataclass
class Position:
    """The epoch that a run is in, and how far it has come in it.

    Attributes:
        epoch: its number, from 0.
        log: of its steps.
        steps: how many of its steps are done.
        grown: whether the dropout list has already grown in this epoch; a resumed epoch must not grow it twice.
        refitted: whether the output layers have been fitted in this epoch (`skd.training.starting`).
        sensitivity: each module's sensitivity, as measured when the list grew.
    """

    epoch: int
    log: StepLog
    steps: int = 0
    grown: bool = False
    refitted: bool = False
    sensitivity: dict[str, float] | None = None


@dataclass
class Run:
    """PIAD training of one super-network (METHOD 2); `skd.training.loop.run_epochs` does it.

    Attributes:
        plain: True when `skd.finetune` wrapped a plain model in a SuperNet; it is then saved as a plain model.
        folder: of its files; None: it writes none.
        scheduler: of the learning rate.
        online: importance from the training steps themselves, where it is asked for.
        steps_per_epoch: where the loader has a length.
        origin: what the run began with, for those who resume it; without a folder nobody does.
        position: the epoch of the next step, and how far the run has come in it.
        best_state: the weights of the best epoch so far, on the CPU.
        compiles: the next step waits for the compiler.
        tracker: for TensorBoard, of rank 0, once the epochs begin.
        finite: on the device, whether all losses, and the weights when they were looked at, were finite.
    """

    config: TrainConfig
    train_loader: Batches
    val_loader: Batches | None
    calibration: Batches
    folder: Path | None
    screen: Screen
    plain: bool
    stepper: Stepper
    scheduler: Scheduler
    online: OnlineImportance | None
    steps_per_epoch: int | None
    origin: Origin | None
    position: Position
    finite: torch.Tensor
    compiles: bool
    history: History = field(default_factory=History)
    best_state: dict[str, torch.Tensor] | None = None
    tracker: Tracker | None = None
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def state(self) -> StepState:
        return self.stepper.state

    @property
    def supernet(self) -> SuperNet:
        return self.state.supernet

    @property
    def group(self) -> Group:
        return self.state.group

    @property
    def step(self) -> int:
        """Optimizer steps done in all."""
        return self.stepper.step

    @property
    def product(self) -> Path:
        """The file with the best weights so far."""
        assert self.folder is not None
        return self.folder / ("model.safetensors" if self.plain else "supernet.safetensors")

    # What may end it

    def stoppable(self, batches: Batches, description: str) -> Iterator[object]:
        """`batches` with a bar; a signal ends the run between them."""
        for batch in repeatable(self.screen.bar(batches, description), self.config.seed, description):
            yield batch
            self.obey()

    def obey(self) -> None:
        """A signal ends the run here, at a place where it can be put away."""
        if self.stop.number is not None:
            raise StopAll(self.stop.number)

    def check_finite(self, weights: bool = False) -> None:
        """Check that every loss so far is finite, and with `weights` every weight too.

        The weights are checked before they are saved or evaluated: a NaN gradient spoils them before the next loss
        shows it.

        Raises:
            Diverged: there is a NaN or an infinity, on some rank.
        """
        if weights:
            for parameter in self.supernet.parameters():
                self.finite &= torch.isfinite(parameter).all()
        if largest(not bool(self.finite), self.group) == 0:
            return
        known = [] if self.folder is None else checkpoints.checkpoints(self.folder / "checkpoints")
        # Checkpoints of later steps are damaged, which is why this run was resumed from an older one.
        known = [path for path in known if path <= checkpoints.checkpoint_path(path.parent, self.step)]
        last = f"the last good checkpoint is {known[0]}" if known else "no checkpoint had been written"
        raise Diverged(
            f"the loss or a weight is NaN or infinite in epoch {self.position.epoch}, by step {self.step}; {last}"
        )

    # Files: rank 0 writes them, and the others wait until it has

    def keep_weights(self) -> None:
        """Keep a copy of the evaluated weights and write them to a file, because they are the best so far."""
        averaged = self.state.averaged
        self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in averaged.state_dict().items()}
        with together(self.group):
            if self.folder is not None and self.state.rank == 0:
                save(self._as_saved(averaged), self.product)

    def check_product(self) -> None:
        """Check that the weights can be saved, before there are any that could be lost.

        Raises:
            ValueError: the network cannot be rebuilt from a file, or a folder has the file's name.
        """
        with together(self.group):
            if self.folder is not None and self.state.rank == 0:
                if self.product.is_dir():
                    raise ValueError(f"out has a folder {self.product.name}, which is the name of a file to write")
                check_saveable(self._as_saved(self.supernet))

    def _as_saved(self, network: SuperNet) -> SuperNet | TimmModel:
        return extract(network, entry=0) if self.plain else network

    def begin_tracking(self) -> None:
        """Open the files for TensorBoard, if the settings ask for them."""
        with together(self.group):
            if self.config.log is not None and self.folder is not None and self.state.rank == 0:
                self.tracker = Tracker(self.folder / FOLDER, self.history)

    def track(self, row: Epoch) -> None:
        """Give an epoch to TensorBoard; before its checkpoint, since a resumed run does not come back to it."""
        with together(self.group):
            if self.tracker is not None:
                self.tracker.add(row)

    def write_records(self) -> None:
        """history.jsonl, and dropout_list.json of a super-network; whole each time."""
        texts = {"history.jsonl": self.history.to_jsonl()}
        if not self.plain:
            texts["dropout_list.json"] = self.supernet.dropout_list.to_json() + "\n"
        with together(self.group):
            if self.folder is None or self.state.rank > 0:
                return
            for name, text in texts.items():
                with replacing(self.folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")


def make_run(
    supernet: SuperNet,
    train_loader: Batches,
    val_loader: Batches | None,
    config: TrainConfig,
    calibration: Batches = (),
    *,
    screen: Screen,
    folder: Path | None = None,
    plain: bool = False,
    group: Group = None,
) -> Run:
    """A run before its first step; on several ranks all of them call it.

    Raises:
        ValueError: settings that do not go together, or networks that are not alike on all ranks.
    """
    state = make_state(supernet, config, group)
    _tell_of_graph(state, config, screen)
    loaders = {"training": train_loader, "validation": val_loader, "calibration": calibration}
    batches = length_of(train_loader)
    steps_per_epoch = None if batches is None else batches // config.grad_accum_steps
    online = None
    if config.importance == "online" and config.growing_epochs > 1:
        if state.precision == torch.float16:
            raise ValueError("importance is 'online'; float16's changing loss scale would be in the scores")
        online = OnlineImportance(supernet, group)
    return Run(
        config=config,
        train_loader=train_loader,
        val_loader=val_loader,
        calibration=calibration,
        folder=folder,
        screen=screen,
        plain=plain,
        # The scheduler is made before the stepper, which may move the learning rate to the device, since it reads a
        # plain number.
        scheduler=make_scheduler(state.optimizer, config.schedule, steps_per_epoch),
        stepper=Stepper(state, config),
        online=online,
        steps_per_epoch=steps_per_epoch,
        # On several ranks all have rank 0's weights by now.
        origin=origin(supernet, loaders, group) if folder is not None else None,
        position=Position(0, StepLog(group=group)),
        finite=torch.ones((), dtype=torch.bool, device=state.device),
        compiles=config.torchcompile,
    )


def _tell_of_graph(state: StepState, config: TrainConfig, screen: Screen) -> None:
    """One line where there was something to decide: a run on a CPU has no graphs anyway."""
    if state.graph_refusal is None:
        screen.line("cuda_graph: every step is a replay of one CUDA graph, once it is captured")
    elif state.device.type == "cuda" and config.cuda_graph is None:
        screen.line(f"cuda_graph: the steps run one by one, because {state.graph_refusal}")
