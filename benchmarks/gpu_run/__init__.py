"""The run on a machine with a GPU, and what is made for it beforehand on one without.

    on_gpu.py     the parts of the run; started by run_on_gpu.sh
    limited.py    commands with a time limit each, and one for all of them
    small.py      small, checked runs of the Triton kernels, for compute-sanitizer
    prebuilt.py   what `benchmarks.precompile` leaves in a folder, and how the run puts it to use
    pretend.py    a CUDA device that is not there: which kernels would a program start?

The process that starts the commands imports no PyTorch before they have ended, so that it holds no memory of the GPU.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
