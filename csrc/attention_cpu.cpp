// Softmax attention and its gradient on the CPU, float32, for heads of any width.
//
// One task is one head of one image. Its queries are taken 64 at a time: their logits against all keys, the softmax and
// the products with the values stay in the second-level cache, up to some thousand tokens. The backward pass computes
// the logits again, bit for bit; of the forward pass it needs only the largest logit of each query and the sum of its
// exponentials. Matrices are packed, padded with zeros to whole tiles, and multiplied tile by tile, a tile being
// eight rows by one vector. With s = scale q k^T, p = softmax(s), o = p v:
//   dv = p^T do,  dp = do v^T,  ds = p (dp - sum_d do o),  dq = scale ds k,  dk = scale ds^T q.
// Exponentials are powers of two, because queries are multiplied by scale log2(e) when they are packed.

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

constexpr int64_t kQueries = 64;  // at a time
constexpr int64_t kRows = 8;      // of a tile, whose columns are one vector, or half of one
constexpr int64_t kColumns = 16;  // logits of a query are padded to a multiple
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// 2^t for t <= 0 (or above 0 by a rounding), to a few roundings of float32, and at least 2^-126. NaN stays NaN. It is
// a polynomial fitted to 2^f on [-1/2, 1/2], without branches, so that compilers vectorise it.
SKD_INLINE float exp2_of_negative(float t) {
  t = t < -126.0f ? -126.0f : t;
  const int32_t whole = int32_t(t - 0.5f);  // towards zero: the nearest
  const float f = t - float(whole);
  float power = 1.5337558e-4f;
  power = power * f + 1.33998657e-3f;
  power = power * f + 9.61851981e-3f;
  power = power * f + 5.55032901e-2f;
  power = power * f + 2.40226462e-1f;
  power = power * f + 6.93147182e-1f;
  power = power * f + 1.0f;
  return power * from_bits(uint32_t(whole + 127) << 23);
}

// A matrix in memory: element (i, j) is data[i * row + j * step].
struct Matrix {
  const float* data;
  int64_t row, step;
};

template <int64_t Bytes, bool Add>
SKD_INLINE void multiply_tile(Matrix left, const float* right, int64_t right_row, int64_t depth, float* out,
                              int64_t out_row) {
  Vector<float, Bytes> sum[kRows] = {};
  const float* a = left.data;
  for (int64_t d = 0; d < depth; ++d, a += left.step, right += right_row) {
    const auto columns = load_vector<Bytes>(right);
    for (int64_t r = 0; r < kRows; ++r) sum[r] += a[r * left.row] * columns;
  }
  for (int64_t r = 0; r < kRows; ++r) {
    float* to = out + r * out_row;
    store_vector<Bytes>(to, Add ? load_vector<Bytes>(to) + sum[r] : sum[r]);
  }
}

// out (rows, columns) = or += left (rows, depth) right (depth, columns); rows and columns are multiples of 8.
template <int64_t Bytes, bool Add = false>
SKD_INLINE void multiply(Matrix left, const float* right, int64_t right_row, int64_t rows, int64_t depth,
                         int64_t columns, float* out, int64_t out_row) {
  constexpr int64_t lanes = Bytes / sizeof(float);
  for (int64_t r = 0; r < rows; r += kRows) {
    const Matrix top = {left.data + r * left.row, left.row, left.step};
    int64_t c = 0;
    for (; c + lanes <= columns; c += lanes)
      multiply_tile<Bytes, Add>(top, right + c, right_row, depth, out + r * out_row + c, out_row);
    if (c < columns) multiply_tile<Bytes / 2, Add>(top, right + c, right_row, depth, out + r * out_row + c, out_row);
  }
}

// Copies factor * (rows, columns) of `from`, whose rows are `stride` apart, into rows of `width`, padded with zeros.
SKD_INLINE void pack(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t padded_rows,
                     int64_t width, float factor = 1.0f) {
  for (int64_t r = 0; r < padded_rows; ++r, from += stride, to += width) {
    const int64_t count = r < rows ? columns : 0;
    for (int64_t c = 0; c < count; ++c) to[c] = factor * from[c];
    for (int64_t c = count; c < width; ++c) to[c] = 0.0f;
  }
}

// The same, transposed: the result is (columns, width), where width is at least `rows`.
SKD_INLINE void pack_transposed(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                                int64_t width) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * width + r] = from[r * stride + c];
    for (int64_t r = rows; r < width; ++r) to[c * width + r] = 0.0f;
  }
}

// Sizes, and where a head's q, k and v of one image begin; tokens are `stride` apart.
struct Head {
  int64_t tokens, dims, stride;
  const float *q, *k, *v;
  float scale;

  int64_t width() const { return round_up(dims, kRows); }
  int64_t padded() const { return round_up(tokens, kColumns); }
};

// The largest of `count` values; `count` is a multiple of the lanes. The result may or may not be NaN if a value is.
template <int64_t Bytes>
SKD_INLINE float largest_of(const float* values, int64_t count) {
  constexpr int64_t lanes = Bytes / sizeof(float);
  Vector<float, Bytes> most = load_vector<Bytes>(values);
  for (int64_t i = lanes; i < count; i += lanes) {
    const auto v = load_vector<Bytes>(values + i);
    most = v > most ? v : most;
  }
  float result = most[0];
  for (int64_t i = 1; i < lanes; ++i) result = most[i] > result ? most[i] : result;
  return result;
}

// What the backward pass needs of one query: its largest logit, and the reciprocal of the sum of 2^(logit - largest).
struct Sum {
  float largest, inverse;
};

// Replaces one query's logits by 2^(logit - largest), not normalised; columns beyond `keys` become 2^-126 at most.
template <int64_t Bytes>
SKD_INLINE Sum softmax_row(float* p, int64_t keys, int64_t padded) {
  for (int64_t j = keys; j < padded; ++j) p[j] = -INFINITY;
  const float largest = largest_of<Bytes>(p, padded);
  float sum = 0.0f;
  for (int64_t j = 0; j < padded; ++j) sum += p[j] = exp2_of_negative(p[j] - largest);
  return {largest, 1.0f / sum};
}

// The forward pass of one head: out (tokens, dims; rows `out_stride` apart), and the sums of all its queries.
template <int64_t Bytes>
SKD_INLINE void head_forward(const Head& head, float* out, int64_t out_stride, Sum* sums) {
  const int64_t n = head.tokens, width = head.width(), padded = head.padded();
  std::vector<float> keys(head.dims * padded), values(n * width), queries(kQueries * width), result(kQueries * width);
  std::vector<float> weights(kQueries * padded);
  pack_transposed(head.k, head.stride, n, head.dims, keys.data(), padded);
  pack(head.v, head.stride, n, head.dims, values.data(), n, width);
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t count = std::min(kQueries, n - first), rows = round_up(count, kRows);
    pack(head.q + first * head.stride, head.stride, count, head.dims, queries.data(), rows, width,
         head.scale * kLog2E);
    multiply<Bytes>({queries.data(), width, 1}, keys.data(), padded, rows, head.dims, padded, weights.data(), padded);
    for (int64_t r = 0; r < count; ++r) sums[first + r] = softmax_row<Bytes>(weights.data() + r * padded, n, padded);
    multiply<Bytes>({weights.data(), padded, 1}, values.data(), width, rows, n, width, result.data(), width);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < head.dims; ++d)
        out[(first + r) * out_stride + d] = result[r * width + d] * sums[first + r].inverse;
  }
}

// The backward pass of one head: gradients laid out as q, k and v; rows of `out` and `grad` are `out_stride` apart.
template <int64_t Bytes>
SKD_INLINE void head_backward(const Head& head, const float* out, const float* grad, int64_t out_stride,
                              const Sum* sums, float* dq, float* dk, float* dv) {
  const int64_t n = head.tokens, width = head.width(), padded = head.padded();
  std::vector<float> keys(n * width), keys_across(head.dims * padded), values_across(head.dims * padded);
  std::vector<float> queries(kQueries * width), grads(kQueries * width), result(kQueries * width);
  std::vector<float> weights(kQueries * padded), slopes(kQueries * padded);
  std::vector<float> key_sums(padded * width, 0.0f), value_sums(padded * width, 0.0f);
  pack(head.k, head.stride, n, head.dims, keys.data(), n, width);
  pack_transposed(head.k, head.stride, n, head.dims, keys_across.data(), padded);
  pack_transposed(head.v, head.stride, n, head.dims, values_across.data(), padded);
  for (int64_t first = 0; first < n; first += kQueries) {
    const int64_t count = std::min(kQueries, n - first), rows = round_up(count, kRows);
    pack(head.q + first * head.stride, head.stride, count, head.dims, queries.data(), rows, width,
         head.scale * kLog2E);
    pack(grad + first * out_stride, out_stride, count, head.dims, grads.data(), rows, width);
    multiply<Bytes>({queries.data(), width, 1}, keys_across.data(), padded, rows, head.dims, padded, weights.data(),
                    padded);
    multiply<Bytes>({grads.data(), width, 1}, values_across.data(), padded, rows, head.dims, padded, slopes.data(),
                    padded);
    for (int64_t r = 0; r < rows; ++r) {
      float *p = weights.data() + r * padded, *ds = slopes.data() + r * padded;
      const int64_t keys_seen = r < count ? n : 0;
      float mean = 0.0f;
      for (int64_t d = 0; d < head.dims && r < count; ++d)
        mean += grads[r * width + d] * out[(first + r) * out_stride + d];
      const Sum sum = r < count ? sums[first + r] : Sum{};
      for (int64_t j = 0; j < keys_seen; ++j) {
        p[j] = exp2_of_negative(p[j] - sum.largest) * sum.inverse;
        ds[j] = p[j] * (ds[j] - mean);
      }
      for (int64_t j = keys_seen; j < padded; ++j) p[j] = ds[j] = 0.0f;
    }
    multiply<Bytes>({slopes.data(), padded, 1}, keys.data(), width, rows, n, width, result.data(), width);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < head.dims; ++d) dq[(first + r) * head.stride + d] = head.scale * result[r * width + d];
    multiply<Bytes, true>({weights.data(), 1, padded}, grads.data(), width, padded, rows, width, value_sums.data(),
                          width);
    multiply<Bytes, true>({slopes.data(), 1, padded}, queries.data(), width, padded, rows, width, key_sums.data(),
                          width);
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < head.dims; ++d) {
      dk[j * head.stride + d] = kLn2 * key_sums[j * width + d];  // removes log2(e), which packing put into q
      dv[j * head.stride + d] = value_sums[j * width + d];
    }
}

// One version for each size of vector registers.
#define SKD_VERSIONS(NAME, BYTES, ATTRIBUTE)                                                                           \
  ATTRIBUTE void forward_##NAME(const Head& head, float* out, int64_t out_stride, Sum* sums) {                         \
    head_forward<BYTES>(head, out, out_stride, sums);                                                                  \
  }                                                                                                                    \
  ATTRIBUTE void backward_##NAME(const Head& head, const float* out, const float* grad, int64_t out_stride,            \
                                 const Sum* sums, float* dq, float* dk, float* dv) {                                   \
    head_backward<BYTES>(head, out, grad, out_stride, sums, dq, dk, dv);                                               \
  }
SKD_VERSIONS(narrow, 16, )
#ifdef SKD_LEVELS
SKD_VERSIONS(middle, 32, __attribute__((target("arch=x86-64-v3"))))
SKD_VERSIONS(wide, 64, __attribute__((target("arch=x86-64-v4"))))
#define SKD_BEST(KIND) \
  (register_bytes() == 64 ? KIND##_wide : register_bytes() == 32 ? KIND##_middle : KIND##_narrow)
#else
#define SKD_BEST(KIND) KIND##_narrow
#endif

// The head `which` (image x heads + head) of qkv (B, N, 3, H, D), contiguous.
Head head_of(const Tensor& qkv, int64_t which, double scale) {
  const int64_t tokens = qkv.size(1), heads = qkv.size(3), dims = qkv.size(4), stride = 3 * heads * dims;
  const float* q = qkv.const_data_ptr<float>() + which / heads * tokens * stride + which % heads * dims;
  return {tokens, dims, stride, q, q + heads * dims, q + 2 * heads * dims, float(scale)};
}

void check(const Tensor& tensor, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.dim() == dimensions && tensor.is_contiguous() &&
                      tensor.scalar_type() == torch::headeronly::ScalarType::Float,
                  "attention: tensors must be float32 and contiguous, with the right number of dimensions");
}

// qkv (B, N, 3, H, D), none of them 0. Returns out (B, N, H, D) and the sums (B, H, N, 2) that the gradient needs.
std::tuple<Tensor, Tensor> attention_cpu(const Tensor& qkv, double scale) {
  check(qkv, 5);
  STD_TORCH_CHECK(qkv.size(2) == 3, "attention: qkv must have shape (B, N, 3, H, D)");
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), dims = qkv.size(4);
  Tensor out = torch::stable::new_empty(qkv, {batch, tokens, heads, dims});
  Tensor sums = torch::stable::new_empty(qkv, {batch, heads, tokens, 2});
  float* out_data = out.mutable_data_ptr<float>();
  Sum* sum_data = reinterpret_cast<Sum*>(sums.mutable_data_ptr<float>());
  const auto forward = SKD_BEST(forward);
  torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      forward(head_of(qkv, i, scale), out_data + (i / heads * tokens * heads + i % heads) * dims, heads * dims,
              sum_data + i * tokens);
  });
  return {out, sums};
}

// grad and out (B, N, H, D). Returns the gradient at qkv (B, N, 3, H, D).
Tensor attention_backward_cpu(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& sums,
                              double scale) {
  check(qkv, 5), check(grad, 4), check(out, 4), check(sums, 4);
  for (const Tensor* like : {&grad, &out})
    STD_TORCH_CHECK(like->size(0) == qkv.size(0) && like->size(1) == qkv.size(1) && like->size(2) == qkv.size(3) &&
                        like->size(3) == qkv.size(4),
                    "attention_backward: grad and out must have shape (B, N, H, D)");
  STD_TORCH_CHECK(qkv.size(2) == 3 && sums.numel() == 2 * qkv.size(0) * qkv.size(1) * qkv.size(3),
                  "attention_backward: qkv must have shape (B, N, 3, H, D), sums (B, H, N, 2)");
  const int64_t tokens = qkv.size(1), heads = qkv.size(3), dims = qkv.size(4);
  Tensor result = torch::stable::empty_like(qkv);
  const float *out_data = out.const_data_ptr<float>(), *grad_data = grad.const_data_ptr<float>();
  const float* qkv_data = qkv.const_data_ptr<float>();
  const Sum* sum_data = reinterpret_cast<const Sum*>(sums.const_data_ptr<float>());
  float* result_data = result.mutable_data_ptr<float>();
  const auto backward = SKD_BEST(backward);
  torch::stable::parallel_for(0, qkv.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Head head = head_of(qkv, i, scale);
      const int64_t at = (i / heads * tokens * heads + i % heads) * dims;
      float* dq = result_data + (head.q - qkv_data);
      backward(head, out_data + at, grad_data + at, heads * dims, sum_data + i * tokens, dq, dq + heads * dims,
               dq + 2 * heads * dims);
    }
  });
  return result;
}

}  // namespace
}  // namespace skd

STABLE_TORCH_LIBRARY_IMPL(skd_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&skd::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&skd::attention_backward_cpu));
}
