"""``python -m skd`` is the command ``skd``."""

import sys

try:
    from skd.support.process import INTERRUPTED, program

    status = program()
except KeyboardInterrupt:  # in the moment before `program` listens
    print("error: interrupted", file=sys.stderr)
    status = INTERRUPTED
sys.exit(status)
