#!/usr/bin/env bash
# usage: benchmarks/run_on_gpu.sh OUTPUT [--prebuilt FOLDER] [--part NAME]... [--seconds N] [--rehearse]
# Is it right on this GPU, and how fast is it? Builds, tests and measures within nine minutes and leaves JSON, logs and
# tables in OUTPUT; no network is needed. benchmarks/on_gpu.py says what the parts are. With a FOLDER that
# `python -m benchmarks.precompile` made beforehand, nothing is compiled here.
set -euo pipefail
output=$(realpath -m "${1:?usage: benchmarks/run_on_gpu.sh OUTPUT [--prebuilt FOLDER] [--part NAME]... [--rehearse]}")
shift
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.on_gpu "$output" "$@"
