// Weighted moments of tokens on the CPU: one pass over the features and gradients.
//
// For every group g of D coordinates, with y = x - shift and w = mean_d |x grad| of a token:
//   weight[g] = sum w,  plain[g] = sum y,  weighted[g] = sum w y,  outer[g] = sum w y y^T = sum (sqrt(w) y)(sqrt(w) y)^T
//
// Work is cut into tasks of up to three groups and a range of tokens, by the shape alone, so the result does not depend
// on the number of threads. Inside a task, blocks of 128 tokens are staged as sqrt(w) y in the cache and multiplied by
// tiles in registers, upper triangle only, while the next block is fetched from memory. Sums are float32 within a block
// and float64 across blocks. For bfloat16 input, sqrt(w) y is rounded to bfloat16 again where the processor
// multiplies pairs of bfloat16 at twice the rate (it adds in float32, and denormals count as zero). This error is no
// larger than the rounding error of the input itself.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
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
constexpr int64_t kSample = 31;        // tokens whose mean stands in for that of all while they are summed
constexpr int64_t kGroupsPerTask = 3;  // neighbours in memory: they share pages
constexpr int64_t kUsualDims = 64;     // of a head
constexpr int64_t kWidth = 16;         // staged tokens are multiples of it wide
constexpr int64_t kRows = 8;           // of a register tile; its columns are one vector, or half of one
constexpr int64_t kAhead = 4;          // tokens that are on their way to the first-level cache while one is staged
constexpr int64_t kLine = 64;          // bytes of the caches
constexpr int64_t kPace = 8;           // rows multiplied per two lines of features and two of gradients fetched
static_assert(kBlock % 2 == 0);        // tokens are also paired

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

// Prefetches one token of one group into the first-level cache.
template <typename T>
SKD_INLINE void fetch_token(const T* x, const T* grad, int64_t dims) {
  for (int64_t d = 0; d < dims; d += kLine / int64_t(sizeof(T))) {
    __builtin_prefetch(x + d, 0, 3);
    __builtin_prefetch(grad + d, 0, 3);
  }
}

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
    fetch_token(x + kAhead * block.x.token_stride, grad + kAhead * block.grad.token_stride, dims);
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

// Converts rows of staged tokens, in place, to half as many rows of pairs: two bfloat16 in each uint32_t.
template <int64_t Bytes>
SKD_INLINE const uint32_t* pack_pairs(float* staged, int64_t tokens, int64_t width) {
  using Pairs = Vector<uint32_t, Bytes>;
  uint32_t* packed = reinterpret_cast<uint32_t*>(staged);
  if (tokens % 2 == 1) std::fill_n(staged + tokens * width, width, 0.0f);
  for (int64_t t = 0; t < tokens; t += 2, staged += 2 * width)
    for (int64_t d = 0; d < width; d += Bytes / 4) {
      const Pairs first = to_bfloat16<Bytes>(load_vector<Bytes>(staged + d));
      const Pairs second = to_bfloat16<Bytes>(load_vector<Bytes>(staged + width + d));
      store_vector<Bytes>(packed + t / 2 * width + d, Pairs(first | second << 16));
    }
  return packed;
}

// Brings the tokens of one group of a block into the second-level cache, line by line.
template <typename T>
struct Fetch {
  const T *x, *grad;
  int64_t x_stride, grad_stride, dims, tokens, d = 0;

  Fetch(const Block& block, int64_t group)
      : x(block.x.at<T>(block.tokens.begin, group)),
        grad(block.grad.at<T>(block.tokens.begin, group)),
        x_stride(block.x.token_stride),
        grad_stride(block.grad.token_stride),
        dims(block.dims),
        tokens(block.tokens.size()) {}

  SKD_INLINE void next() {
    if (tokens == 0) return;
    __builtin_prefetch(x + d, 0, 2);
    __builtin_prefetch(grad + d, 0, 2);
    if ((d += kLine / int64_t(sizeof(T))) >= dims) d = 0, --tokens, x += x_stride, grad += grad_stride;
  }
};

// outer (kRows, one vector; rows `padded` apart) += left^T right, both of `rows` rows, `width` apart.
template <int64_t Bytes, typename A, typename E, typename T>
SKD_INLINE void add_tile(const E* left, const E* right, int64_t rows, int64_t width, double* outer, int64_t padded,
                         Fetch<T>& fetch) {
  Vector<A, Bytes> sum[kRows] = {};
  for (int64_t t = 0; t < rows; ++t, left += width, right += width) {
    const auto columns = load_vector<Bytes>(right);
    for (int64_t r = 0; r < kRows; ++r) sum[r] = multiply_add<Bytes>(left[r], columns, sum[r]);
    if (t % kPace == 0) fetch.next(), fetch.next();
  }
  for (int64_t r = 0; r < kRows; ++r) add_to(outer + r * padded, sum[r]);
}

// Upper triangle of staged^T staged, in tiles.
template <int64_t Bytes, typename A, typename E, typename T>
SKD_INLINE void add_outer(const E* staged, int64_t rows, int64_t width, double* outer, int64_t padded,
                          Fetch<T> fetch) {
  constexpr int64_t lanes = Bytes / sizeof(A);
  static_assert(lanes <= 2 * kRows);  // what is left of a row of tiles is half a vector or nothing
  for (int64_t row = 0; row < padded; row += kRows) {
    int64_t column = row;
    for (; column + lanes <= padded; column += lanes)
      add_tile<Bytes, A>(staged + row, staged + column, rows, width, outer + row * padded + column, padded, fetch);
    if (column < padded)
      add_tile<Bytes / 2, A>(staged + row, staged + column, rows, width, outer + row * padded + column, padded, fetch);
  }
}

// Adds one block to the sums of all groups, and prefetches the next. Paired: staged tokens are rounded to bfloat16.
template <int64_t Bytes, bool Paired, typename T, typename A>
SKD_INLINE void add_block(const Block& block, const Block& next, const A* shift, int64_t padded, Stage<A>& stage,
                          const Sums* into) {
  const int64_t tokens = block.tokens.size();
  A* staged = stage.tokens.data();
  for (int64_t g = block.groups.begin; g < block.groups.end; ++g, ++into) {
    *into->weight += stage_block<std::min<int64_t>(Bytes, 32), T, A>(block, g, shift + g * stage.width, stage);
    for (int64_t d = 0; d < block.dims; ++d) into->plain[d] += stage.plain[d];
    for (int64_t d = 0; d < block.dims; ++d) into->weighted[d] += stage.weighted[d];
    if constexpr (Paired)
      add_outer<Bytes, A>(pack_pairs<Bytes>(staged, tokens, stage.width), (tokens + 1) / 2, stage.width, into->outer,
                          padded, Fetch<T>(next, g));
    else
      add_outer<Bytes, A>(staged, tokens, stage.width, into->outer, padded, Fetch<T>(next, g));
  }
}

// One version for each size of registers, and one for pairs of bfloat16.
template <typename T, typename A>
struct Add {
  using Function = void(const Block&, const Block&, const A*, int64_t, Stage<A>&, const Sums*);
#define SKD_ADD(NAME, BYTES, PAIRED, ATTRIBUTE)                                                                     \
  ATTRIBUTE static void NAME(const Block& block, const Block& next, const A* shift, int64_t padded, Stage<A>& stage, \
                             const Sums* into) {                                                                    \
    add_block<BYTES, PAIRED, T, A>(block, next, shift, padded, stage, into);                                        \
  }
  SKD_ADD(narrow, 16, false, )
#ifdef SKD_LEVELS
  SKD_ADD(middle, 32, false, __attribute__((target("arch=x86-64-v3"))))
  SKD_ADD(wide, 64, false, __attribute__((target("arch=x86-64-v4"))))
  SKD_ADD(paired, 64, (std::is_same_v<T, BFloat16>), __attribute__((target("arch=x86-64-v4,avx512bf16"))))
  static Function* best() {
    if (register_bytes() == 64) return std::is_same_v<T, BFloat16> && multiplies_pairs() ? paired : wide;
    return register_bytes() == 32 ? middle : narrow;
  }
#else
  static Function* best() { return narrow; }
#endif
#undef SKD_ADD
};

// The sums of a task go to `into`, one per group.
template <typename T, typename A>
void run_task(const Block& task, const A* shift, int64_t width, int64_t padded, const Sums* into) {
  const auto add = Add<T, A>::best();
  Stage<A> stage(width);
  Block block = task, next = task;
  for (int64_t token = task.tokens.begin; token < task.tokens.end; token = block.tokens.end) {
    block.tokens = {token, std::min(token + kBlock, task.tokens.end)};
    next.tokens = {block.tokens.end, std::min(block.tokens.end + kBlock, task.tokens.end)};
    add(block, next, shift, padded, stage, into);
  }
}

// Where the results go, of all groups or of one: (G, D), (G), (G, D), (G, D), (G, D, D).
struct Results {
  double *about, *weight, *plain, *weighted, *outer;

  Results of(int64_t group, int64_t dims) const {
    return {about + group * dims, weight + group, plain + group * dims, weighted + group * dims,
            outer + group * dims * dims};
  }
};

// Adds up the parts of one group's sums, which are about `from`, and re-bases them to `to.about`, which need not be
// exact in the precision of `from`, or to the mean if `centred`. With `step` the difference of the two points and
// half = sum w y + sum w step / 2, the outer product grows by half step^T + step half^T.
template <typename A>
void finish(const std::vector<Sums>& parts, const A* from, bool centred, double tokens, int64_t dims, int64_t padded,
            const Results& to) {
  std::vector<double> step(dims), half(dims), row(dims);
  *to.weight = 0.0;
  std::fill_n(to.plain, dims, 0.0);
  std::fill_n(to.weighted, dims, 0.0);
  for (const Sums& part : parts) {
    *to.weight += *part.weight;
    for (int64_t i = 0; i < dims; ++i) to.plain[i] += part.plain[i], to.weighted[i] += part.weighted[i];
  }
  for (int64_t i = 0; i < dims; ++i) {
    if (centred) to.about[i] = from[i] + to.plain[i] / tokens;
    step[i] = from[i] - to.about[i];
    half[i] = to.weighted[i] + 0.5 * *to.weight * step[i];
    to.plain[i] += tokens * step[i];
    to.weighted[i] += *to.weight * step[i];
  }
  for (int64_t i = 0; i < dims; ++i) {
    for (int64_t j = i; j < dims; ++j) row[j] = half[i] * step[j] + step[i] * half[j];
    for (const Sums& part : parts)
      for (int64_t j = i; j < dims; ++j) row[j] += part.outer[i * padded + j];
    std::copy(row.begin() + i, row.end(), to.outer + i * dims + i);
  }
  for (int64_t row = 0; row < dims; row += kRows)  // whole lines of the upper triangle to the lower one
    for (int64_t j = 0; j < std::min(row + kRows, dims); ++j)
      for (int64_t i = std::max(row, j + 1); i < std::min(row + kRows, dims); ++i)
        to.outer[i * dims + j] = to.outer[j * dims + i];
}

// The mean of a sample of tokens, near the mean of all: (groups, dims). The sample is spread evenly over all tokens,
// starting at 0.382 of the spacing, and its size is prime: otherwise it might consist of the class tokens of a batch,
// which are unlike the rest.
template <typename T>
void sample_mean(View x, int64_t tokens, int64_t groups, int64_t dims, double* mean) {
  const int64_t count = std::min(tokens, kSample);
  const auto place = [&](int64_t i) { return tokens * (1000 * std::min(i, count - 1) + 382) / (1000 * count); };
  std::fill_n(mean, groups * dims, 0.0);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < groups; ++g) {
      const T* later = x.at<T>(place(i + kAhead), g);
      for (int64_t d = 0; d < dims; d += kLine / int64_t(sizeof(T))) __builtin_prefetch(later + d);
      const T* token = x.at<T>(place(i), g);
      for (int64_t d = 0; d < dims; ++d) mean[g * dims + d] += load(token[d]);
    }
  for (int64_t i = 0; i < groups * dims; ++i) mean[i] /= double(count);
}

// Sums about `to.about`; if `centred`, they are about the mean of the tokens, which is written to `to.about`.
template <typename T, typename A>
void run(View x, View grad, bool centred, int64_t tokens, int64_t groups, int64_t dims, const Results& to) {
  const int64_t width = round_up(dims, kWidth), padded = round_up(dims, kRows);
  const int64_t ranges = round_up(groups, kGroupsPerTask) / kGroupsPerTask;
  const int64_t balanced = std::min(tokens / kFewestTokens, (kTasks + ranges - 1) / ranges);
  const int64_t splits = std::clamp<int64_t>(std::max(tokens / kMostTokens, balanced), 1, kMaxSplits);
  const int64_t size = 1 + 2 * dims + padded * padded;  // doubles of one group
  const std::unique_ptr<double[]> partial(new double[splits * groups * size]);
  auto at = [&](int64_t split, int64_t g) {
    double* p = partial.get() + (split * groups + g) * size;
    return Sums{p, p + 1, p + 1 + dims, p + 1 + 2 * dims};
  };
  if (centred) sample_mean<T>(x, tokens, groups, dims, to.about);
  std::vector<A> shift(groups * width, A(0));
  for (int64_t g = 0; g < groups; ++g)
    std::copy(to.about + g * dims, to.about + (g + 1) * dims, shift.begin() + g * width);
  auto finish_range = [&](Range mine) {
    for (int64_t g = mine.begin; g < mine.end; ++g) {
      std::vector<Sums> parts;
      for (int64_t split = 0; split < splits; ++split) parts.push_back(at(split, g));
      finish(parts, shift.data() + g * width, centred, double(tokens), dims, padded, to.of(g, dims));
    }
  };
  std::atomic<int64_t> taken{0};  // in turn: a thread that starts late or is slow does less
  std::vector<std::atomic<int64_t>> done(ranges);
  torch::stable::parallel_for(0, splits * ranges, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = taken++) < splits * ranges;) {
      const int64_t split = task / ranges, range = task % ranges;
      const Range mine = Range{0, groups}.part(range, ranges);
      Sums sums[kGroupsPerTask];
      for (int64_t g = mine.begin; g < mine.end; ++g) sums[g - mine.begin] = at(split, g);
      std::fill_n(sums[0].weight, mine.size() * size, 0.0);
      run_task<T, A>({x, grad, Range{0, tokens}.part(split, splits), mine, dims}, shift.data(), width, padded, sums);
      if (++done[range] == splits) finish_range(mine);  // all parts are there
    }
  });
}

using Tensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// x, grad (T, G, D) with unit stride along D. Returns float64 count (), shift (G, D), weight (G), plain (G, D),
// weighted (G, D) and outer (G, D, D): about `shift`, or about the mean of the tokens if there is none.
Tensors moments(const Tensor& x, const Tensor& grad, const Tensor* shift) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 3 && grad.dim() == 3, "token_moments: wrong number of dimensions");
  const int64_t tokens = x.size(0), groups = x.size(1), dims = x.size(2);
  STD_TORCH_CHECK(grad.size(0) == tokens && grad.size(1) == groups && grad.size(2) == dims &&
                      grad.scalar_type() == x.scalar_type(),
                  "token_moments: grad is not like x");
  const bool any = tokens > 0 && groups > 0 && dims > 0;
  const auto make = [&](std::vector<int64_t> size) {
    return any ? torch::stable::new_empty(x, size, ScalarType::Double)
               : torch::stable::new_zeros(x, size, ScalarType::Double);
  };
  Tensor count = make({}), about = make({groups, dims}), weight = make({groups}), plain = make({groups, dims});
  Tensor weighted = make({groups, dims}), outer = make({groups, dims, dims});
  const Results results{about.mutable_data_ptr<double>(), weight.mutable_data_ptr<double>(),
                        plain.mutable_data_ptr<double>(), weighted.mutable_data_ptr<double>(),
                        outer.mutable_data_ptr<double>()};
  *count.mutable_data_ptr<double>() = double(tokens);
  if (shift) std::copy_n(shift->const_data_ptr<double>(), groups * dims, results.about);
  if (any) {
    STD_TORCH_CHECK((x.stride(2) == 1 && grad.stride(2) == 1) || dims < 2,
                    "token_moments: x and grad must have unit stride along the last dimension");
    const View a{x.const_data_ptr(), x.stride(0), x.stride(1)};
    const View b{grad.const_data_ptr(), grad.stride(0), grad.stride(1)};
    auto call = [&](auto runner) { runner(a, b, shift == nullptr, tokens, groups, dims, results); };
    switch (x.scalar_type()) {
      case ScalarType::Float: call(run<float, float>); break;
      case ScalarType::Double: call(run<double, double>); break;
      case ScalarType::BFloat16: call(run<BFloat16, float>); break;
      case ScalarType::Half: call(run<Float16, float>); break;
      default: STD_TORCH_CHECK(false, "token_moments: unsupported dtype");
    }
  }
  return {count, about, weight, plain, weighted, outer};
}

// About `shift` (G, D), contiguous float64.
Tensors token_moments_cpu(const Tensor& x, const Tensor& grad, const Tensor& shift) {
  STD_TORCH_CHECK(shift.dim() == 2 && x.dim() == 3 && shift.size(0) == x.size(1) && shift.size(1) == x.size(2) &&
                      shift.is_contiguous() && shift.scalar_type() == torch::headeronly::ScalarType::Double,
                  "token_moments: shift must be a contiguous float64 tensor of shape (G, D)");
  return moments(x, grad, &shift);
}

Tensors centred_moments_cpu(const Tensor& x, const Tensor& grad) { return moments(x, grad, nullptr); }

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CPU, m) {
  m.impl("token_moments", TORCH_BOX(&skd::token_moments_cpu));
  m.impl("centred_moments", TORCH_BOX(&skd::centred_moments_cpu));
}
