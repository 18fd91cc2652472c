// Weighted moments of tokens on the CPU: one pass over the features and gradients.
//
// For every group g of D coordinates, with y = x - shift and w = mean_d |x grad| of a token:
//   weight[g] = sum w,  plain[g] = sum y,  weighted[g] = sum w y,  outer[g] = sum w y y^T = sum (sqrt(w) y)(sqrt(w) y)^T
//
// Work is cut into tasks of up to four groups and a range of tokens, by the shape alone, so the result does not depend
// on the number of threads. Inside a task, blocks of 128 tokens are staged as sqrt(w) y in the cache and multiplied by
// tiles in registers, upper triangle only, while the next block is fetched from memory. Sums are float32 within a block
// and float64 across blocks.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu_vector.h"

namespace skd {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 128;         // tokens staged at a time
constexpr int64_t kMostTokens = 4096;   // of a task
constexpr int64_t kFewestTokens = 512;  // of a task, unless there are fewer
constexpr int64_t kTasks = 12;          // at least, if that leaves each enough tokens
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kGroupsPerTask = 3;  // neighbours in memory: they share pages
constexpr int64_t kUsualDims = 64;     // of a head
constexpr int64_t kWidth = 16;         // staged tokens are multiples of it wide
constexpr int64_t kRows = 8;           // of a register tile; its columns are one vector, or half of one

struct View {
  const void* data;
  int64_t token_stride, group_stride;  // in elements

  template <typename T>
  const T* at(int64_t token, int64_t group) const {
    return static_cast<const T*>(data) + token * token_stride + group * group_stride;
  }
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  Range part(int64_t i, int64_t parts) const {  // the i-th of them, when cut evenly
    return {begin + size() * i / parts, begin + size() * (i + 1) / parts};
  }
};

// Features and gradients of some tokens and groups.
struct Block {
  View x, grad;
  Range tokens, groups;
  int64_t dims;
};

// What a task sums up for one group, in float64.
struct Sums {
  double* weight;
  double* plain;     // (D)
  double* weighted;  // (D)
  double* outer;     // (P, P), P = D rounded up to whole tiles; upper tiles only
};

// What a task holds of one group and block: rows of `width` coordinates, zeros beyond D.
template <typename A>
struct Stage {
  explicit Stage(int64_t width) : width(width), plain(width), weighted(width), token(width), tokens(kBlock * width) {}

  int64_t width;
  std::vector<A> plain, weighted, token, tokens;
};

// Stage sqrt(w) y of the block's tokens of one group; returns the sum of w. `plain` and `weighted` get those of y and
// w y; `token` is scratch.
template <int64_t Bytes, typename T, typename A>
SKD_INLINE A stage_tokens(const Block& block, int64_t group, int64_t dims, int64_t width, const A* shift, A* staged,
                          Two<A, Bytes>* token, Two<A, Bytes>* plain, Two<A, Bytes>* weighted) {
  constexpr int64_t lanes = Bytes / sizeof(A), step = 2 * lanes;
  for (int64_t v = 0; v < width / step; ++v) plain[v] = weighted[v] = Two<A, Bytes>{};
  const T* x = block.x.at<T>(block.tokens.begin, group);
  const T* grad = block.grad.at<T>(block.tokens.begin, group);
  A weight = 0;
  for (int64_t t = 0; t < block.tokens.size(); ++t, x += block.x.token_stride, grad += block.grad.token_stride) {
    Vector<A, Bytes> sum = {};
    for (int64_t v = 0; v < width / step; ++v) {
      token[v] = load_first<A, Bytes>(x + v * step, dims - v * step);
      const Two<A, Bytes> g = load_first<A, Bytes>(grad + v * step, dims - v * step);
      sum += absolute<Bytes>(token[v].first * g.first) + absolute<Bytes>(token[v].second * g.second);
    }
    const A w = total<A, Bytes>(sum) / A(dims), root = std::sqrt(w);
    for (int64_t v = 0; v < width / step; ++v) {
      const Two<A, Bytes> values = sorted<T>(token[v]), center = load_two<Bytes>(shift + v * step);
      const Two<A, Bytes> y = {values.first - center.first, values.second - center.second};
      plain[v].first += y.first, plain[v].second += y.second;
      weighted[v].first += w * y.first, weighted[v].second += w * y.second;
      store_vector<Bytes>(staged + v * step, root * y.first);
      store_vector<Bytes>(staged + v * step + lanes, root * y.second);
    }
    staged += width;
    weight += w;
  }
  return weight;
}

// With the usual width of a head everything but what is staged stays in registers.
template <int64_t Bytes, typename T, typename A>
SKD_INLINE A stage_block(const Block& block, int64_t group, const A* shift, Stage<A>& stage) {
  using V = Two<A, Bytes>;
  constexpr int64_t usual = kUsualDims * sizeof(A) / sizeof(V);
  if (block.dims != kUsualDims)
    return stage_tokens<Bytes, T, A>(block, group, block.dims, stage.width, shift, stage.tokens.data(),
                                     reinterpret_cast<V*>(stage.token.data()), reinterpret_cast<V*>(stage.plain.data()),
                                     reinterpret_cast<V*>(stage.weighted.data()));
  V token[usual], plain[usual], weighted[usual];
  const A weight = stage_tokens<Bytes, T, A>(block, group, kUsualDims, kUsualDims, shift, stage.tokens.data(), token,
                                             plain, weighted);
  std::memcpy(stage.plain.data(), plain, sizeof plain);
  std::memcpy(stage.weighted.data(), weighted, sizeof weighted);
  return weight;
}

// Into the second-level cache, some tokens of all groups of the block.
template <typename T>
SKD_INLINE void prefetch(const Block& block, Range tokens) {
  for (int64_t t = tokens.begin; t < tokens.end; ++t)
    for (int64_t g = block.groups.begin; g < block.groups.end; ++g)
      for (int64_t d = 0; d < block.dims; d += 64 / int64_t(sizeof(T))) {
        __builtin_prefetch(block.x.at<T>(t, g) + d, 0, 2);
        __builtin_prefetch(block.grad.at<T>(t, g) + d, 0, 2);
      }
}

// outer (kRows, one vector; rows `padded` apart) += rows^T columns, of tokens `width` apart.
template <int64_t Bytes, typename A>
SKD_INLINE void add_tile(const A* staged, int64_t row, int64_t column, int64_t tokens, int64_t width, double* outer,
                         int64_t padded) {
  Vector<A, Bytes> sum[kRows] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    const A* y = staged + t * width;
    const auto right = load_vector<Bytes>(y + column);
    for (int64_t r = 0; r < kRows; ++r) sum[r] += y[row + r] * right;
  }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < Bytes / int64_t(sizeof(A)); ++c) outer[(row + r) * padded + column + c] += sum[r][c];
}

// Upper triangle of staged^T staged, in tiles. `fetch` is called before each, with how much is done after it.
template <int64_t Bytes, typename A, typename Fetch>
SKD_INLINE void add_outer(const A* staged, int64_t tokens, int64_t width, double* outer, int64_t padded, Fetch fetch) {
  constexpr int64_t lanes = Bytes / sizeof(A);
  static_assert(lanes <= 2 * kRows);  // what is left of a row of tiles is half a vector or nothing
  int64_t done = 0;
  for (int64_t row = 0; row < padded; row += kRows)
    for (int64_t column = row; column < padded;) {
      const bool whole = column + lanes <= padded;
      const int64_t columns = whole ? lanes : lanes / 2;
      fetch(done += kRows * columns);
      if (whole)
        add_tile<Bytes>(staged, row, column, tokens, width, outer, padded);
      else
        add_tile<Bytes / 2>(staged, row, column, tokens, width, outer, padded);
      column += columns;
    }
}

// All groups of a block; meanwhile the next one is fetched.
template <int64_t Bytes, typename T, typename A>
SKD_INLINE void add_block(const Block& block, const Block& next, const A* shift, int64_t padded, Stage<A>& stage,
                          const Sums* into) {
  const int64_t area = block.groups.size() * padded * (padded + kRows) / 2;  // of all triangles
  int64_t before = 0, fetched = next.tokens.begin;
  for (int64_t g = block.groups.begin; g < block.groups.end; ++g, ++into, before += padded * (padded + kRows) / 2) {
    *into->weight += stage_block<std::min<int64_t>(Bytes, 32), T, A>(block, g, shift + g * stage.width, stage);
    for (int64_t d = 0; d < block.dims; ++d) into->plain[d] += stage.plain[d];
    for (int64_t d = 0; d < block.dims; ++d) into->weighted[d] += stage.weighted[d];
    add_outer<Bytes>(stage.tokens.data(), block.tokens.size(), stage.width, into->outer, padded, [&](int64_t done) {
      const int64_t due = next.tokens.begin + next.tokens.size() * (before + done) / area;
      prefetch<T>(next, {fetched, due});
      fetched = due;
    });
  }
}

// One version for each size of registers.
template <typename T, typename A>
struct Add {
  using Function = void(const Block&, const Block&, const A*, int64_t, Stage<A>&, const Sums*);
#define SKD_ADD(NAME, BYTES, ATTRIBUTE)                                                                             \
  ATTRIBUTE static void NAME(const Block& block, const Block& next, const A* shift, int64_t padded, Stage<A>& stage, \
                             const Sums* into) {                                                                    \
    add_block<BYTES, T, A>(block, next, shift, padded, stage, into);                                                \
  }
  SKD_ADD(narrow, 16, )
#ifdef SKD_LEVELS
  SKD_ADD(middle, 32, __attribute__((target("arch=x86-64-v3"))))
  SKD_ADD(wide, 64, __attribute__((target("arch=x86-64-v4"))))
  static Function* best() { return register_bytes() == 64 ? wide : register_bytes() == 32 ? middle : narrow; }
#else
  static Function* best() { return narrow; }
#endif
#undef SKD_ADD
};

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// The sums of a task go to `into`, one per group.
template <typename T, typename A>
void run_task(const Block& task, const A* shift, int64_t width, int64_t padded, const Sums* into) {
  const auto add = Add<T, A>::best();
  Stage<A> stage(width);
  Block block = task, next = task;
  next.tokens.end = next.tokens.begin;
  while (next.tokens.end < task.tokens.end || next.tokens.size() > 0) {  // the first time only fetches
    block = next;
    next.tokens = {block.tokens.end, std::min(block.tokens.end + kBlock, task.tokens.end)};
    add(block, next, shift, padded, stage, into);
  }
}

// Sums about `from` to results about `to`, which the precision of the former cannot hold: with `step` between them and
// half = sum w y + sum w step / 2, the outer product grows by half step^T + step half^T.
template <typename A>
void finish(const Sums& sums, const A* from, const double* to, double tokens, int64_t dims, int64_t padded,
            double* weight, double* plain, double* weighted, double* outer) {
  *weight = *sums.weight;
  std::vector<double> step(dims), half(dims);
  for (int64_t i = 0; i < dims; ++i) {
    step[i] = from[i] - to[i];
    half[i] = sums.weighted[i] + 0.5 * *weight * step[i];
    plain[i] = sums.plain[i] + tokens * step[i];
    weighted[i] = sums.weighted[i] + *weight * step[i];
  }
  for (int64_t i = 0; i < dims; ++i)
    for (int64_t j = i; j < dims; ++j)
      outer[i * dims + j] = outer[j * dims + i] = sums.outer[i * padded + j] + half[i] * step[j] + step[i] * half[j];
}

template <typename T, typename A>
void run(View x, View grad, const double* shift64, int64_t tokens, int64_t groups, int64_t dims, double* weight,
         double* plain, double* weighted, double* outer) {
  const int64_t width = round_up(dims, kWidth), padded = round_up(dims, kRows);
  const int64_t ranges = round_up(groups, kGroupsPerTask) / kGroupsPerTask;
  const int64_t balanced = std::min(tokens / kFewestTokens, (kTasks + ranges - 1) / ranges);
  const int64_t splits = std::clamp<int64_t>(std::max(tokens / kMostTokens, balanced), 1, kMaxSplits);
  const int64_t size = 1 + 2 * dims + padded * padded;  // doubles of one group
  std::vector<double> partial(splits * groups * size, 0.0);
  std::vector<A> shift(groups * width, A(0));
  for (int64_t g = 0; g < groups; ++g)
    std::copy(shift64 + g * dims, shift64 + (g + 1) * dims, shift.begin() + g * width);
  auto at = [&](int64_t split, int64_t g) {
    double* p = partial.data() + (split * groups + g) * size;
    return Sums{p, p + 1, p + 1 + dims, p + 1 + 2 * dims};
  };
  torch::stable::parallel_for(0, splits * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / ranges;
      const Range mine = Range{0, groups}.part(task % ranges, ranges);
      Sums sums[kGroupsPerTask];
      for (int64_t g = mine.begin; g < mine.end; ++g) sums[g - mine.begin] = at(split, g);
      run_task<T, A>({x, grad, Range{0, tokens}.part(split, splits), mine, dims}, shift.data(), width, padded, sums);
    }
  });
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      Sums all = at(0, g);
      for (int64_t split = 1; split < splits; ++split) {
        const double* other = at(split, g).weight;
        for (int64_t i = 0; i < size; ++i) all.weight[i] += other[i];
      }
      finish(all, shift.data() + g * width, shift64 + g * dims, double(tokens), dims, padded, weight + g,
             plain + g * dims, weighted + g * dims, outer + g * dims * dims);
    }
  });
}

// x, grad (T, G, D) with unit stride along D; shift (G, D) float64, contiguous. Returns float64 (G), (G, D), (G, D), (G, D, D).
std::tuple<Tensor, Tensor, Tensor, Tensor> token_moments_cpu(const Tensor& x, const Tensor& grad, const Tensor& shift) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 3 && grad.dim() == 3 && shift.dim() == 2, "token_moments: wrong number of dimensions");
  const int64_t tokens = x.size(0), groups = x.size(1), dims = x.size(2);
  const bool any = tokens > 0 && groups > 0 && dims > 0;
  const auto make = [&](std::vector<int64_t> size) {
    return any ? torch::stable::new_empty(shift, size) : torch::stable::new_zeros(shift, size);
  };
  Tensor weight = make({groups}), plain = make({groups, dims});
  Tensor weighted = make({groups, dims}), outer = make({groups, dims, dims});
  if (any) {
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
