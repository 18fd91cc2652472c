// The Python module: importing it registers the operations; it exposes what is not a tensor.

#include <pybind11/pybind11.h>

#include "cpu_common.h"

namespace {

#define SKD_STRING2(x) #x
#define SKD_STRING(x) SKD_STRING2(x)

const char* cpu_level() {
  switch (skd::register_bytes()) {
    case 64: return skd::multiplies_pairs() ? "x86-64-v4, avx512bf16" : "x86-64-v4";
    case 32: return "x86-64-v3";
    default: return "default";
  }
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " SKD_STRING(__clang_major__) "." SKD_STRING(__clang_minor__);
#else
  info["compiler"] = "g++ " SKD_STRING(__GNUC__) "." SKD_STRING(__GNUC_MINOR__);
#endif
  info["built_with_torch"] = SKD_BUILT_WITH_TORCH;
  info["cpu_levels"] = SKD_CPU_LEVELS;
  info["cpu_level_in_use"] = cpu_level();
#ifdef USE_CUDA
  info["cuda"] = true;
  info["cuda_toolkit"] = SKD_CUDA_TOOLKIT;
  info["cuda_architectures"] = SKD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_toolkit"] = "";
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of skd_kernels.";
  m.def("build_info", &build_info, "What was compiled, with what, for what.");
}
