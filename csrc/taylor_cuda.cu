// Taylor scores on CUDA: sum over tokens of |x grad| or (x grad)^2, at the speed of memory.
//
// A thread adds up a few neighbouring coordinates over a range of tokens, |x grad| in float32 over 64 tokens and in
// float64 across them. Blocks write partial sums, which a second kernel adds up in a fixed order: no atomics, the
// same bits every time on the same kind of device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cuda_common.h"
#include "taylor_kernel.h"

namespace skd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T, int V, bool Squared>
void run(TaylorInput in, const Tensor& scores, const OnDevice& device) {
  const int64_t vectors = (in.dims + V - 1) / V;
  in.lanes = taylor_lanes(vectors);
  const int64_t columns = (vectors + in.lanes - 1) / in.lanes, rows = kTaylorThreads / in.lanes;
  STD_TORCH_CHECK(columns < (int64_t(1) << 31), "taylor_scores: too many coordinates");
  // One wave of blocks, with at least one unrolled step for each.
  const int64_t capacity = device.capacity<taylor_of_block<T, V, Squared>>(kTaylorThreads);
  const int64_t most = std::min<int64_t>(65535, (in.tokens + rows * kTaylorUnroll - 1) / (rows * kTaylorUnroll));
  in.splits = std::clamp<int64_t>(capacity / columns, 1, most);

  const Tensor partial = torch::stable::new_empty(scores, {in.splits, in.dims});
  double* const sums = partial.mutable_data_ptr<double>();
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(in.splits));
  taylor_of_block<T, V, Squared><<<grid, kTaylorThreads, 0, device.stream()>>>(in, sums);
  check_cuda(cudaGetLastError(), "taylor_scores");
  taylor_of_coordinate<<<static_cast<unsigned>((in.dims + kTaylorTile - 1) / kTaylorTile),
                         dim3(kTaylorTile, kTaylorRows), 0, device.stream()>>>(sums, in.splits, in.dims,
                                                                               scores.mutable_data_ptr<double>());
  check_cuda(cudaGetLastError(), "taylor_scores");
}

template <typename T>
void run_dtype(const TaylorInput& in, bool squared, bool aligned, const Tensor& scores, const OnDevice& device) {
  constexpr int V = 16 / sizeof(T);
  if (aligned)
    squared ? run<T, V, true>(in, scores, device) : run<T, V, false>(in, scores, device);
  else
    squared ? run<T, 1, true>(in, scores, device) : run<T, 1, false>(in, scores, device);
}

// x, grad (T, D) with unit stride along D. Returns (D) float64.
Tensor taylor_scores_cuda(const Tensor& x, const Tensor& grad, int64_t power) {
  STD_TORCH_CHECK(x.dim() == 2 && grad.dim() == 2, "taylor_scores: wrong number of dimensions");
  const int64_t tokens = x.size(0), dims = x.size(1);
  STD_TORCH_CHECK(grad.size(0) == tokens && grad.size(1) == dims, "taylor_scores: grad is not like x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "taylor_scores: grad has another dtype than x");
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == x.get_device_index(),
                  "taylor_scores: tensors on different devices");
  STD_TORCH_CHECK(power == 1 || power == 2, "taylor_scores: power is ", power, "; it may be 1 or 2");
  const OnDevice device(x);
  if (tokens == 0 || dims == 0) return torch::stable::new_zeros(x, {dims}, ScalarType::Double);
  STD_TORCH_CHECK((x.stride(1) == 1 && grad.stride(1) == 1) || dims == 1,
                  "taylor_scores: x and grad must have unit stride along the last dimension");
  const Tensor scores = torch::stable::new_empty(x, {dims}, ScalarType::Double);
  const TaylorInput in{x.const_data_ptr(), grad.const_data_ptr(), x.stride(0), grad.stride(0), tokens, dims, 0, 0};
  const bool squared = power == 2, aligned = is_aligned(x) && is_aligned(grad);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run_dtype<float>(in, squared, aligned, scores, device);
      break;
    case ScalarType::BFloat16:
      run_dtype<BFloat16>(in, squared, aligned, scores, device);
      break;
    case ScalarType::Half:
      run_dtype<Float16>(in, squared, aligned, scores, device);
      break;
    default:
      STD_TORCH_CHECK(false, "taylor_scores: unsupported dtype on CUDA");
  }
  return scores;
}

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CUDA, m) { m.impl("taylor_scores", TORCH_BOX(&skd::taylor_scores_cuda)); }
