"""Benchmarks: how fast the operations and the passes of the method are, next to the other ways to compute the same.

README.md says which command answers which question. The files:

    registry.py          WHAT is measured: every operation, its shapes, bytes, FLOPs and contenders
    contenders.py        the other ways to compute an operation: eager, blocked, slices, published, torch.compile
    measure.py           checks every contender of an operation, then times all of them
    timing.py            HOW: sizes of a run, clocks, contenders in turn, ceilings of the device, memory, provenance
    op.py                command: one operation at a shape of yours
    quick.py             command: the Triton kernels next to the vendor's libraries
    registers.py         command: registers, spills and shared memory of every Triton kernel, without a GPU
    steps.py             the ways to take a whole training step
    profile.py           command: the kernels of a training step
    calibration.py       the published conversion; command: peak memory of a calibration
    test_operations.py   suite of pytest: the operations
    test_steps.py        suite: a training step
    test_passes.py       suite: the passes of the method
    conftest.py          what the JSON of a suite says of the machine
    compare.py           command: did anything become slower?
    table/               command: the tables of README.md and docs/PERFORMANCE.md, from results/
    training/            commands: whole runs on data, loaders, several processes
    run_on_gpu.sh        command: the tests and all of it on a GPU, in nine minutes
    gpu_run/             the parts of that run
    precompile.py        command: what that compiles, made without a GPU
    results/             what was measured
"""
