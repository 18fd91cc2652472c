#!/usr/bin/env bash
# Builds skd and runs its tests under the oldest PyTorch and Triton that it supports and under the newest.
# usage: tests/environments.sh FOLDER [oldest|newest]...      default: both
# Each environment is a new virtual environment in FOLDER, of PYTHON (default: python3; 3.12 has wheels of both), and
# the extension is built against its own PyTorch. FOLDER/NAME.log has everything, the screen a line for each: versions,
# counts, seconds. What is tested is the last commit. In the end each wheel runs in the other environment: one build
# serves every PyTorch from 2.11 on. Needs a network and about 8 GB of disk for each. The exit status is 1 if anything
# failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: tests/environments.sh FOLDER [oldest|newest]...}
shift
[ $# -gt 0 ] || set -- oldest newest
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1 OMP_NUM_THREADS=1 MPLBACKEND=Agg
failed=0

# The packages that make an environment what it is. Triton 3.6's interpreter needs an older NumPy.
packages() {
  case $1 in
    oldest) echo "torch==2.11.* torchvision==0.26.* triton==3.6.* numpy<2.4" ;;
    newest) echo "torch torchvision" ;;
    *) echo "unknown environment: $1" >&2 && return 1 ;;
  esac
}

# The tests of what is compiled, with the packages of environment $1 and the checkout beside them.
compiled_tests() {
  (cd "$folder/checkout" && "$folder/$1/bin/pytest" -q -p no:cacheprovider \
    tests/kernels/test_statistics_operations.py tests/kernels/test_moments.py tests/kernels/test_attention_compiled.py)
}

rm -rf "$folder/checkout" "$folder"/wheel-*
git clone --quiet "$root" "$folder/checkout" || exit 1
for name in "$@"; do
  pinned=$(packages "$name") || exit 2
  read -ra pinned <<<"$pinned"
  log=$folder/$name.log start=$SECONDS
  {
    "${PYTHON:-python3}" -m venv --clear "$folder/$name" &&
      "$folder/$name/bin/pip" install --quiet "${pinned[@]}" ninja pybind11 'setuptools>=77' wheel &&
      "$folder/$name/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/wheel-$name" \
        "$folder/checkout" &&
      "$folder/$name/bin/pip" install --quiet "${pinned[@]}" "$(ls "$folder/wheel-$name"/*.whl)[test]" &&
      "$folder/$name/bin/python" -P -c "import json, skd_kernels; print(json.dumps(skd_kernels.build_info(), indent=1))" &&
      (cd "$folder/checkout" && "$folder/$name/bin/pytest" -q -p no:cacheprovider -n 2 --dist loadfile)
  } >"$log" 2>&1 || failed=1
  versions=$("$folder/$name/bin/pip" list 2>/dev/null | awk '/^(torch|triton|timm|numpy) /{printf "%s %s, ", $1, $2}')
  echo "$name: $("$folder/$name/bin/python" --version), $versions$(tail -n 1 "$log"), $((SECONDS - start)) s in all"
done
if [ $# -eq 2 ]; then
  for pair in "oldest newest" "newest oldest"; do
    read -r built runs <<<"$pair"
    "$folder/$runs/bin/pip" install --quiet --no-deps --force-reinstall "$folder/wheel-$built"/*.whl || failed=1
    compiled_tests "$runs" >"$folder/$built-under-$runs.log" 2>&1 || failed=1
    echo "built with the $built, run under the $runs: $(tail -n 1 "$folder/$built-under-$runs.log")"
  done
fi
exit $failed
