"""``python -m skd`` is the command ``skd``."""

import sys

from skd.process import program

sys.exit(program())
