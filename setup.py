"""Builds the compiled extensions of `skd_kernels` from csrc/; everything else is in pyproject.toml.

Nothing is compiled yet: extensions are added to `ext_modules` here when csrc/ has sources.
"""

from setuptools import setup

setup(ext_modules=[])
