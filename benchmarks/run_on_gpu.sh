#!/usr/bin/env bash
# usage: benchmarks/run_on_gpu.sh OUTPUT_DIR
# Builds the package in place (no network needed), runs the GPU tests, a tiny run of each kernel under compute-sanitizer
# where that is installed, and the benchmarks. Leaves JSON and logs in OUTPUT_DIR and prints a short table last; a step
# that fails does not stop the next ones, but the exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:?usage: benchmarks/run_on_gpu.sh OUTPUT_DIR}
mkdir -p "$output"
output=$(cd "$output" && pwd)
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1 SKD_CUDA=on
capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$capability")} || exit 1
export TORCH_CUDA_ARCH_LIST
rm -f "$output/failed"

# step NAME SECONDS COMMAND...: run it with a time limit, its output in OUTPUT_DIR/NAME.log and its end on the screen.
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$output/$name.log" 2>&1
  local status=$?
  tail -n 3 "$output/$name.log"
  echo "== $name: status $status, $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || echo "$name" >>"$output/failed"
}

step build 180 python3 -m pip install --no-deps --no-build-isolation -e .
step build_info 30 python3 -c "import json, skd_kernels; print(json.dumps(skd_kernels.build_info(), indent=1))"
step tests 60 python3 -m pytest -q -m gpu tests
if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  for tool in memcheck racecheck; do
    for case in "token_moments 300,3,64" "token_moments 70,2,40" "taylor_scores 300,200"; do
      read -r operation shape <<<"$case"
      for dtype in float32 bfloat16; do
        step "$tool-$operation-${shape//,/x}-$dtype" 90 "$sanitizer" --tool "$tool" --error-exitcode 1 \
          python3 -m benchmarks.op "$operation" --shape "$shape" --dtype "$dtype" --device cuda --contenders ours \
          --rounds 1 --seconds 0 --megabytes 1 &
      done
    done
  done
  wait
else
  echo "== compute-sanitizer is not installed"
fi
step benchmarks 210 python3 -m pytest -q benchmarks --benchmark-json "$output/gpu.json"
python3 -m benchmarks.table "$output/gpu.json" | tee "$output/table.md"
if [ -e "$output/failed" ]; then
  echo "FAILED: $(sort "$output/failed" | paste -sd ' ')"
  exit 1
fi
