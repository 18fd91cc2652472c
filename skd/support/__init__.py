"""What the rest of skd stands on:

    types         types that many files use; imports no torch
    settings      every setting of a run, with the published value of each; imports no torch
    requirements  what skd needs, said at its first import if it is missing
    process       the process ``skd``: its first import, Ctrl-C, its last line
    outputs       files and folders that are written: checked first, and whole or not at all
    checks        of arguments that many functions take; imports no torch
    clocks        calls timed in turn, and what they were timed on
    devices       the device that was asked for
    ranks         several processes: sums, broadcasts, and ranks that fail
    taps          checked batches, frozen networks, features with their gradients
    regression    ridge regression from sums over the rows
    curve         sizes and accuracies over a dropout list
    plots         curves and lists as pictures

Importing this package imports none of them.
"""
