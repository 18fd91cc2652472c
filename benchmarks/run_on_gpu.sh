#!/usr/bin/env bash
# usage: benchmarks/run_on_gpu.sh OUTPUT_DIR
# Installs the package as it stands (no network needed), runs the GPU tests and the benchmarks, leaves JSON and logs in
# OUTPUT_DIR, and prints a short table last. compute-sanitizer joins when there are kernels of our own to check.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:?usage: benchmarks/run_on_gpu.sh OUTPUT_DIR}
mkdir -p "$output"

python3 -m pip install --quiet --no-deps --no-build-isolation .
python3 -c "import json, skd_kernels; print(json.dumps(skd_kernels.build_info(), indent=1))" | tee "$output/build_info.json"
python3 -m pytest -m gpu tests 2>&1 | tee "$output/tests.log"
python3 -m pytest benchmarks --benchmark-json "$output/passes.json" 2>&1 | tee "$output/benchmarks.log"
