"""``python -m skd`` is the command ``skd``."""

import sys

from skd.cli import program

sys.exit(program())
