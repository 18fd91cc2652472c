"""Every setting of a training run, with the published value of each. The names are those of timm's training script.

Nothing here imports torch, so that ``skd train --help`` does not wait for it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from skd import planners
from skd.support.types import Document

_Value = TypeVar("_Value")

DECAYS = ("published", "expected")
IMPORTANCE = ("passes", "online")
KD_TEACHERS = ("original", "larger", "both")
SAMPLINGS = ("uniform", "small", "sandwich")  # of the entries that are trained
AMP_DTYPES = ("auto", "float32", "bfloat16", "float16")
BAD_IMAGES = ("skip", "fail")
AUGMENT_ON = ("auto", "device", "cpu")
LOGS = ("tensorboard",)
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of networks that are timed
CONVENTIONS = ("full", "linear")  # how MACs are counted
CENTERINGS = ("dataset", "batch")  # of the statistics of a conversion
QK, V, NEURONS = ("joint", "balanced"), ("variance", "output"), ("taylor", "residual")  # the defaults come first
LABELS = ("given", "predicted")  # of calibration images
CHECKPOINT_WEIGHTS = ("ema", "model")  # which weights to take of a checkpoint that has both
RESUME = (None, "auto")
DEMO_EPOCHS = 40  # of the demo's stand-in for a pre-trained model

_COLOR_JITTER = 0.3  # `Augmentation` also takes other types, but `TrainConfig` only a number


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented. The names are those of timm's training script.

    The defaults are DeiT's, which the paper uses. `TrainConfig` has the same fields and takes its defaults from here.

    Attributes:
        scale: of the random crop's area, (low, high) as shares of the image's.
        ratio: of the random crop's sides, (low, high).
        hflip, vflip: probabilities of a flip.
        color_jitter: strength of changes to brightness, contrast and saturation; timm leaves them out with `aa`.
        aa: AutoAugment policy such as "rand-m9-mstd0.5-inc1"; None: none.
        reprob, remode, recount: probability, filling ("const", "rand", "pixel") and number of erased rectangles.
        train_interpolation: of resizing: "random" (bilinear or bicubic), "bilinear", "bicubic", ...
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | tuple[float, ...] | None = _COLOR_JITTER
    aa: str | None = "rand-m9-mstd0.5-inc1"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    train_interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "reprob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a probability, 0..1")
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {(low, high)}; it must be (low, high) with 0 < low <= high")
        if self.remode not in ("const", "rand", "pixel"):
            raise ValueError(f"remode is {self.remode!r}; it may be 'const', 'rand' or 'pixel'")
        if self.recount < 1:
            raise ValueError(f"recount is {self.recount}; it must be at least 1")


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights are updated: `TrainConfig.optimizer`, with the name of each field in `TrainConfig`.

    Attributes:
        name: `opt`.
        peak_lr: `lr`, or the value computed from `lr_base`.
        eps: `opt_eps`.
        weight_decay, decay, clip_grad, entry_sampling: as in `TrainConfig`.
    """

    name: str
    peak_lr: float
    eps: float
    weight_decay: float
    decay: str
    clip_grad: float | None
    entry_sampling: str = "uniform"


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate moves: `TrainConfig.schedule`.

    Attributes:
        epochs, min_lr, warmup_lr: as in `TrainConfig`.
        peak_lr: the learning rate after the warm-up.
        warmup_epochs: `warmup_epochs`, or the value computed from `epochs`.
        by_step: `sched_on_updates`.
    """

    epochs: int
    peak_lr: float
    min_lr: float
    warmup_lr: float
    warmup_epochs: int
    by_step: bool


@dataclass(frozen=True)
class MixingSettings:
    """Mixup, CutMix and label smoothing: `TrainConfig.mixing`; `prob` and `switch_prob` are its ``mixup_...``."""

    mixup: float
    cutmix: float
    prob: float
    switch_prob: float
    smoothing: float


@dataclass(frozen=True)
class AverageSettings:
    """The moving average of the weights: `TrainConfig.average`, where both fields are called ``model_ema_...``."""

    decay: float
    warmup: bool


@dataclass(frozen=True)
class DistillationSettings:
    """Who teaches the sub-networks, and how much: `TrainConfig.distillation`.

    Attributes:
        original, larger: whether each of these is a teacher.
        temperature: `kd_temperature`.
        task_share: `task_loss_weight`.
    """

    original: bool
    larger: bool
    temperature: float
    task_share: float


def _option(default: _Value, help: str, **metadata: object) -> _Value:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of PIAD training (METHOD 2); the defaults are the paper's, that is DeiT's recipe.

    Each field's meaning and published value is its ``metadata["help"]``, which ``skd train --help`` prints;
    ``metadata["choices"]``, where it is there, gives the values it may have.

    Raises:
        ValueError: a value of the wrong type or out of range; the message names the field.
    """

    # Length and learning rate
    epochs: int = _option(300, "passes over the training images (paper: 300 for Tiny and Small, 150 for Base)")
    batch_size: int = _option(1024, "images per optimizer step, over all ranks and accumulated parts (paper: 1024)")
    lr: float | None = _option(None, "peak learning rate; unset: lr_base * batch_size / lr_base_size")
    lr_base: float = _option(5e-4, "peak learning rate at lr_base_size images per step (paper: 5e-4)")
    lr_base_size: int = _option(512, "images per step that lr_base is for (paper: 512)")
    min_lr: float = _option(1e-5, "learning rate at the end of the cosine, at most the peak (DeiT: 1e-5)")
    warmup_epochs: int | None = _option(None, "epochs of linear warm-up; unset: 5 as DeiT, but at most epochs / 10")
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up (DeiT: 1e-6)")
    sched_on_updates: bool = _option(False, "move the learning rate every step, not every epoch (DeiT: no)")

    # Optimizer
    opt: str = _option("adamw", "any optimizer of timm (paper: adamw)")
    opt_eps: float = _option(1e-8, "epsilon of the optimizer (DeiT: 1e-8)")
    weight_decay: float = _option(0.05, "of weight matrices; biases, norms and embeddings have none (paper: 0.05)")
    decay: str = _option(
        "published",
        "'published': weight decay on every coordinate at every step; 'expected': in proportion to how often the "
        "dropout list includes it (paper: published)",
    )
    clip_grad: float | None = _option(None, "clip the gradient to this norm; unset: no clipping (DeiT: none)")
    grad_accum_steps: int = _option(1, "parts that a step's images are processed in (paper: 1)")
    amp_dtype: str = _option(
        "auto", "'float32', or autocast to 'bfloat16' or 'float16'; 'auto': bfloat16 on a GPU, float32 on a CPU"
    )
    tf32: bool = _option(False, "let a GPU round the inputs of float32 products to TF32, where amp_dtype leaves some")
    channels_last: bool = _option(False, "give the patch embedding its images in channels-last memory layout")
    grad_checkpointing: bool = _option(False, "recompute activations in the backward pass to save memory")
    torchcompile: bool = _option(False, "compile the network with torch.compile, once for all sub-networks")
    cuda_graph: bool | None = _option(
        None,
        "replay each step as one CUDA graph, or say why it cannot; unset: on a GPU, where nothing speaks against it",
    )

    # Regularisation
    drop_path: float = _option(0.1, "rate of stochastic depth in the last block, rising linearly (paper: 0.1)")
    mixup: float = _option(0.8, "alpha of Mixup, 0 is off (paper: 0.8)")
    cutmix: float = _option(1.0, "alpha of CutMix, 0 is off (paper: 1.0)")
    mixup_prob: float = _option(1.0, "share of steps with Mixup or CutMix (DeiT: 1.0)")
    mixup_switch_prob: float = _option(0.5, "share of those that use CutMix, where both are on (DeiT: 0.5)")
    smoothing: float = _option(0.1, "label smoothing (paper: 0.1)")
    model_ema: bool = _option(True, "evaluate and save an exponential moving average of the weights (paper: yes)")
    model_ema_decay: float = _option(0.99996, "decay of that average per step (DeiT: 0.99996)")
    model_ema_warmup: bool = _option(
        True,
        "let the average start fast, so that runs of fewer than about 25,000 steps are not judged by their first "
        "weights (DeiT: no)",
    )

    # Distillation
    kd_teacher: str | None = _option(
        None,
        "whose predictions each sub-network is also trained on: 'original': the network before the first step, "
        "frozen; 'larger': the next larger entry of the dropout list, at the present weights; 'both'; unset: none "
        "(paper: none)",
    )
    kd_temperature: float = _option(2.0, "temperature that softens both predictions (paper: no distillation)")
    task_loss_weight: float = _option(
        0.5, "with a teacher, the share of the loss that is of the labels, the rest is the teacher's (paper: 1)"
    )

    # Augmentation, of the loaders that skd makes (`skd.data.loaders`)
    scale: tuple[float, float] = _option(Augmentation.scale, "area of the random crop (DeiT: 0.08 1.0)")
    ratio: tuple[float, float] = _option(Augmentation.ratio, "aspect ratio of the random crop (DeiT: 3/4 4/3)")
    hflip: float = _option(Augmentation.hflip, "probability of a horizontal flip (DeiT: 0.5)")
    vflip: float = _option(Augmentation.vflip, "probability of a vertical flip (DeiT: 0)")
    color_jitter: float = _option(_COLOR_JITTER, "strength of colour jitter, where aa is off (DeiT: 0.3)")
    aa: str | None = _option(Augmentation.aa, "timm's auto-augment policy, 'none': off (paper: RandAugment m9)")
    train_interpolation: str = _option(
        Augmentation.train_interpolation, "interpolation of the training images (DeiT: bicubic)"
    )
    reprob: float = _option(Augmentation.reprob, "probability of random erasing (DeiT: 0.25)")
    remode: str = _option(Augmentation.remode, "what random erasing fills in: const, rand or pixel (DeiT: pixel)")
    recount: int = _option(Augmentation.recount, "areas that random erasing fills (DeiT: 1)")
    aug_repeats: int = _option(3, "augmentations of each image drawn for an epoch, 1 is off (paper: on; DeiT: 3)")
    augment_on: str = _option(
        "auto",
        "'device': workers only decode, crop and resize, the device does the rest batch by batch; 'cpu': the workers "
        "do all, by timm's transform; 'auto': the device, where it has all that is asked for (same random numbers)",
    )

    # Progressive importance-aware dropout
    target: float = _option(0.875, "share of the MACs that the smallest sub-network has removed (paper: 0.875)")
    progressive_epochs: int | None = _option(
        None, "epochs during which the dropout list grows; unset: min(50, epochs / 3), at least 1 (paper: 50)"
    )
    planner: str | None = _option(
        None,
        "decides how the dropout list grows: 'loss', by the measured rise of the loss; 'paper', the published one; "
        "unset: 'loss', but 'paper' with importance 'online'",
        choices=planners.names,
    )
    planner_options: dict[str, Any] | None = _option(  # noqa: RUF009 (None is the default)
        None, 'of the planner\'s own, such as {"points": 8}; unset: none'
    )
    importance: str = _option(
        "passes",
        "'passes': measured before each epoch that grows the list, on calibration images (paper); 'online': after "
        "the first, followed from the training steps themselves (planner 'paper' only)",
    )
    entry_sampling: str = _option(
        "uniform",
        "how a step's entry of the dropout list is drawn: 'uniform' (paper); 'small': in inverse proportion to its "
        "MACs; 'sandwich': the full network, the smallest and one at random take turns",
    )
    refit_start: bool = _option(
        False,
        "once the dropout list no longer grows, fit the output layers on the calibration images, so that small "
        "entries start nearer to the full network (paper: no)",
    )
    calibration_images: int = _option(1024, "un-augmented training images that importance is measured on (1024)")
    convention: str = _option("full", "how planning counts MACs: 'full' or 'linear' (paper: linear)")

    # Evaluation and checkpoints
    eval_every: int = _option(10, "epochs between evaluations; the last epoch is always evaluated")
    budgets: tuple[float, ...] = _option(
        (1.0, 10 / 12, 8 / 12, 6 / 12, 4 / 12, 3 / 12, 2 / 12),
        "shares of the MACs at which sub-networks are evaluated (the paper's tables have twelfths)",
    )
    expected_top1: float | None = _option(
        None, "accuracy you expect of the unconverted model, in percent: a warning if it is 0.5 points off"
    )
    checkpoint_hist: int = _option(2, "checkpoints to keep")
    checkpoint_steps: int = _option(0, "also write a checkpoint every so many steps; 0: at the end of epochs only")

    # Data loading
    workers: int = _option(4, "processes that load images; any number gives the same batches")
    validation_batch_size: int | None = _option(
        None, "images per evaluation batch; unset: batch_size, at most 256 per rank"
    )
    bad_images: str = _option("skip", "'skip': leave out an image that cannot be read, count and warn; 'fail': stop")
    log_interval: int = _option(50, "steps between looks at the loss")
    log: str | None = _option(
        None,
        "'tensorboard': also write the loss, the learning rate and the curve of sub-networks of every epoch to the "
        "folder tensorboard of out, for TensorBoard; unset: not",
    )
    seed: int = _option(0, "of everything random")

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "budgets"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if self.aa in ("none", ""):
            object.__setattr__(self, "aa", None)
        for setting in fields(self):
            _check_type(setting, getattr(self, setting.name))
        _check_ranges(self)

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr_base * self.batch_size / self.lr_base_size if self.lr is None else self.lr

    @property
    def warmup(self) -> int:
        """The number of epochs of warm-up."""
        return min(5, self.epochs // 10) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def chosen_planner(self) -> str:
        """The name of the planner that grows the list."""
        usual = "paper" if self.importance == "online" else "loss"
        return usual if self.planner is None else self.planner

    @property
    def growing_epochs(self) -> int:
        """Epochs during which the dropout list grows."""
        given = self.progressive_epochs
        return min(50, max(1, self.epochs // 3)) if given is None else given

    @property
    def optimizer(self) -> OptimizerSettings:
        return OptimizerSettings(
            name=self.opt,
            peak_lr=self.peak_lr,
            eps=self.opt_eps,
            weight_decay=self.weight_decay,
            decay=self.decay,
            clip_grad=self.clip_grad,
            entry_sampling=self.entry_sampling,
        )

    @property
    def schedule(self) -> ScheduleSettings:
        return ScheduleSettings(
            self.epochs, self.peak_lr, self.min_lr, self.warmup_lr, self.warmup, self.sched_on_updates
        )

    @property
    def mixing(self) -> MixingSettings:
        return MixingSettings(self.mixup, self.cutmix, self.mixup_prob, self.mixup_switch_prob, self.smoothing)

    @property
    def average(self) -> AverageSettings | None:
        """The settings of the moving average of the weights, or None without one."""
        return AverageSettings(self.model_ema_decay, self.model_ema_warmup) if self.model_ema else None

    @property
    def distillation(self) -> DistillationSettings | None:
        """The settings of the distillation, or None without a teacher."""
        if self.kd_teacher is None:
            return None
        original, larger = self.kd_teacher in ("original", "both"), self.kd_teacher in ("larger", "both")
        return DistillationSettings(original, larger, self.kd_temperature, self.task_loss_weight)

    def changed(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed.

        Raises:
            ValueError: an unknown field (the message suggests near ones) or a bad value.
        """
        known = [setting.name for setting in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"; near names: {', '.join(near)}" if near else ""
                raise ValueError(f"setting {name!r} is unknown{hint}")
        return replace(self, **changes)

    def to_dict(self) -> Document:
        """JSON values by field name."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# METHOD 3: 30 epochs, learning rate 5e-5 down to 1e-6, no warm-up; nothing is dropped.
FINETUNING: dict[str, Any] = {"epochs": 30, "lr": 5e-5, "min_lr": 1e-6, "warmup_epochs": 0, "progressive_epochs": 0}


def finetune_config(**changes: Any) -> TrainConfig:
    """The published settings for fine-tuning an extracted sub-network (METHOD 3), with some fields changed."""
    return TrainConfig().changed(**(FINETUNING | {"budgets": (1.0,), "eval_every": 1} | changes))


def read_settings(path: str | Path) -> dict[str, object]:
    """Settings from a JSON or YAML file: a mapping of field names to values.

    Raises:
        ValueError: no such file, not JSON or YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config is {str(path)!r}; it cannot be read: {error}") from None
    try:
        # YAML reads 1e-4 as a string; JSON does not.
        document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--config is {str(path)!r}; it is neither JSON nor YAML: {first}") from None
    if not isinstance(document, Mapping):
        raise ValueError(f"--config is {str(path)!r}; it must hold names and values, one per line")
    return {str(name).replace("-", "_"): _plain_number(value) for name, value in document.items()}


def _plain_number(value: object) -> object:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _numbers(name: str, value: Iterable[float]) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; it must be a sequence of numbers") from None


def _check_type(setting: Field[object], value: object) -> None:
    kind = str(setting.type)
    if value is None and "None" in kind:
        return
    if kind.startswith("bool"):
        good, wanted = isinstance(value, bool), "true or false"
    elif kind.startswith("int"):
        good, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif kind.startswith("float"):
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        wanted = "a finite number"
    elif kind.startswith("str"):
        good, wanted = isinstance(value, str), "a string"
    elif kind.startswith("dict"):
        good, wanted = isinstance(value, dict) and all(isinstance(name, str) for name in value), "a mapping of names"
    else:
        return
    if not good:
        raise ValueError(f"{setting.name} is {value!r}; it must be {wanted}")


# (fields, test, what they may be)
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "epochs batch_size lr_base_size grad_accum_steps recount aug_repeats calibration_images eval_every "
        "checkpoint_hist log_interval validation_batch_size",
        lambda v: v >= 1,
        "at least 1",
    ),
    ("lr lr_base clip_grad opt_eps kd_temperature", lambda v: v > 0, "positive"),
    (
        "min_lr warmup_epochs warmup_lr weight_decay mixup cutmix color_jitter progressive_epochs checkpoint_steps "
        "workers",
        lambda v: v >= 0,
        "at least 0",
    ),
    ("drop_path model_ema_decay smoothing task_loss_weight", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("mixup_prob mixup_switch_prob hflip vflip reprob", lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("target", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("expected_top1", lambda v: 0 <= v <= 100, "from 0 to 100"),
    ("seed", lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    ("scale ratio", lambda v: len(v) == 2 and 0 < v[0] <= v[1], "two positive numbers, the smaller first"),
    ("budgets", lambda v: len(v) > 0 and all(0 < b <= 1 for b in v), "shares above 0 and at most 1"),
    ("decay", lambda v: v in DECAYS, f"one of {DECAYS}"),
    ("amp_dtype", lambda v: v in AMP_DTYPES, f"one of {AMP_DTYPES}"),
    ("importance", lambda v: v in IMPORTANCE, f"one of {IMPORTANCE}"),
    ("kd_teacher", lambda v: v in KD_TEACHERS, f"one of {KD_TEACHERS}"),
    ("entry_sampling", lambda v: v in SAMPLINGS, f"one of {SAMPLINGS}"),
    ("augment_on", lambda v: v in AUGMENT_ON, f"one of {AUGMENT_ON}"),
    ("bad_images", lambda v: v in BAD_IMAGES, f"one of {BAD_IMAGES}"),
    ("log", lambda v: v in LOGS, f"one of {LOGS}"),
    ("convention", lambda v: v in CONVENTIONS, f"one of {CONVENTIONS}"),
)


def _check_ranges(config: TrainConfig) -> None:
    for names, fits, wanted in _RANGES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    if config.chosen_planner not in planners.names():
        raise ValueError(f"planner is {config.planner!r}; it must be one of {planners.names()}")
    if config.importance == "online" and config.chosen_planner != "paper":
        raise ValueError(f"importance is 'online', which only the planner 'paper' has; planner is {config.planner!r}")
    if config.warmup >= config.epochs and config.warmup > 0:
        raise ValueError(f"warmup_epochs is {config.warmup}; it must be below epochs, {config.epochs}")
    if config.growing_epochs > config.epochs:
        raise ValueError(f"progressive_epochs is {config.growing_epochs}; it may be at most epochs, {config.epochs}")
    if config.batch_size % config.grad_accum_steps:
        raise ValueError(f"grad_accum_steps is {config.grad_accum_steps}; it must divide batch_size")
