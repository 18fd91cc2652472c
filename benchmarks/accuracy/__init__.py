"""Benchmarks of accuracy: what a way to plan, train or correct sub-networks gives on images.

compensation.py    command: sub-networks without training, with and without `skd.compensate`, on Fashion-MNIST
"""
