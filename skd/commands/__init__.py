"""The subcommands of ``skd``, one file each: ``add`` describes its arguments, ``run`` does it.

What ``run`` returns is what ``--json`` writes.
"""
