"""``python -m skd`` is the command ``skd``."""

import sys

try:
    from skd.support.process import program

    status = program()
except KeyboardInterrupt:  # in the moment before `program` listens
    print("error: interrupted", file=sys.stderr)
    status = 130  # what a shell reports of a process that Ctrl-C ended
sys.exit(status)
