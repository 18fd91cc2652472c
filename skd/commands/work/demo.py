"""``skd demo``: the whole method on real images in minutes."""

from __future__ import annotations

import argparse
from typing import Any

from skd import demo


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return demo.run_demo(arguments.out, seed=arguments.seed, epochs=arguments.epochs)
