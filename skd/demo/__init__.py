"""``skd demo``: the whole method on scikit-learn's digits, in minutes.

running    trains the stand-in for a pre-trained network, converts, trains, plans, cuts; writes the files
report     what it prints and draws
baselines  simpler orders of coordinates, which the conversion is compared with
"""
