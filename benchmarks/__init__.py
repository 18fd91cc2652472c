"""Benchmarks: the speed of the operations and of the method's passes, compared with other ways to compute the same.

README.md says which command answers which question. The files:

    registry.py             WHAT is measured: every operation, its shapes, work and contenders
    timing.py               HOW: sizes of a run, clocks, contenders in turn, ceilings, memory, provenance
    conftest.py             what the JSON of a suite says of the machine

    op.py                   checks and times one operation; command: at a shape of yours
    test_operations.py      suite of pytest: the operations
    quick.py                command: the Triton kernels next to the vendor's libraries
    steps.py                the ways to take a whole training step; command: the kernels of a step
    test_steps.py           suite: a training step
    test_passes.py          suite: the passes of the method

    run_on_gpu.sh           command: the tests and all of it on a GPU, in nine minutes
    on_gpu.py               the parts of that run
    precompile.py           command: what that run compiles, made without a GPU
    pretend.py              a pretended CUDA device, to find out which kernels a program would start
    step_kernels.py         command: the kernels of a step and the bytes of their tensors, without a GPU
    registers.py            command: registers, spills and shared memory of every Triton kernel, without a GPU

    results/                what was measured
    result.py               reads a result; cells of tables
    table.py                command: the tables of docs/PERFORMANCE.md
    kernel_tables.py        command: the tables of docs/KERNELS.md
    short.py                the short tables at its top, and the sentences below them

    train_fashion_mnist.py  command: every stage of the method on Fashion-MNIST, 40 minutes on a CPU
    train_importance.py     command: ``importance="online"`` against passes over calibration images
    latency.py              command: latencies of sub-networks, predicted against measured
    train_throughput.py     command: images per second of the loaders, and of one and several processes

    accuracy/               commands: what sub-networks get right
"""
