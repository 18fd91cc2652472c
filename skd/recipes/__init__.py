"""Settings that come with skd: published runs as YAML files, chosen by name (``skd train --config deit_base``).

deit_tiny, deit_small, deit_base    the super-networks of the paper, from timm's DeiT
deit_finetune                       a sub-network cut out of one, fine-tuned
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from skd.support.settings import read_settings

FOLDER = Path(__file__).parent


class About(TypedDict, total=False):
    """What the section ``recipe`` of a file says.

    Attributes:
        command: the one that the settings are for, "train" or "finetune".
        model: its name in timm.
        data: what it is trained on.
        source: where the published figures are from.
        expected: these figures, one row per sub-network: {"macs", "top1", ...}.
    """

    command: str
    model: str
    data: str
    source: str
    expected: list[dict[str, object]]


@dataclass(frozen=True)
class Recipe:
    """What a file of settings holds.

    Attributes:
        settings: fields of `skd.TrainConfig` by name.
        about: what its section ``recipe`` says, where it has one.
    """

    settings: dict[str, object]
    about: About


def names() -> list[str]:
    """The recipes that come with skd."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str | os.PathLike[str]) -> Recipe:
    """A recipe by its name, or any JSON or YAML file of settings.

    Raises:
        ValueError: no such file and no recipe of that name (the message lists them), or not a file of settings.
    """
    path, shipped = Path(name), names()
    if str(name) in shipped and not path.is_file():
        path = FOLDER / f"{name}.yaml"
    elif not path.suffix and not path.exists():
        near = difflib.get_close_matches(str(name), shipped, n=1, cutoff=0.75)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"--config is {str(name)!r}; no such file, and skd has the recipes {', '.join(shipped)}{hint}"
        )
    settings = read_settings(path)
    about = settings.pop("recipe", {})
    if not isinstance(about, dict):
        raise ValueError(f"--config is {str(name)!r}; its section recipe must hold names and values")
    return Recipe(settings, cast(About, about))
