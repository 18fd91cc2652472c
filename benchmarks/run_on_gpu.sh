#!/usr/bin/env bash
# usage: benchmarks/run_on_gpu.sh OUTPUT_DIR [check|speed]
# Builds the package in place (no network needed), then asks in order: are the kernels right (GPU tests; small runs of
# each under compute-sanitizer, where that is installed), are they near the vendor's libraries (benchmarks.quick), and
# how do whole operations and training steps compare with the other ways. Leaves JSON, table.md and logs.tar.gz in
# OUTPUT_DIR and prints short tables last; a step that fails does not stop the next ones, but the exit status tells.
# It takes about 570 seconds at most, or TOTAL_SECONDS: the last steps are cut short, and keep what they have measured.
# `check` and `speed` are its two halves, for two calls where one is too short, each with an OUTPUT_DIR of its own.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:?usage: benchmarks/run_on_gpu.sh OUTPUT_DIR [check|speed]} half=${2:-all} total=${TOTAL_SECONDS:-570}
case $half in all | check | speed) ;; *) echo "the second argument may be check or speed" >&2 && exit 2 ;; esac
mkdir -p "$output"
output=$(cd "$output" && pwd)
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1 SKD_CUDA=on CUBLAS_WORKSPACE_CONFIG=:4096:8
capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$capability")} || exit 1
export TORCH_CUDA_ARCH_LIST
rm -f "$output/failed"

# step NAME SECONDS COMMAND...: run it with a time limit, its output in OUTPUT_DIR/NAME.log and its end on the screen.
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [ "$limit" -le $((total - SECONDS)) ] || limit=$((total - SECONDS))
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left"
    echo "$name" >>"$output/failed"
    return
  fi
  # An interrupted pytest still writes the results it has.
  timeout -s INT -k 8 "$limit" "$@" >"$output/$name.log" 2>&1
  local status=$?
  tail -n 3 "$output/$name.log"
  echo "== $name: status $status, $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || echo "$name" >>"$output/failed"
}

# some_tests KEYWORDS FILE: its GPU tests; none with these keywords is no failure. Cores are for the compilers.
some_tests() {
  OMP_NUM_THREADS=1 python3 -m pytest -q -p no:cacheprovider -m gpu -k "$1" "$2"
  local status=$?
  [ "$status" -eq 5 ] || return "$status"
}
export -f some_tests

# watched TOOL NAME COMMAND...: the same under compute-sanitizer.
watched() {
  local tool=$1 name=$2
  shift 2
  local options=(--tool "$tool" --error-exitcode 1)
  # What a library asks of the driver in vain is no error of a kernel's.
  [ "$tool" != memcheck ] || options+=(--report-api-errors no)
  step "$tool-$name" 70 "$sanitizer" "${options[@]}" "$@"
}

step build 70 python3 -m pip install --no-deps --no-build-isolation -e .
python3 -c "import json, skd_kernels; print(json.dumps(skd_kernels.build_info(), indent=1))" >"$output/build_info.log"
if [ "$half" != speed ]; then
  # Compiling takes longest, about a second a kernel, of which a dtype has 130: in parts of about 50, side by side.
  for file in tests/test_gpu*.py; do
    dtypes=("not dtype") parts=(test)
    ! grep -q 'parametrize.*dtype' "$file" || dtypes=(dtype0 dtype1 dtype2 "not dtype")
    ! grep -q 'def test_real_sizes' "$file" || parts=(real_sizes odd_shapes "not real_sizes and not odd_shapes")
    for dtype in "${dtypes[@]}"; do
      for part in "${parts[@]}"; do
        name=$(basename "$file" .py)-$dtype-$part
        step "${name// /-}" 100 bash -c 'some_tests "$@"' _ "$dtype and $part" "$file" &
      done
    done
  done
  wait
  if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
    for tool in memcheck racecheck; do
      for dtype in float32 bfloat16; do
        for case in "token_moments 300,3,64" "token_moments 70,2,40" "taylor_scores 300,200"; do
          read -r operation shape <<<"$case"
          watched "$tool" "$operation-${shape//,/x}-$dtype" python3 -m benchmarks.op "$operation" --shape "$shape" \
            --dtype "$dtype" --device cuda --contenders ours --rounds 1 --seconds 0 --megabytes 1 &
        done
        for case in "masked_mlp odd" "masked_mlp aligned" "masked_mlp gated" "masked_attention odd" \
          "masked_attention aligned"; do
          read -r operation sizes <<<"$case"
          [ "$dtype $sizes" != "float32 aligned" ] || continue # the same tiles as odd
          watched "$tool" "$operation-$sizes-$dtype" python3 -m benchmarks.small "$operation" --sizes "$sizes" \
            --dtype "$dtype" &
        done
      done
    done
    wait
  else
    echo "== compute-sanitizer is not installed"
  fi
fi
if [ "$half" != check ]; then
  step quick 60 python3 -m benchmarks.quick --model base --model small --json "$output/quick.json"
  # Each model in a run of its own: where one ends before its time, the others do not.
  for run in "base 130" "small 100" "tiny 80"; do
    read -r model limit <<<"$run"
    step "steps-$model" "$limit" python3 -m pytest -q benchmarks/test_steps.py -k "$model" \
      --benchmark-json "$output/gpu-steps-$model.json"
  done
  step masked 130 python3 -m pytest -q benchmarks/test_masked.py --benchmark-json "$output/gpu-masked.json"
  step statistics 90 python3 -m pytest -q benchmarks/test_operations.py --benchmark-json "$output/gpu.json"
fi
[ ! -e "$output/quick.log" ] || cat "$output/quick.log"
for result in "$output"/gpu*.json; do
  [ ! -s "$result" ] || python3 -m benchmarks.table "$result"
done | tee "$output/table.md"
(cd "$output" && tar -czf logs.tar.gz ./*.log && rm ./*.log)
if [ -e "$output/failed" ]; then
  echo "FAILED: $(sort "$output/failed" | paste -sd ' ')"
  rm "$output/failed"
  exit 1
fi
