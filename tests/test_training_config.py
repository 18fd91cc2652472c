"""Settings of a training run: published defaults, refusals that name the field, files."""

import json
import math
from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path

import pytest

import skd
from skd import TrainConfig, finetune_config
from skd.support.settings import read_settings

FIELDS = [setting.name for setting in fields(TrainConfig)]

# Every field with values it must refuse; None is good where it is a field's default.
BAD = {
    "epochs": [0, -1, 2.5, "10", True, None],
    "batch_size": [0, 64.0, None],
    "lr": [0, -1e-3, math.nan, math.inf, "fast", True],
    "lr_base": [0.0, -1, None],
    "lr_base_size": [0, 1.5],
    "min_lr": [-1e-9, math.nan],
    "warmup_epochs": [-1, 0.5, 300, 400],  # it must end before the run does
    "warmup_lr": [-1.0, "1e-6"],
    "sched_on_updates": [1, "yes", None],
    "opt": [None, 3],
    "opt_eps": [0, -1e-8],
    "weight_decay": [-0.1, math.inf],
    "decay": ["sometimes", "", None],
    "clip_grad": [0, -1.0],
    "grad_accum_steps": [0, 3, 2.0],  # 3 does not divide 1024
    "amp_dtype": ["fp16", "half", None],
    "tf32": [1, "high"],
    "channels_last": [None, "yes"],
    "grad_checkpointing": [0, None],
    "torchcompile": ["inductor"],
    "cuda_graph": ["true"],
    "drop_path": [-0.1, 1, 1.0],
    "mixup": [-0.8],
    "cutmix": [-1],
    "mixup_prob": [-0.1, 1.1],
    "mixup_switch_prob": [1.01],
    "smoothing": [-0.1, 1.0],
    "model_ema": [None, 1],
    "model_ema_decay": [1.0, -0.5],
    "model_ema_warmup": ["no"],
    "scale": [0.5, (0.1,), (0.5, 0.1), (0.0, 1.0), (0.1, 0.2, 0.3), ("a", "b"), (math.nan, 1.0), None],
    "ratio": [(4 / 3, 3 / 4), 1.0],
    "hflip": [1.5],
    "vflip": [-1],
    "color_jitter": [-0.3, "0.3"],
    "aa": [9, False],
    "train_interpolation": [None, 3],
    "reprob": [2],
    "remode": [None],
    "recount": [0],
    "aug_repeats": [0, 2.5],
    "kd_teacher": ["full", "", 1, True],
    "kd_temperature": [0, -1.0, math.inf, None],
    "task_loss_weight": [-0.1, 1.0, "half", None],
    "entry_sampling": ["small first", "", None],
    "refit_start": [1, "yes", None],
    "target": [0, 0.0, 1.01, -0.5],
    "progressive_epochs": [-1, 301, 1.5],
    "planner": ["nobody", "", "Paper", 3],
    "planner_options": [3, [], "points", {1: 2}],
    "importance": ["sometimes", None],
    "calibration_images": [0],
    "convention": ["paper", None],
    "eval_every": [0],
    "budgets": [(), (0.0,), (1.1,), (math.nan,), "half", None, 0.5],
    "expected_top1": [-1, 100.1, "80"],
    "checkpoint_hist": [0],
    "checkpoint_steps": [-1, None],
    "workers": [-1, 1.0],
    "validation_batch_size": [0],
    "bad_images": ["ignore"],
    "augment_on": ["gpu"],
    "log_interval": [0],
    "log": ["wandb", "", True],
    "seed": [-1, 2**32, 0.5, None],
}


def test_every_setting_says_what_it_means():
    for setting in fields(TrainConfig):
        assert len(setting.metadata.get("help", "")) > 10, setting.name
        assert setting.default is not MISSING, setting.name


def test_every_setting_is_checked():
    """A new field must get values here that it refuses."""
    assert sorted(BAD) == sorted(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_refusals_name_the_setting(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name} is ") as refusal:
            TrainConfig(**{name: value})
        assert len(str(refusal.value).splitlines()) == 1


def test_published_values():
    """METHOD 2, step 5."""
    config = TrainConfig()
    published = {"opt": "adamw", "weight_decay": 0.05, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0}
    published |= {"smoothing": 0.1, "aa": "rand-m9-mstd0.5-inc1", "aug_repeats": 3, "model_ema": True}
    published |= {"target": 0.875, "calibration_images": 1024, "decay": "published", "reprob": 0.25, "epochs": 300}
    assert {name: getattr(config, name) for name in published} == published
    assert config.peak_lr == 5e-4 * 1024 / 512
    assert (config.warmup, config.growing_epochs) == (5, 50)
    assert config.changed(batch_size=256).peak_lr == 2.5e-4
    assert config.changed(batch_size=256, lr=0.1).peak_lr == 0.1


@pytest.mark.parametrize(
    "epochs, warmup, growing", [(1, 0, 1), (2, 0, 1), (9, 0, 3), (10, 1, 3), (30, 3, 10), (150, 5, 50)]
)
def test_short_runs_shorten_their_phases(epochs, warmup, growing):
    config = TrainConfig(epochs=epochs)
    assert (config.warmup, config.growing_epochs) == (warmup, growing)


def test_given_phases_are_taken():
    config = TrainConfig(epochs=10, warmup_epochs=9, progressive_epochs=10)
    assert (config.warmup, config.growing_epochs) == (9, 10)
    assert TrainConfig(progressive_epochs=0).growing_epochs == 0


@pytest.mark.parametrize("bad, suggested", [("epoch", "epochs"), ("drop_paths", "drop_path"), ("mix_up", "mixup")])
def test_unknown_setting_suggests_near_names(bad, suggested):
    with pytest.raises(ValueError, match=rf"'{bad}' is unknown; near names: .*\b{suggested}\b"):
        TrainConfig().changed(**{bad: 1})


def test_unknown_setting_like_no_other():
    with pytest.raises(ValueError, match=r"'zzz' is unknown$"):
        finetune_config(zzz=1)


def test_changed_is_a_checked_copy():
    config = TrainConfig()
    assert config.changed(epochs=7).epochs == 7
    assert config.epochs == 300
    with pytest.raises(ValueError, match=r"^drop_path is 2"):
        config.changed(drop_path=2)
    with pytest.raises(FrozenInstanceError):
        config.epochs = 3


def test_to_dict_is_json_and_makes_the_same_config():
    config = TrainConfig(budgets=[1, 0.5], scale=[0.2, 1], aa="none", lr=None)
    document = json.loads(json.dumps(config.to_dict()))
    assert document == config.to_dict()
    assert sorted(document) == sorted(FIELDS)
    assert TrainConfig(**document) == config
    assert config.aa is None
    assert config.budgets == (1.0, 0.5)


def test_finetuning_as_published():
    """METHOD 3: 30 epochs, learning rate 5e-5 to 1e-6, no warm-up."""
    config = finetune_config()
    published = {"epochs": 30, "lr": 5e-5, "min_lr": 1e-6, "warmup_epochs": 0, "progressive_epochs": 0}
    rest = {"budgets": [1.0], "eval_every": 1}
    assert config.to_dict() == TrainConfig().to_dict() | published | rest
    assert (config.peak_lr, config.warmup, config.growing_epochs) == (5e-5, 0, 0)
    assert finetune_config(epochs=3).epochs == 3
    assert skd.finetune_config is finetune_config


YAML = """
# as in the README
epochs: 3
lr: 1e-4
weight-decay: 5.0e-2
budgets: [1.0, 5e-1]
model_ema: false
aa: none
lr_base: 2E-4
opt: sgd
clip_grad: null
"""


def test_settings_from_yaml(tmp_path: Path):
    """YAML 1.1 reads 1e-4, which has no dot, as a string."""
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    config = TrainConfig().changed(**read_settings(path))
    assert (config.epochs, config.lr, config.weight_decay, config.lr_base) == (3, 1e-4, 0.05, 2e-4)
    assert config.budgets == (1.0, 0.5)
    assert (config.model_ema, config.aa, config.opt, config.clip_grad) == (False, None, "sgd", None)


def test_settings_from_json(tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text('{"lr": 1e-4, "epochs": 3, "aa": null, "batch-size": 32, "ratio": [0.5, 2]}')
    config = TrainConfig().changed(**read_settings(str(path)))
    assert (config.lr, config.epochs, config.aa, config.batch_size, config.ratio) == (1e-4, 3, None, 32, (0.5, 2.0))


def test_a_run_can_be_repeated_from_its_record(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(finetune_config(seed=3).to_dict()))
    assert TrainConfig().changed(**read_settings(path)) == finetune_config(seed=3)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("run.yaml", "epochs: [1, 2", "neither JSON nor YAML"),
        ("run.json", "{'epochs': 3}", "neither JSON nor YAML"),
        ("run.yaml", "- 1\n- 2\n", "names and values"),
        ("run.yaml", "", "names and values"),
        ("run.json", "3", "names and values"),
        ("run.yaml", None, "cannot be read"),
    ],
)
def test_bad_settings_files(tmp_path: Path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_settings(path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00epochs")
    with pytest.raises(ValueError, match="cannot be read"):
        read_settings(path)
