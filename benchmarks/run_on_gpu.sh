#!/usr/bin/env bash
# usage: benchmarks/run_on_gpu.sh OUTPUT [--prebuilt FOLDER] [--part NAME]... [--seconds N] [--rehearse]
# Is it right on this GPU, and how fast is it? Builds, tests and measures within nine minutes and leaves JSON, logs and
# tables in OUTPUT; no network is needed. benchmarks/on_gpu.py says what the parts are. With a FOLDER that
# `python -m benchmarks.precompile` made beforehand, nothing is compiled here.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# -P: a folder named benchmarks in the current one is not meant.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -P -m benchmarks.on_gpu "$@"
