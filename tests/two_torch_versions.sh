#!/usr/bin/env bash
# Builds one wheel against the newest torch and runs it under the oldest supported one (2.11) and the newest.
# Needs a network and several GB of disk: usage: tests/two_torch_versions.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: tests/two_torch_versions.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

python3 -m venv "$folder/builder"
"$folder/builder/bin/pip" wheel --quiet --no-deps --wheel-dir "$folder/wheel" "$root"
for torch in "torch==2.11.*" torch; do
  python3 -m venv --clear "$folder/runner"
  "$folder/runner/bin/pip" install --quiet --no-compile "$torch" numpy
  "$folder/runner/bin/pip" install --quiet --no-deps "$folder"/wheel/skd-*.whl
  (cd "$folder" && "$folder/runner/bin/python" - <<'PY'
import torch
import skd_kernels as kernels

x, grad = torch.randn(2, 300, 6, 32), torch.randn(2, 300, 6, 32)
with kernels.use("compiled"):
    compiled = kernels.weighted_covariance(x, grad), kernels.taylor_scores(x, grad)
with kernels.use("reference"):
    reference = kernels.weighted_covariance(x, grad), kernels.taylor_scores(x, grad)
for a, b in zip(compiled, reference):
    assert (a - b).norm() <= 1e-6 * b.norm()
info = kernels.build_info()
print(f"ok: built with torch {info['built_with_torch']}, runs under {torch.__version__}")
PY
  )
done
