// Weighted moments of tokens on the CPU: one pass over the features and gradients.
//
// For every group g of D coordinates, with y = x - shift and w = mean_d |x grad| of a token:
//   weight[g] = sum w,  plain[g] = sum y,  weighted[g] = sum w y,  outer[g] = sum w y y^T = sum (sqrt(w) y)(sqrt(w) y)^T
//
// Work is cut into tasks of up to four groups and a fixed range of tokens, so the result does not depend on the number
// of threads. Inside a task, blocks of 128 tokens are staged as sqrt(w) y in the first-level cache and multiplied by
// tiles in registers; sums are float32 within a block and float64 across blocks.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu_common.h"

namespace skd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 128;         // tokens staged at a time
constexpr int64_t kTokensPerTask = 4096;
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kGroupsPerTask = 4;   // neighbours in memory: they share pages
constexpr int64_t kPrefetch = 4;        // tokens ahead
constexpr int64_t kRows = 8;            // of a register tile; its columns are one 64-byte vector

typedef float FloatVector __attribute__((vector_size(64)));
typedef double DoubleVector __attribute__((vector_size(64)));

// Where one group's sums live while a task runs.
struct Sums {
  double* weight;
  double* plain;     // (D)
  double* weighted;  // (D)
  double* outer;     // (P, P), P = D rounded up to whole vectors; upper tiles only
};

template <typename A, typename V>
SKD_INLINE void add_tile(const A* staged, int64_t tokens, int64_t padded, int64_t row, int64_t column, double* outer) {
  V sum[kRows] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    const A* y = staged + t * padded;
    V right;
    std::memcpy(&right, y + column, sizeof right);
    for (int64_t r = 0; r < kRows; ++r) sum[r] += y[row + r] * right;
  }
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < lanes; ++c) outer[(row + r) * padded + column + c] += sum[r][c];
}

// Upper triangle of staged^T staged, in tiles.
SKD_CLONES void add_outer(const float* staged, int64_t tokens, int64_t padded, double* outer) {
  for (int64_t row = 0; row < padded; row += kRows)
    for (int64_t column = row / 16 * 16; column < padded; column += 16)
      add_tile<float, FloatVector>(staged, tokens, padded, row, column, outer);
}
SKD_CLONES void add_outer(const double* staged, int64_t tokens, int64_t padded, double* outer) {
  for (int64_t row = 0; row < padded; row += kRows)
    for (int64_t column = row / 8 * 8; column < padded; column += 8)
      add_tile<double, DoubleVector>(staged, tokens, padded, row, column, outer);
}

// Stage sqrt(w) y of a block of tokens of one group; add its linear sums.
template <typename T, typename A>
SKD_INLINE void stage_block(const T* x, const T* grad, int64_t x_stride, int64_t grad_stride, int64_t tokens, int64_t dims,
                            int64_t padded, const A* shift, A* staged, A* plain, A* weighted, double* weight) {
  std::fill(plain, plain + dims, A(0));
  std::fill(weighted, weighted + dims, A(0));
  A total = 0;
  for (int64_t t = 0; t < tokens; ++t, x += x_stride, grad += grad_stride) {
    for (int64_t byte = 0; byte < dims * int64_t(sizeof(T)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + kPrefetch * x_stride) + byte);
      __builtin_prefetch(reinterpret_cast<const char*>(grad + kPrefetch * grad_stride) + byte);
    }
    A w = 0;
    for (int64_t d = 0; d < dims; ++d) w += std::abs(load(x[d]) * load(grad[d]));
    w /= A(dims);
    const A root = std::sqrt(w);
    A* out = staged + t * padded;
    for (int64_t d = 0; d < dims; ++d) {
      const A y = load(x[d]) - shift[d];
      plain[d] += y;
      weighted[d] += w * y;
      out[d] = root * y;
    }
    total += w;
  }
  *weight += total;
}

#define SKD_STAGE(T, A)                                                                                                \
  SKD_CLONES void stage(const T* x, const T* grad, int64_t x_stride, int64_t grad_stride, int64_t tokens, int64_t dims, \
                        int64_t padded, const A* shift, A* staged, A* plain, A* weighted, double* weight) {            \
    stage_block<T, A>(x, grad, x_stride, grad_stride, tokens, dims, padded, shift, staged, plain, weighted, weight);   \
  }
SKD_STAGE(float, float)
SKD_STAGE(BFloat16, float)
SKD_STAGE(Float16, float)
SKD_STAGE(double, double)

struct View {
  const void* data;
  int64_t token_stride, group_stride;  // in elements
};

template <typename T, typename A>
void accumulate(View x, View grad, const A* shift, int64_t dims, int64_t padded, int64_t first_token, int64_t last_token,
                int64_t first_group, int64_t last_group, const std::vector<Sums>& sums) {
  std::vector<A> staged(kBlock * padded + 16, A(0)), plain(dims), weighted(dims);
  for (int64_t token = first_token; token < last_token; token += kBlock) {
    const int64_t tokens = std::min(kBlock, last_token - token);
    for (int64_t g = first_group; g < last_group; ++g) {
      const T* x_row = static_cast<const T*>(x.data) + token * x.token_stride + g * x.group_stride;
      const T* g_row = static_cast<const T*>(grad.data) + token * grad.token_stride + g * grad.group_stride;
      const Sums& into = sums[g - first_group];
      stage(x_row, g_row, x.token_stride, grad.token_stride, tokens, dims, padded, shift + g * dims, staged.data(),
            plain.data(), weighted.data(), into.weight);
      for (int64_t d = 0; d < dims; ++d) {
        into.plain[d] += plain[d];
        into.weighted[d] += weighted[d];
      }
      add_outer(staged.data(), tokens, padded, into.outer);
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, typename A>
void run(View x, View grad, const double* shift64, int64_t tokens, int64_t groups, int64_t dims, double* weight,
         double* plain, double* weighted, double* outer) {
  const int64_t lanes = 64 / sizeof(A);
  const int64_t padded = ceil_div(dims, lanes) * lanes;
  const int64_t splits = std::clamp<int64_t>(tokens / kTokensPerTask, 1, kMaxSplits);
  const int64_t ranges = ceil_div(groups, kGroupsPerTask);
  const int64_t size = 1 + 2 * dims + padded * padded;  // doubles of one group
  std::vector<double> partial(splits * groups * size, 0.0);
  const std::vector<A> shift(shift64, shift64 + groups * dims);
  auto at = [&](int64_t split, int64_t g) {
    double* p = partial.data() + (split * groups + g) * size;
    return Sums{p, p + 1, p + 1 + dims, p + 1 + 2 * dims};
  };
  torch::stable::parallel_for(0, splits * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / ranges, range = task % ranges;
      const int64_t first = groups * range / ranges, last = groups * (range + 1) / ranges;
      std::vector<Sums> sums;
      for (int64_t g = first; g < last; ++g) sums.push_back(at(split, g));
      accumulate<T, A>(x, grad, shift.data(), dims, padded, tokens * split / splits, tokens * (split + 1) / splits,
                       first, last, sums);
    }
  });
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      Sums all = at(0, g);
      for (int64_t split = 1; split < splits; ++split) {
        const double* other = at(split, g).weight;
        for (int64_t i = 0; i < size; ++i) all.weight[i] += other[i];
      }
      weight[g] = *all.weight;
      std::copy(all.plain, all.plain + dims, plain + g * dims);
      std::copy(all.weighted, all.weighted + dims, weighted + g * dims);
      double* square = outer + g * dims * dims;
      for (int64_t i = 0; i < dims; ++i)
        for (int64_t j = 0; j < dims; ++j) square[i * dims + j] = all.outer[std::min(i, j) * padded + std::max(i, j)];
    }
  });
}

Tensor zeros(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_zeros(like, size);
}

// x, grad (T, G, D) with unit stride along D; shift (G, D) float64, contiguous, exactly representable in the dtype the
// sums are staged in. Returns float64 (G), (G, D), (G, D), (G, D, D).
std::tuple<Tensor, Tensor, Tensor, Tensor> token_moments_cpu(const Tensor& x, const Tensor& grad, const Tensor& shift) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 3 && grad.dim() == 3 && shift.dim() == 2, "token_moments: wrong number of dimensions");
  const int64_t tokens = x.size(0), groups = x.size(1), dims = x.size(2);
  Tensor weight = zeros(shift, {groups}), plain = zeros(shift, {groups, dims});
  Tensor weighted = zeros(shift, {groups, dims}), outer = zeros(shift, {groups, dims, dims});
  if (tokens > 0 && groups > 0 && dims > 0) {
    const View a{x.const_data_ptr(), x.stride(0), x.stride(1)};
    const View b{grad.const_data_ptr(), grad.stride(0), grad.stride(1)};
    auto call = [&](auto runner) {
      runner(a, b, shift.const_data_ptr<double>(), tokens, groups, dims, weight.mutable_data_ptr<double>(),
             plain.mutable_data_ptr<double>(), weighted.mutable_data_ptr<double>(), outer.mutable_data_ptr<double>());
    };
    switch (x.scalar_type()) {
      case ScalarType::Float: call(run<float, float>); break;
      case ScalarType::Double: call(run<double, double>); break;
      case ScalarType::BFloat16: call(run<BFloat16, float>); break;
      case ScalarType::Half: call(run<Float16, float>); break;
      default: STD_TORCH_CHECK(false, "token_moments: unsupported dtype");
    }
  }
  return {weight, plain, weighted, outer};
}

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CPU, m) { m.impl("token_moments", TORCH_BOX(&skd::token_moments_cpu)); }
