"""``python -m skd`` is the command ``skd``."""

import sys

from skd.support.process import program

sys.exit(program())
