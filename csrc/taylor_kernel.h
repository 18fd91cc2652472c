// Kernels of the Taylor scores on CUDA; taylor_cuda.cu launches them and says what they compute.
#pragma once

#include <type_traits>

#include "cuda_math.h"

namespace skd {

constexpr int kTaylorThreads = 256;
constexpr int kTaylorUnroll = 4;                  // tokens at a time: 8 loads in flight per thread
constexpr int kTaylorRun = 64;                    // tokens of a thread summed in float
constexpr int kTaylorTile = 32, kTaylorRows = 8;  // of the second kernel

struct TaylorInput {
  const void* x;
  const void* grad;
  int64_t x_stride, grad_stride;  // of tokens, in elements
  int64_t tokens, dims, splits;
  int lanes;  // threads next to each other along the coordinates: a power of two, at most 32
};

// Lanes for rows of `vectors` loads.
inline int taylor_lanes(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

// V neighbouring elements: 16 bytes where rows are aligned, else one element.
template <typename T, int V>
struct Elements {
  using Raw = std::conditional_t<V == 1, T, uint4>;
  Raw raw;
  __device__ __forceinline__ void load(const T* at) {
    if constexpr (V == 1)
      raw = *at;
    else
      raw = __ldg(reinterpret_cast<const uint4*>(at));
  }
  __device__ __forceinline__ void to_floats(float (&values)[V]) const {
    if constexpr (V == 1)
      values[0] = to_float(raw);
    else
      unpack<T>(raw, values);
  }
};

// |x g| is summed in float over a run of tokens. (x g)^2 would underflow in float where gradients are small. The
// product of two half-precision numbers is exact in float, so only its square is taken in float64.
template <typename T, int V, bool Squared>
__device__ __forceinline__ void add_terms(const Elements<T, V>& x, const Elements<T, V>& grad,
                                          std::conditional_t<Squared, double, float> (&sum)[V]) {
  float xs[V], grads[V];
  x.to_floats(xs);
  grad.to_floats(grads);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float term = taylor_term(xs[i], grads[i]);
    if constexpr (Squared)
      sum[i] += double(term) * double(term);
    else
      sum[i] += term;
  }
}

// Grid (blocks of coordinates, splits): partial sums, (splits, D).
template <typename T, int V, bool Squared>
__global__ void __launch_bounds__(kTaylorThreads, 3) taylor_of_block(const TaylorInput in, double* partial) {
  __shared__ double sums[kTaylorThreads * V];  // (rows, lanes V)
  const int lane = threadIdx.x % in.lanes, row = threadIdx.x / in.lanes, rows = kTaylorThreads / in.lanes;
  const int64_t split = blockIdx.y;
  const int64_t first = (int64_t(blockIdx.x) * in.lanes + lane) * V;
  const int64_t begin = in.tokens * split / in.splits, end = in.tokens * (split + 1) / in.splits;

  double total[V] = {};
  if (first < in.dims) {
    const int64_t x_step = rows * in.x_stride, grad_step = rows * in.grad_stride;
    const T* x = static_cast<const T*>(in.x) + (begin + row) * in.x_stride + first;
    const T* grad = static_cast<const T*>(in.grad) + (begin + row) * in.grad_stride + first;
    int64_t left = (end - begin - row + rows - 1) / rows;  // tokens of this thread; not positive: none
    while (left > 0) {
      std::conditional_t<Squared, double, float> sum[V] = {};
      int run = static_cast<int>(left < kTaylorRun ? left : kTaylorRun);
      left -= run;
      for (; run >= kTaylorUnroll; run -= kTaylorUnroll) {
        Elements<T, V> xs[kTaylorUnroll], grads[kTaylorUnroll];
#pragma unroll
        for (int u = 0; u < kTaylorUnroll; ++u) {
          xs[u].load(x + u * x_step);
          grads[u].load(grad + u * grad_step);
        }
        x += kTaylorUnroll * x_step;
        grad += kTaylorUnroll * grad_step;
#pragma unroll
        for (int u = 0; u < kTaylorUnroll; ++u) add_terms<T, V, Squared>(xs[u], grads[u], sum);
      }
#pragma unroll 1
      for (; run > 0; --run, x += x_step, grad += grad_step) {
        Elements<T, V> one, other;
        one.load(x);
        other.load(grad);
        add_terms<T, V, Squared>(one, other, sum);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) total[i] += sum[i];
    }
  }
  const int width = in.lanes * V;
#pragma unroll
  for (int i = 0; i < V; ++i) sums[row * width + lane * V + i] = total[i];
  __syncthreads();
  const int64_t column = int64_t(blockIdx.x) * width + threadIdx.x;
  if (int(threadIdx.x) < width && column < in.dims) {
    double sum = 0;
    for (int r = 0; r < rows; ++r) sum += sums[r * width + threadIdx.x];
    partial[split * in.dims + column] = sum;
  }
}

// Sums over splits in a fixed order. Block (kTaylorTile, kTaylorRows).
__global__ void __launch_bounds__(kTaylorTile* kTaylorRows)
    taylor_of_coordinate(const double* partial, int64_t splits, int64_t dims, double* scores) {
  __shared__ double sums[kTaylorRows][kTaylorTile];
  const int64_t column = int64_t(blockIdx.x) * kTaylorTile + threadIdx.x;
  double sum = 0;
  if (column < dims)
    for (int64_t split = threadIdx.y; split < splits; split += kTaylorRows) sum += partial[split * dims + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < dims) {
    for (int row = 1; row < kTaylorRows; ++row) sum += sums[row][threadIdx.x];
    scores[column] = sum;
  }
}

}  // namespace skd
