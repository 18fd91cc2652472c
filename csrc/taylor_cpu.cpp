// Taylor scores on the CPU: sum over tokens of |x grad| or (x grad)^2, at the speed of memory.
//
// Tokens are cut into a fixed number of ranges, so the result does not depend on the number of threads. Sums are
// float32 over 64 tokens and float64 across them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu_common.h"

namespace skd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 64;    // tokens summed in float32
constexpr int64_t kUnroll = 4;    // tokens added at a time: a quarter of the traffic to the sums
constexpr int64_t kPage = 4096;   // bytes
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kTokensPerTask = 256;

template <bool Squared, typename A>
SKD_INLINE A term(A x, A grad) {
  const A product = x * grad;
  return Squared ? product * product : std::abs(product);
}

// Rows are read one after the other, as one stream that the processor prefetches. Long rows of float32 and float64
// are read kUnroll at a time, because their sums would otherwise be loaded and stored as often as the rows
// themselves.
template <bool Squared, typename T, typename A>
SKD_INLINE void add_rows(const T* x, const T* grad, int64_t x_stride, int64_t grad_stride, int64_t tokens, int64_t dims,
                         A* sum) {
  int64_t t = 0;
  if (sizeof(T) >= sizeof(float) && dims * int64_t(sizeof(T)) >= kPage)
    for (; t + kUnroll <= tokens; t += kUnroll, x += kUnroll * x_stride, grad += kUnroll * grad_stride)
      for (int64_t d = 0; d < dims; ++d)
        sum[d] += (term<Squared, A>(load(x[d]), load(grad[d])) +
                   term<Squared, A>(load(x[d + x_stride]), load(grad[d + grad_stride]))) +
                  (term<Squared, A>(load(x[d + 2 * x_stride]), load(grad[d + 2 * grad_stride])) +
                   term<Squared, A>(load(x[d + 3 * x_stride]), load(grad[d + 3 * grad_stride])));
  for (; t < tokens; ++t, x += x_stride, grad += grad_stride)
    for (int64_t d = 0; d < dims; ++d) sum[d] += term<Squared, A>(load(x[d]), load(grad[d]));
}

#define SKD_ADD(T, A)                                                                                                 \
  SKD_CLONES void add(const T* x, const T* grad, int64_t x_stride, int64_t grad_stride, int64_t tokens, int64_t dims,  \
                      A* sum) {                                                                                       \
    add_rows<false, T, A>(x, grad, x_stride, grad_stride, tokens, dims, sum);                                         \
  }                                                                                                                   \
  SKD_CLONES void add_squares(const T* x, const T* grad, int64_t x_stride, int64_t grad_stride, int64_t tokens,        \
                              int64_t dims, double* sum) {                                                            \
    add_rows<true, T, double>(x, grad, x_stride, grad_stride, tokens, dims, sum);                                     \
  }
SKD_ADD(float, float)
SKD_ADD(BFloat16, float)
SKD_ADD(Float16, float)
SKD_ADD(double, double)

// Sums of type A within a block of tokens, by `add_block`; float64 across blocks.
template <typename T, typename A, typename Add>
void sum_tokens(const Tensor& x, const Tensor& grad, double* scores, Add add_block) {
  const int64_t tokens = x.size(0), dims = x.size(1);
  const int64_t splits = std::clamp<int64_t>(tokens / kTokensPerTask, 1, kMaxSplits);
  std::vector<double> partial(splits * dims, 0.0);
  std::atomic<int64_t> taken{0};  // in turn: a thread that starts late or is slow does less
  torch::stable::parallel_for(0, splits, 1, [&](int64_t, int64_t) {
    std::vector<A> sum(dims);
    for (int64_t split; (split = taken++) < splits;) {
      const int64_t last = tokens * (split + 1) / splits;
      for (int64_t token = tokens * split / splits; token < last; token += kBlock) {
        std::fill(sum.begin(), sum.end(), A(0));
        add_block(static_cast<const T*>(x.const_data_ptr()) + token * x.stride(0),
                  static_cast<const T*>(grad.const_data_ptr()) + token * grad.stride(0), x.stride(0), grad.stride(0),
                  std::min(kBlock, last - token), dims, sum.data());
        for (int64_t d = 0; d < dims; ++d) partial[split * dims + d] += sum[d];
      }
    }
  });
  for (int64_t split = 0; split < splits; ++split)
    for (int64_t d = 0; d < dims; ++d) scores[d] += partial[split * dims + d];
}

// Squares of small products underflow in float32, so they are formed and summed in float64.
template <typename T, typename A>
void run(const Tensor& x, const Tensor& grad, bool squared, double* scores) {
  if (squared)
    sum_tokens<T, double>(x, grad, scores, [](auto... arguments) { add_squares(arguments...); });
  else
    sum_tokens<T, A>(x, grad, scores, [](auto... arguments) { add(arguments...); });
}

// x, grad (T, D) with unit stride along D. Returns (D) float64.
Tensor taylor_scores_cpu(const Tensor& x, const Tensor& grad, int64_t power) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 2 && grad.dim() == 2, "taylor_scores: wrong number of dimensions");
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == x.size(1) && grad.scalar_type() == x.scalar_type(),
                  "taylor_scores: grad is not like x");
  STD_TORCH_CHECK(power == 1 || power == 2, "taylor_scores: power must be 1 or 2, got ", power);
  STD_TORCH_CHECK((x.stride(1) == 1 && grad.stride(1) == 1) || x.size(1) < 2 || x.size(0) == 0,
                  "taylor_scores: x and grad must have unit stride along the last dimension");
  Tensor scores = torch::stable::new_zeros(x, {x.size(1)}, ScalarType::Double);
  double* out = scores.mutable_data_ptr<double>();
  switch (x.scalar_type()) {
    case ScalarType::Float: run<float, float>(x, grad, power == 2, out); break;
    case ScalarType::Double: run<double, double>(x, grad, power == 2, out); break;
    case ScalarType::BFloat16: run<BFloat16, float>(x, grad, power == 2, out); break;
    case ScalarType::Half: run<Float16, float>(x, grad, power == 2, out); break;
    default: STD_TORCH_CHECK(false, "taylor_scores: unsupported dtype");
  }
  return scores;
}

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CPU, m) { m.impl("taylor_scores", TORCH_BOX(&skd::taylor_scores_cpu)); }
