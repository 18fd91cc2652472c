"""Benchmarks: how fast the operations and the passes of the method are, next to the other ways to compute the same.

pytest benchmarks --benchmark-json benchmarks/results/cpu.json         measure everything
python -m benchmarks.op token_moments --shape 25216,36,64              one operation at a shape of yours
python -m benchmarks.memory                                            peak memory of a calibration
python -m benchmarks.input                                             images per second: the loaders and the step
python -m benchmarks.profile --model base                              the kernels of one training step
python -m benchmarks.compare OLD.json NEW.json                         did anything become slower?
benchmarks/run_on_gpu.sh OUTPUT                                        tests and all of it on a GPU, in nine minutes
python -m benchmarks.precompile FOLDER                                 what that compiles, made without a GPU
python -m benchmarks.table benchmarks/results/cpu.json --write docs/PERFORMANCE.md
"""
