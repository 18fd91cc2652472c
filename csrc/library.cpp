// Schemas of the compiled operations; implementations register themselves, one file per operation and device.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(skd_kernels, m) {
  // Both: count, shift, weight, plain, weighted and outer sums; about the given shift, or about the mean of the tokens.
  m.def("token_moments(Tensor x, Tensor grad, Tensor shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("centred_moments(Tensor x, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("taylor_scores(Tensor x, Tensor grad, int power) -> Tensor");
  m.def("attention(Tensor qkv, float scale) -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor sums, float scale) -> Tensor");
}
