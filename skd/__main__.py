"""``python -m skd`` is the command ``skd``."""

import sys

from skd.cli import main

sys.exit(main())
