"""One training run: what it holds, what it does in an epoch, and how it is put away and taken up again."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.utils import ModelEmaV3

from skd import planners
from skd.curve import area, measure_curve
from skd.data.counted import generator, seeded
from skd.dropout_list import DropoutList
from skd.extract import extract
from skd.files import load, save
from skd.outputs import replacing
from skd.ranks import StopAll, check_same, everyone, in_step, largest, others_alive, rank_of, size_of, together
from skd.settings import TrainConfig
from skd.supernet import SuperNet
from skd.taps import checked_batch
from skd.training import checkpoints
from skd.training.batches import Anew, repeatable, start_epoch
from skd.training.dropping import DropPaths, drop_paths
from skd.training.graph import StepGraph, refusal
from skd.training.history import History, StepLog, drawn_means
from skd.training.mixing import Mixing
from skd.training.online import OnlineImportance
from skd.training.optimizer import make_optimizer, make_scheduler
from skd.training.origin import origin
from skd.training.parallel import on_ranks
from skd.training.precision import amp_dtype, laid_out, tf32
from skd.training.screen import Screen, Seconds
from skd.training.state import capture, check_same_run, restore
from skd.training.step import eager_step
from skd.training.stopping import Diverged, Stopped, StopSignal, stop_signals


class Trainer:
    """PIAD training of one super-network (METHOD 2); `run` does it all.

    Attributes:
        epoch, step_in_epoch: the next step's epoch, and how many steps of it are done.
        step: optimizer steps done in all.
        plain: the network is a plain model in a super-network's clothes, and is saved as a plain model.
        grown: the dropout list has been grown for this epoch.
        origin: what the run began with, for those who resume it.
        network: what is called to train: the super-network, compiled where asked for, and on several ranks wrapped
            in DistributedDataParallel, unless a CUDA graph averages the gradients.
    """

    def __init__(
        self,
        supernet: SuperNet,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        config: TrainConfig,
        calibration: Iterable[Any],
        folder: Path | None,
        screen: Screen,
        plain: bool = False,
        group: Any = None,
    ) -> None:
        self.group, self.rank, self.world = group, rank_of(group), size_of(group)
        self.supernet, self.config, self.folder, self.screen = supernet, config, folder, screen
        self.plain = plain
        self.train_loader, self.val_loader, self.calibration = train_loader, val_loader, calibration
        self.device = next(supernet.parameters()).device
        self.history = History()
        self.epoch = self.step = self.step_in_epoch = 0
        self.grown = False
        self.sensitivity: dict[str, float] | None = None
        self.best_state: dict[str, torch.Tensor] | None = None
        self.log = StepLog(self.device, group=group)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.stop = StopSignal()
        self.paths: DropPaths | None = None
        self.mixing = Mixing(config, supernet.model.num_classes)
        self.amp_dtype = amp_dtype(config.amp_dtype, self.device)
        reason = refusal(self) if config.cuda_graph else None
        if reason is not None:
            warnings.warn(f"cuda_graph: the steps run one by one, because {reason}", stacklevel=3)
        replayed = config.cuda_graph and reason is None
        self.network: Any = supernet
        if config.torchcompile:
            if self.device.type == "cpu":
                warnings.warn("torchcompile: on a CPU each compiled step does the full network's work", stacklevel=3)
            self.network = torch.compile(supernet)  # once for every entry: widths are looked up on the device
        if group is not None:
            self.network = on_ranks(self.network, supernet, group, replayed=replayed)
        # On several ranks all have rank 0's weights by now. Without a folder nobody asks for it.
        self.origin = origin(self) if folder is not None else None
        self.cold = config.torchcompile  # the next step waits for the compiler
        # Before stochastic depth is put in: the average is a super-network as convert made it.
        self.ema: Any = None
        if config.model_ema:
            self.ema = ModelEmaV3(supernet, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        self.names = {id(parameter): name for name, parameter in supernet.model.named_parameters()}
        self.optimizer, self.decay = make_optimizer(supernet, config)
        self.steps_per_epoch = None
        if isinstance(train_loader, Sized):
            self.steps_per_epoch = len(train_loader) // config.grad_accum_steps
        self.scheduler = make_scheduler(self.optimizer, config, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.online: OnlineImportance | None = None
        if config.importance == "online" and config.growing_epochs > 1:
            if self.amp_dtype == torch.float16:
                raise ValueError("importance is 'online'; float16's changing loss scale would be in the scores")
            self.online = OnlineImportance(supernet, group)
        self.graph = StepGraph(self) if replayed else None

    @property
    def averaged(self) -> SuperNet:
        """The network that is evaluated and saved."""
        return self.supernet if self.ema is None else self.ema.module

    @property
    def product(self) -> Path:
        """The file with the best weights so far."""
        assert self.folder is not None
        return self.folder / ("model.safetensors" if self.plain else "supernet.safetensors")

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32)

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        """Around the passes of one part of a step: ranks add up their gradients in the last part alone."""
        return nullcontext() if last or self.group is None else self.network.no_sync()

    # The run

    def run(self) -> History:
        """All epochs from where the run stands; the super-network then holds the weights that were kept."""
        training = self.supernet.training
        checkpointing = self.supernet.grad_checkpointing
        self.supernet.grad_checkpointing = checkpointing or self.config.grad_checkpointing
        try:
            with (
                tf32(self.config.tf32),
                drop_paths(self.supernet, self.config.drop_path, self.config.seed) as self.paths,
                stop_signals(self.folder is not None) as self.stop,
            ):
                self._run_epochs()
        finally:
            if self.graph is not None:
                self.graph.release()
            self.supernet.scores = None
            self.supernet.grad_checkpointing = checkpointing
            self.supernet.train(training)
        if self.best_state is not None:
            self.supernet.load_state_dict(self.best_state)
        return self.history

    def _run_epochs(self) -> None:
        try:
            if self.step == 0 and self.history.original_top1 is None:
                self._measure_original()
            while self.epoch < self.config.epochs:
                self._run_epoch()
        except StopAll as stop:
            raise Stopped(stop.signal, self.checkpoint()) from None

    def _run_epoch(self) -> None:
        seconds = Seconds()
        if self.epoch < self.config.growing_epochs and not self.grown:
            with seconds("importance"):
                self._grow()
        if self.online is not None:
            self.online.follow(self.epoch + 1 < self.config.growing_epochs)
        self._train_epoch(seconds)
        summary = self.log.summary(self.supernet.dropout_list)
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "loss": summary["loss"] / max(summary["count"], 1),
            "images": summary["images"],
            "entries": len(self.supernet.dropout_list),
            "macs_fraction": float(self.supernet.dropout_list.macs[-1] / self.supernet.dropout_list.macs[0]),
            "sensitivity": self.sensitivity,
            "drawn": drawn_means(summary),
            "curve": None,
            "area": None,
            "best": False,
        }
        last = self.epoch == self.config.epochs - 1
        if last or (self.epoch + 1) % self.config.eval_every == 0:
            with seconds("evaluate"):
                self._evaluate(row)
        self.history.epochs.append(row)
        self.epoch, self.step_in_epoch, self.grown, self.sensitivity = self.epoch + 1, 0, False, None
        self.log = StepLog(self.device, group=self.group)
        row["seconds"] = seconds.all()
        with seconds("checkpoint"):
            self.checkpoint()
        row["seconds"] = seconds.all()  # the copy in the checkpoint cannot know how long it took
        self._write_records()
        self.screen.epoch(row, self.config.epochs)

    def _measure_original(self) -> None:
        if self.val_loader is None:
            return
        rows = self._curve(self.supernet, (1.0,), "Evaluating the network before training")
        top1 = rows[0]["top1"]
        self.history.original_top1 = top1
        self.screen.line(f"before training: {top1:.2f} % top-1")
        expected = self.config.expected_top1
        if expected is not None and abs(top1 - expected) > 0.5:
            warnings.warn(
                f"the network scores {top1:.2f} % before training, but {expected:.2f} % was expected: "
                "are the weights, the preprocessing and the order of the classes right?",
                stacklevel=4,
            )

    def _grow(self) -> None:
        """One round of the planner, at the present raw weights; the list grows in place."""
        current, convention = self.supernet.dropout_list, self.config.convention
        total = int(self.supernet.costs.macs(self.supernet.widths(), convention))
        target = self.config.target * (self.epoch + 1) / self.config.growing_epochs * total
        if self.online is not None and self.online.steps:  # of the planner "paper": its scores, by another way
            proposal = self.online.propose(convention)
            grown, sensitivity = current.extended(proposal.operations, target), proposal.sensitivity
        else:
            batches = Anew(partial(self._stoppable, self.calibration, "Measuring importance"))
            grown = planners.grow(
                self.config.planner,
                self.supernet,
                batches,
                target,
                current=current,
                convention=convention,
                group=self.group,
            )
            sensitivity = dict(grown.sensitivity or {})
        # Rank 0's: all have the same scores, but their processors need not sort or round alike.
        self.use(DropoutList.from_json(everyone(grown.to_json(), self.group)[0]))
        self.grown, self.sensitivity = True, sensitivity

    def use(self, dropout_list: DropoutList) -> None:
        """`dropout_list` from now on, in the trained network and in its average, on every rank."""
        check_same(dropout_list.to_json(), "the dropout list", self.group)
        self.supernet.dropout_list = dropout_list
        if self.ema is not None:
            self.ema.module.dropout_list = dropout_list
        if self.decay is not None:
            self.decay.update()

    # One epoch of steps

    def _train_epoch(self, seconds: Seconds) -> None:
        self.supernet.train()
        accumulated = self.config.grad_accum_steps
        start = self.step_in_epoch * accumulated
        groups = iter(in_step(self._groups(start), self.group, images_in))
        if self.config.sched_on_updates:  # the last step's: a run may be taken up after the last step of an epoch
            self._set_learning_rate(self.scheduler.step_update, max(self.step - 1, 0))
        else:
            self._set_learning_rate(self.scheduler.step, self.epoch)
        with self.screen.steps(self.epoch, self.config.epochs, self.steps_per_epoch, self.step_in_epoch) as bar:
            while True:
                with seconds("data"):
                    group = next(groups, None)
                if group is None:
                    break
                with seconds("compile" if self.cold else "steps"):
                    self._check_batch_size(group)
                    if self.config.sched_on_updates:
                        self._set_learning_rate(self.scheduler.step_update, self.step)
                    self.train_step(group, self._draw())
                self.cold = False
                self._after_step(bar)
        if self.step_in_epoch == 0:
            raise ValueError("train_loader has no batch; it must yield at least one (images, labels) per step")
        self._check_finite()

    def _groups(self, start: int) -> Iterator[list[Any]]:
        """The batches of each step, from batch `start` on."""
        batches = enumerate(start_epoch(self.train_loader, self.config.seed, self.epoch, start), start)
        while True:
            self._obey()
            group = [self._checked(*numbered) for numbered in itertools.islice(batches, self.config.grad_accum_steps)]
            if len(group) < self.config.grad_accum_steps:
                return
            yield group

    def _checked(self, number: int, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        name = f"train_loader[{number}] of epoch {self.epoch}"
        images, labels = checked_batch(self.supernet.model, batch, name)
        if labels is None:
            raise ValueError(f"{name}: labels is None; training needs labels")
        return laid_out(images, self.config), labels

    def train_step(self, group: list[Any], entry: int) -> None:
        """Train one entry on one batch, given in parts: update the weights and their average."""
        images = images_in(group)
        start = self._now()
        masks = None
        if self.paths is not None:  # of the whole batch; this rank has its rows rank, rank + world, ...
            masks = self.paths.masks(self.step, images * self.world)[:, self.rank :: self.world]
        with others_alive(self.group), seeded(self.config.seed, "step", self.step):
            if self.graph is None:
                loss = eager_step(self, group, entry, masks)
            else:
                loss = self._replay(group[0], entry, masks)
        self.finite &= torch.isfinite(loss)
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        if self.online is not None:
            self.online.steps += 1
        end = self._now()
        seconds = (start, end) if self.device.type == "cuda" else end - start
        self.log.add(entry, loss, seconds, images * self.world)

    def _replay(self, batch: Any, entry: int, masks: torch.Tensor | None) -> torch.Tensor:
        images, targets = self.mixing(*batch)
        inputs = {"images": images, "targets": targets, "entry": torch.tensor(entry)}
        assert self.graph is not None
        return self.graph(inputs if masks is None else inputs | {"masks": masks})

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _after_step(self, bar: Any) -> None:
        # On a GPU reading the loss would wait for the step: look now and then.
        if self.device.type != "cuda" or self.step % self.config.log_interval == 0:
            self._check_finite()
            bar.advance(self.log.last_loss())
        else:
            bar.advance(None)
        if self.config.checkpoint_steps and self.step % self.config.checkpoint_steps == 0:
            self.checkpoint()

    def _check_finite(self, weights: bool = False) -> None:
        """Of the losses so far; before weights are kept or judged, of them too: a gradient alone may be NaN."""
        if weights:
            for parameter in self.supernet.parameters():
                self.finite &= torch.isfinite(parameter).all()
        if largest(not bool(self.finite), self.group) == 0:
            return
        known = [] if self.folder is None else checkpoints.checkpoints(self.folder / "checkpoints")
        # Later than this step are only damaged ones, which the run was taken up before.
        known = [path for path in known if path <= checkpoints.checkpoint_path(path.parent, self.step)]
        last = f"the last good checkpoint is {known[0]}" if known else "no checkpoint had been written"
        raise Diverged(f"the loss or a weight is NaN or infinite in epoch {self.epoch}, by step {self.step}; {last}")

    def _set_learning_rate(self, schedule: Callable[[int], None], position: int) -> None:
        schedule(position)
        if self.graph is not None:
            self.graph.set_learning_rate()

    def _draw(self) -> int:
        """This step's entry: uniform over the list, the last one included."""
        return int(generator(self.config.seed, "entry", self.step).integers(len(self.supernet.dropout_list)))

    def _check_batch_size(self, group: list[Any]) -> None:
        images = images_in(group) * self.world
        if self.step == 0 and self.rank == 0 and self.config.lr is None and images != self.config.batch_size:
            warnings.warn(
                f"train_loader gives {images} images per step, but batch_size is {self.config.batch_size}: "
                f"the learning rate, {self.config.peak_lr:.1e}, is for the latter",
                stacklevel=5,
            )

    # Evaluation

    def _evaluate(self, row: dict[str, Any]) -> None:
        """The curve of the averaged weights; they are kept if its area is the largest so far."""
        self._check_finite(weights=True)
        if self.val_loader is not None:
            row["curve"] = self._curve(self.averaged, self.config.budgets, "Evaluating")
            row["area"] = area(row["curve"], self.config.budgets)
            best = self.history.area
            if best is not None and row["area"] < best:  # of equals the later, which has trained longer
                return
        elif self.epoch < self.config.epochs - 1:
            return
        row["best"], self.history.best_epoch = True, self.epoch
        for earlier in self.history.epochs:
            earlier["best"] = False
        state = self.averaged.state_dict()
        self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        with together(self.group):
            if self.folder is not None and self.rank == 0:
                save(extract(self.averaged, entry=0) if self.plain else self.averaged, self.product)

    def _curve(self, supernet: SuperNet, budgets: Iterable[float], description: str) -> list[dict[str, Any]]:
        assert self.val_loader is not None
        batches = self._stoppable(self.val_loader, description)
        with self.autocast():
            return measure_curve(supernet, batches, budgets, group=self.group)

    def _stoppable(self, batches: Iterable[Any], description: str) -> Iterator[Any]:
        batches = self.screen.bar(batches, description)
        for batch in repeatable(batches, self.config.seed, description):
            yield batch
            self._obey()

    def _obey(self) -> None:
        """A signal ends the run here, at a place where it can be put away."""
        if self.stop.number is not None:
            raise StopAll(self.stop.number)

    # Files

    def checkpoint(self) -> Path:
        """Write where the run stands (rank 0 does); nothing where there is no folder."""
        self._check_finite(weights=True)
        if self.folder is None:
            return Path()
        folder, state = self.folder / "checkpoints", capture(self)
        with together(self.group):
            if self.rank == 0:
                checkpoints.write(folder, self.step, *state, self.config.checkpoint_hist)
        return checkpoints.checkpoint_path(folder, self.step)

    def resume(self) -> bool:
        """Take up the newest checkpoint of the folder; False if there is none.

        Raises:
            ValueError: it is of a run with other settings, weights or data.
        """
        assert self.folder is not None
        with together(self.group):
            found = checkpoints.newest(self.folder / "checkpoints")
        check_same(None if found is None else found[1]["step"], "the newest checkpoint's step", self.group)
        if found is None:
            return False
        with together(self.group):  # one rank alone may refuse, by its own share of the data
            check_same_run(self, *found)
        restore(self, *found)
        self._write_records()
        if self.history.best_epoch is not None:
            with together(self.group):
                self.best_state = load(self.product).state_dict()
        return True

    def _write_records(self) -> None:
        """history.jsonl, and dropout_list.json of a super-network; whole each time."""
        texts = {"history.jsonl": self.history.to_jsonl()}
        if not self.plain:
            texts["dropout_list.json"] = self.supernet.dropout_list.to_json() + "\n"
        with together(self.group):
            if self.folder is None or self.rank > 0:
                return
            for name, text in texts.items():
                with replacing(self.folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")


def by_hand(supernet: SuperNet, config: TrainConfig, group: Any = None) -> Trainer:
    """A trainer to call `train_step` of: without loaders and files, and it shows nothing."""
    return Trainer(supernet, [], None, config, (), None, Screen(Console(quiet=True)), group=group)


def images_in(group: list[Any]) -> int:
    """Of a step's batch, given in parts."""
    return sum(len(images) for images, _ in group)
