// Weighted moments of tokens on CUDA: one pass over the features and gradients.
//
// For every group g of D coordinates, with y = x - shift and w = mean_d |x grad| of a token:
//   weight[g] = sum w,  plain[g] = sum y,  weighted[g] = sum w y
//   outer[g] = sum w y y^T = sum (sqrt(w) y) (sqrt(w) y)^T
//
// A thread block owns one group and a range of tokens. It stages sqrt(w) y in shared memory as the sum of two bf16
// numbers and multiplies those on the matrix units: float32 accuracy to about 4e-6, where a single bf16 loses 1e-3.
// Loads of the next tokens are in flight meanwhile. Blocks write partial sums, which a second kernel adds up in a
// fixed order in float64: no atomics, the same bits every time on the same kind of device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cuda_common.h"
#include "moments_kernel.h"

namespace skd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostTokens = 65536;  // of a block

struct Results {
  Tensor weight, plain, weighted, outer;
};

template <typename T, int P>
void run(MomentsInput in, const Tensor& shift, const Results& results, const OnDevice& device) {
  using Shape = MomentsShape<T, P>;
  const int64_t stages = (in.tokens + Shape::kStage - 1) / Shape::kStage;
  const int64_t capacity = device.capacity(moments_of_block<T, P>, Shape::kThreads);
  const int64_t wanted = choose_splits(in.groups, stages, capacity, kMostTokens / Shape::kStage);
  in.tokens_per_split = (stages + wanted - 1) / wanted * Shape::kStage;
  const int64_t splits = (in.tokens + in.tokens_per_split - 1) / in.tokens_per_split;
  STD_TORCH_CHECK(splits <= 65535, "token_moments: too many tokens");

  const Tensor linear = torch::stable::new_empty(shift, {splits, in.groups, 1 + 2 * P}, ScalarType::Double);
  const Tensor outer = torch::stable::new_empty(shift, {splits * Shape::kSlices, in.groups, P, P}, ScalarType::Float);
  const MomentsPartial partial{linear.mutable_data_ptr<double>(), outer.mutable_data_ptr<float>()};
  const dim3 grid(static_cast<unsigned>(in.groups), static_cast<unsigned>(splits));
  moments_of_block<T, P><<<grid, Shape::kThreads, 0, device.stream()>>>(in, partial);
  check_cuda(cudaGetLastError(), "token_moments");

  const int64_t tiles = (in.dims + kFinishTile - 1) / kFinishTile;
  moments_of_group<<<static_cast<unsigned>(in.groups * tiles * tiles), dim3(kFinishTile, kFinishRows), 0,
                     device.stream()>>>(
      partial, in.groups, splits, Shape::kSlices, P, in.dims, results.weight.mutable_data_ptr<double>(),
      results.plain.mutable_data_ptr<double>(), results.weighted.mutable_data_ptr<double>(),
      results.outer.mutable_data_ptr<double>());
  check_cuda(cudaGetLastError(), "token_moments");
}

template <typename T>
void run_padded(const MomentsInput& in, const Tensor& shift, const Results& results, const OnDevice& device) {
  if (in.dims <= 16)
    run<T, 16>(in, shift, results, device);
  else if (in.dims <= 32)
    run<T, 32>(in, shift, results, device);
  else if (in.dims <= 64)
    run<T, 64>(in, shift, results, device);
  else
    run<T, 128>(in, shift, results, device);
}

// x, grad (T, G, D) with unit stride along D; shift (G, D) float64, contiguous, exactly representable in float32.
// Returns float64 (G), (G, D), (G, D), (G, D, D).
std::tuple<Tensor, Tensor, Tensor, Tensor> token_moments_cuda(const Tensor& x, const Tensor& grad,
                                                              const Tensor& shift) {
  STD_TORCH_CHECK(x.dim() == 3 && grad.dim() == 3 && shift.dim() == 2, "token_moments: wrong number of dimensions");
  const int64_t tokens = x.size(0), groups = x.size(1), dims = x.size(2);
  STD_TORCH_CHECK(grad.size(0) == tokens && grad.size(1) == groups && grad.size(2) == dims,
                  "token_moments: grad is not like x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "token_moments: grad has another dtype than x");
  STD_TORCH_CHECK(shift.size(0) == groups && shift.size(1) == dims && shift.is_contiguous() &&
                      shift.scalar_type() == ScalarType::Double,
                  "token_moments: shift must be a contiguous float64 tensor of shape (G, D)");
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == x.get_device_index() && shift.is_cuda() &&
                      shift.get_device_index() == x.get_device_index(),
                  "token_moments: tensors on different devices");
  STD_TORCH_CHECK(dims <= 128, "token_moments: at most 128 coordinates per group on CUDA, got ", dims);
  const OnDevice device(x);
  const bool empty = tokens == 0 || groups == 0 || dims == 0;
  const auto make = [&](std::initializer_list<int64_t> size) {
    return empty ? torch::stable::new_zeros(shift, size) : torch::stable::new_empty(shift, size);
  };
  const Results results{make({groups}), make({groups, dims}), make({groups, dims}), make({groups, dims, dims})};
  if (!empty) {
    STD_TORCH_CHECK((x.stride(2) == 1 && grad.stride(2) == 1) || dims == 1,
                    "token_moments: x and grad must have unit stride along the last dimension");
    STD_TORCH_CHECK(groups <= (int64_t(1) << 26), "token_moments: too many groups");
    const MomentsInput in{x.const_data_ptr(),
                          grad.const_data_ptr(),
                          shift.const_data_ptr<double>(),
                          x.stride(0),
                          x.stride(1),
                          grad.stride(0),
                          grad.stride(1),
                          tokens,
                          groups,
                          0,
                          static_cast<int>(dims),
                          is_aligned(x) && is_aligned(grad)};
    switch (x.scalar_type()) {
      case ScalarType::Float:
        run_padded<float>(in, shift, results, device);
        break;
      case ScalarType::BFloat16:
        run_padded<BFloat16>(in, shift, results, device);
        break;
      case ScalarType::Half:
        run_padded<Float16>(in, shift, results, device);
        break;
      default:
        STD_TORCH_CHECK(false, "token_moments: unsupported dtype on CUDA");
    }
  }
  return {results.weight, results.plain, results.weighted, results.outer};
}

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CUDA, m) { m.impl("token_moments", TORCH_BOX(&skd::token_moments_cuda)); }
