// Weighted moments of tokens on CUDA: one pass over the features and gradients.
//
// For every group g of D coordinates, with y = x - shift and w = mean_d |x grad| of a token:
//   weight[g] = sum w,  plain[g] = sum y,  weighted[g] = sum w y
//   outer[g] = sum w y y^T = sum (sqrt(w) y) (sqrt(w) y)^T
//
// A thread block owns one group and a range of tokens. It stages sqrt(w) y in shared memory as the sum of two bf16
// numbers and multiplies those on the matrix units: float32 accuracy to about 4e-6, where a single bf16 loses 1e-3.
// Loads of the next tokens are in flight meanwhile. While it sums, the kernel subtracts a point that float32 holds
// exactly: the given shift rounded to float32, or without one the mean of a few tokens, which every block of a group
// computes for itself. Blocks write partial sums. A second kernel adds these in float64 in a fixed order, without
// atomics, so that results are bitwise reproducible on one kind of device, and re-bases them to the shift, or to the
// mean of all tokens. A call starts only these two kernels: each further small one would take several microseconds.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cuda_common.h"
#include "moments_finish.h"

namespace skd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kMostTokens = 65536;  // in the range of one block

template <typename T, int P>
void run(const MomentsInput& in, const Tensor& x, const MomentsResults& to, const OnDevice& device) {
  using Shape = MomentsShape<T, P>;
  const int64_t capacity = device.capacity<moments_of_block<T, P>>(Shape::kThreads);
  const auto choose = [&](int64_t stages) {
    const int64_t splits = choose_splits(in.groups, stages, capacity, kMostTokens / Shape::kStage);
    STD_TORCH_CHECK(splits <= 65535, "token_moments: too many tokens");
    return splits;
  };
  Tensor workspace;
  const auto allocate = [&](int64_t doubles) {
    workspace = torch::stable::new_empty(x, {doubles}, ScalarType::Double);
    return workspace.mutable_data_ptr<double>();
  };
  const auto launch = [&](dim3 blocks, int threads, auto kernel, auto... arguments) {
    kernel<<<blocks, threads, 0, device.stream()>>>(arguments...);
    check_cuda(cudaGetLastError(), "token_moments");
  };
  launch_moments<T, P>(in, to, choose, allocate, launch);
}

template <typename T>
void run_padded(const MomentsInput& in, const Tensor& x, const MomentsResults& to, const OnDevice& device) {
  if (in.dims <= 16)
    run<T, 16>(in, x, to, device);
  else if (in.dims <= 32)
    run<T, 32>(in, x, to, device);
  else if (in.dims <= 64)
    run<T, 64>(in, x, to, device);
  else
    run<T, 128>(in, x, to, device);
}

MomentsView view(const Tensor& tensor) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  return {tensor.const_data_ptr(), tensor.stride(0) * size, tensor.stride(1) * size};
}

void check(const Tensor& x, const Tensor& grad) {
  STD_TORCH_CHECK(x.dim() == 3 && grad.dim() == 3, "token_moments: wrong number of dimensions");
  const int64_t tokens = x.size(0), groups = x.size(1), dims = x.size(2);
  STD_TORCH_CHECK(grad.size(0) == tokens && grad.size(1) == groups && grad.size(2) == dims,
                  "token_moments: grad is not like x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "token_moments: grad has another dtype than x");
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == x.get_device_index(),
                  "token_moments: tensors on different devices");
  STD_TORCH_CHECK(dims <= 128, "token_moments: at most 128 coordinates per group on CUDA, got ", dims);
  STD_TORCH_CHECK(groups <= (int64_t(1) << 25), "token_moments: too many groups");
  STD_TORCH_CHECK(tokens == 0 || groups == 0 || dims < 2 || (x.stride(2) == 1 && grad.stride(2) == 1),
                  "token_moments: x and grad must have unit stride along the last dimension");
}

// Without tokens, groups or coordinates no kernel of ours runs: the sums are zeros, about `shift` if there is one.
Tensors empty_moments(const Tensor& x, const Tensor* shift) {
  const int64_t groups = x.size(1), dims = x.size(2);
  const auto zeros = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_zeros(x, size, ScalarType::Double);
  };
  return {torch::stable::fill_(zeros({}), static_cast<double>(x.size(0))),
          shift ? torch::stable::clone(*shift) : zeros({groups, dims}),
          zeros({groups}),
          zeros({groups, dims}),
          zeros({groups, dims}),
          zeros({groups, dims, dims})};
}

// x, grad (T, G, D) with unit stride along D. Returns float64 count (), shift (G, D), weight (G), plain (G, D),
// weighted (G, D) and outer (G, D, D): about `shift`, or about the mean of the tokens if there is none.
Tensors moments(const Tensor& x, const Tensor& grad, const Tensor* shift) {
  check(x, grad);
  const OnDevice device(x);
  const int64_t tokens = x.size(0), groups = x.size(1), dims = x.size(2);
  if (tokens == 0 || groups == 0 || dims == 0) return empty_moments(x, shift);
  const auto make = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(x, size, ScalarType::Double);
  };
  const Tensor count = make({}), about = make({groups, dims}), weight = make({groups}), plain = make({groups, dims});
  const Tensor weighted = make({groups, dims}), outer = make({groups, dims, dims});
  const auto memory = [](const Tensor& result) { return result.mutable_data_ptr<double>(); };
  const MomentsResults to{memory(count), memory(about),    memory(weight),
                          memory(plain), memory(weighted), memory(outer)};
  MomentsInput in{};
  in.x = view(x), in.grad = view(grad);
  in.shift = shift ? shift->const_data_ptr<double>() : nullptr;
  in.tokens = tokens, in.groups = groups, in.dims = static_cast<int>(dims);
  in.aligned = is_aligned(x) && is_aligned(grad);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run_padded<float>(in, x, to, device);
      break;
    case ScalarType::BFloat16:
      run_padded<BFloat16>(in, x, to, device);
      break;
    case ScalarType::Half:
      run_padded<Float16>(in, x, to, device);
      break;
    default:
      STD_TORCH_CHECK(false, "token_moments: unsupported dtype on CUDA");
  }
  return {count, about, weight, plain, weighted, outer};
}

// About `shift` (G, D), contiguous float64.
Tensors token_moments_cuda(const Tensor& x, const Tensor& grad, const Tensor& shift) {
  STD_TORCH_CHECK(x.dim() == 3 && shift.dim() == 2 && shift.size(0) == x.size(1) && shift.size(1) == x.size(2) &&
                      shift.is_contiguous() && shift.scalar_type() == ScalarType::Double,
                  "token_moments: shift must be a contiguous float64 tensor of shape (G, D)");
  STD_TORCH_CHECK(shift.is_cuda() && shift.get_device_index() == x.get_device_index(),
                  "token_moments: tensors on different devices");
  return moments(x, grad, &shift);
}

Tensors centred_moments_cuda(const Tensor& x, const Tensor& grad) { return moments(x, grad, nullptr); }

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CUDA, m) {
  m.impl("token_moments", TORCH_BOX(&skd::token_moments_cuda));
  m.impl("centred_moments", TORCH_BOX(&skd::centred_moments_cuda));
}
