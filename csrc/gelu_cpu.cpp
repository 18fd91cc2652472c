// GELU and its gradient on the CPU, float32: z below(z), with below the normal distribution function.
//
// The gradient is below(z) + z density(z): one exponential gives both. On its way back it can add up Taylor scores
// |h dh| of every column (METHOD 2), since both factors pass by. Sums are float32 over 64 tokens, float64 across them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu_math.h"

namespace skd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 64;  // tokens whose scores are summed in float32
constexpr int64_t kTokensPerTask = 128;
constexpr int64_t kElementsPerTask = 32768;

SKD_CLONES void forward(const float* z, int64_t count, float* h) {
  for (int64_t i = 0; i < count; ++i) h[i] = z[i] * normal(z[i]).below;
}

SKD_CLONES void backward(const float* z, const float* grad, int64_t count, float* dz) {
  for (int64_t i = 0; i < count; ++i) {
    const Normal n = normal(z[i]);
    dz[i] = grad[i] * (n.below + z[i] * n.density);
  }
}

SKD_CLONES void backward_scored(const float* z, const float* grad, int64_t count, float* dz, float* sum) {
  for (int64_t i = 0; i < count; ++i) {
    const Normal n = normal(z[i]);
    dz[i] = grad[i] * (n.below + z[i] * n.density);
    sum[i] += std::abs(z[i] * n.below * grad[i]);
  }
}

// z contiguous.
Tensor gelu_cpu(const Tensor& z) {
  STD_TORCH_CHECK(z.scalar_type() == torch::headeronly::ScalarType::Float && z.is_contiguous(),
                  "gelu: z must be float32 and contiguous");
  Tensor h = torch::stable::empty_like(z);
  const float* from = z.const_data_ptr<float>();
  float* to = h.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, z.numel(), kElementsPerTask,
                              [&](int64_t begin, int64_t end) { forward(from + begin, end - begin, to + begin); });
  return h;
}

// z and grad (T, D), contiguous. Returns dz, and the scores (D) in float64 (no elements if they are not wanted).
std::tuple<Tensor, Tensor> gelu_backward_cpu(const Tensor& z, const Tensor& grad, bool scored) {
  STD_TORCH_CHECK(z.dim() == 2 && z.scalar_type() == torch::headeronly::ScalarType::Float && z.is_contiguous() &&
                      grad.scalar_type() == z.scalar_type() && grad.is_contiguous() && grad.numel() == z.numel(),
                  "gelu_backward: z and grad must be alike, (T, D), float32 and contiguous");
  const int64_t tokens = z.size(0), dims = z.size(1);
  Tensor dz = torch::stable::empty_like(z);
  Tensor scores = torch::stable::new_zeros(z, {scored ? dims : 0}, torch::headeronly::ScalarType::Double);
  const float *z_data = z.const_data_ptr<float>(), *grad_data = grad.const_data_ptr<float>();
  float* dz_data = dz.mutable_data_ptr<float>();
  if (!scored) {
    torch::stable::parallel_for(0, z.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      backward(z_data + begin, grad_data + begin, end - begin, dz_data + begin);
    });
    return {dz, scores};
  }
  // Cut by the shape alone: the sums do not depend on the number of threads.
  const int64_t tasks = (tokens + kTokensPerTask - 1) / kTokensPerTask;
  std::vector<double> partial(tasks * dims, 0.0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(dims);
    for (int64_t task = begin; task < end; ++task)
      for (int64_t first = task * kTokensPerTask; first < std::min((task + 1) * kTokensPerTask, tokens); first += kBlock) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t t = first; t < std::min({first + kBlock, (task + 1) * kTokensPerTask, tokens}); ++t)
          backward_scored(z_data + t * dims, grad_data + t * dims, dims, dz_data + t * dims, sum.data());
        for (int64_t d = 0; d < dims; ++d) partial[task * dims + d] += sum[d];
      }
  });
  double* out = scores.mutable_data_ptr<double>();
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t d = 0; d < dims; ++d) out[d] += partial[task * dims + d];
  return {dz, scores};
}

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CPU, m) {
  m.impl("gelu", TORCH_BOX(&skd::gelu_cpu));
  m.impl("gelu_backward", TORCH_BOX(&skd::gelu_backward_cpu));
}
