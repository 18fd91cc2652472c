"""Benchmarks of accuracy: what a way to plan, train or correct sub-networks gives on images.

compare.py         command: contenders on the same networks, images and steps; resumable, hours on a CPU
contenders.py      the contenders, and which are run when
published.py       the published method with its defects, a contender
images.py          the sets of images, the order of the batches, the pre-trained networks
measuring.py       one contender on one network
counting.py        the cost in forward passes
summary.py         tables and plot
"""
