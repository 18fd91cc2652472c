// Kernels of the weighted moments on CUDA; moments_cuda.cu launches them and says what they compute.
#pragma once

#include "cuda_math.h"

namespace skd {

// Work of one thread block for D coordinates padded to P, in stages of kStage tokens.
template <typename T, int P>
struct MomentsShape {
  static constexpr int kVector = 16 / sizeof(T);     // elements of one load
  static constexpr int kLanes = P / kVector;         // threads that share a token; they are in one warp
  static constexpr int kTileRows = P < 32 ? P : 32;  // coordinates a warp multiplies
  static constexpr int kTileColumns = P < 32 ? P : P < 128 ? 32 : 64;  // by these
  static constexpr int kColumns = P < 32 ? P : 32;                     // of the tile at a time: they need registers
  static constexpr int kAcross = P / kTileColumns;                     // tiles in a row
  static constexpr int kTiles = P / kTileRows * kAcross;
  static constexpr int kSlices = kTiles == 1 ? 4 : 1;  // warps that share a tile, each with its own tokens
  static constexpr int kThreads = 32 * kTiles * kSlices;
  static constexpr int kBlocks = P == 128 ? 1 : 3;  // per multiprocessor, at least: sets the register budget
  static constexpr int kRows = kThreads / kLanes;   // tokens the block loads at a time
  static constexpr int kPasses = 4;                 // loads of x and of grad in flight per thread
  static constexpr int kStage = kRows * kPasses;
  static constexpr int kStride = P + 8;  // of a staged row: 8 rows then start in 8 different bank groups
  static constexpr int kStagedBytes = 2 * kStage * kStride * 2;
  static constexpr int kSumBytes = kRows * P * 4;
  static constexpr int kBytes = kStagedBytes > kSumBytes ? kStagedBytes : kSumBytes;
  static_assert(kThreads % kLanes == 0 && kLanes <= 32 && kStage % (16 * kSlices) == 0 && kThreads >= P &&
                kBytes <= 48 * 1024);
};

struct MomentsInput {
  const void* x;
  const void* grad;
  const double* shift;                                                           // (G, D)
  int64_t x_token_stride, x_group_stride, grad_token_stride, grad_group_stride;  // in elements
  int64_t tokens, groups, tokens_per_split;
  int dims;
  bool aligned;  // rows may be read 16 bytes at a time
};

// What blocks leave for the second kernel: per split and group the weight, plain and weighted sums in float64, and
// per split, slice and group the P x P product in float.
struct MomentsPartial {
  double* linear;  // (splits, G, 1 + 2 P)
  float* outer;    // (splits * slices, G, P, P)
};

// The first `count` elements at `row`, zeros after them.
template <typename T>
__device__ __forceinline__ uint4 load_elements(const T* row, int count) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < int(16 / sizeof(T)); ++i) {
    if (i >= count) continue;
    if constexpr (sizeof(T) == 4)
      words[i] = bits_of(row[i]);
    else
      words[i / 2] |= uint32_t(row[i].bits) << 16 * (i % 2);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Grid (groups, splits).
template <typename T, int P>
__global__ void __launch_bounds__(MomentsShape<T, P>::kThreads, MomentsShape<T, P>::kBlocks)
    moments_of_block(const MomentsInput in, const MomentsPartial out) {
  using Shape = MomentsShape<T, P>;
  constexpr int V = Shape::kVector;
  constexpr int kPasses = Shape::kPasses, kRows = Shape::kRows, kStride = Shape::kStride;
  __shared__ __align__(16) unsigned char memory[Shape::kBytes];
  __shared__ __align__(16) float shift[P];
  uint16_t* const high = reinterpret_cast<uint16_t*>(memory);  // (kStage, kStride) bf16
  uint16_t* const low = high + Shape::kStage * kStride;        // the same, twice the remainder

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t group = blockIdx.x, split = blockIdx.y;
  const int64_t begin = split * in.tokens_per_split;
  const int tokens = int(begin + in.tokens_per_split < in.tokens ? in.tokens_per_split : in.tokens - begin);

  // When loading: coordinates first..first+V of tokens row, row + kRows, ... Threads and tokens that do not exist
  // read ones that do, so that loads have no condition; what they read is discarded when it is staged.
  const int row = thread / Shape::kLanes, first = thread % Shape::kLanes * V;
  const bool active = first < in.dims;
  const int column = active ? first : 0;
  const T* const x = static_cast<const T*>(in.x) + begin * in.x_token_stride + group * in.x_group_stride + column;
  const T* const grad =
      static_cast<const T*>(in.grad) + begin * in.grad_token_stride + group * in.grad_group_stride + column;
  uint4 x_raw[kPasses], grad_raw[kPasses];
  const auto fetch = [&](int stage) {
    if (in.aligned) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const int64_t token = min(stage + p * kRows + row, tokens - 1);
        x_raw[p] = __ldg(reinterpret_cast<const uint4*>(x + token * in.x_token_stride));
        grad_raw[p] = __ldg(reinterpret_cast<const uint4*>(grad + token * in.grad_token_stride));
      }
    } else {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const int64_t token = min(stage + p * kRows + row, tokens - 1);
        x_raw[p] = load_elements(x + token * in.x_token_stride, in.dims - column);
        grad_raw[p] = load_elements(grad + token * in.grad_token_stride, in.dims - column);
      }
    }
  };

  if (thread < P) shift[thread] = thread < in.dims ? float(in.shift[group * in.dims + thread]) : 0.0f;
  float plain[V] = {}, weighted[V] = {}, weight = 0;
  const float reciprocal = 1.0f / float(in.dims);

  // When multiplying: one tile, and of every stage the tokens 16 slice, 16 (slice + kSlices), ...
  constexpr int kHeight = Shape::kTileRows / 16, kWidth = Shape::kTileColumns / 8;  // of the tile, in instructions
  constexpr int kWide = Shape::kColumns / 8;
  const int slice = warp % Shape::kSlices, tile = warp / Shape::kSlices;
  const int tile_row = tile / Shape::kAcross * Shape::kTileRows;
  const int tile_column = tile % Shape::kAcross * Shape::kTileColumns;
  const int fragment = fragment_token(lane) * kStride + fragment_coordinate(lane);
  float total[kHeight][kWidth][4] = {};

  fetch(0);
  __syncthreads();  // shift is there
  for (int stage = 0; stage < tokens; stage += Shape::kStage) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const bool exists = active && stage + p * kRows + row < tokens;
      float xs[V], grads[V], w = 0;
      unpack<T>(x_raw[p], xs);
      unpack<T>(exists ? grad_raw[p] : make_uint4(0, 0, 0, 0), grads);
#pragma unroll
      for (int i = 0; i < V; ++i) w += taylor_term(xs[i], grads[i]);
#pragma unroll
      for (int offset = Shape::kLanes / 2; offset > 0; offset /= 2) w += __shfl_xor_sync(0xffffffffu, w, offset);
      w *= reciprocal;
      weight += w;
      const float root = square_root(w);
      uint32_t high_words[V / 2], low_words[V / 2];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        xs[i] = exists ? xs[i] - shift[first + i] : 0.0f;
        plain[i] += xs[i];
        weighted[i] += w * xs[i];
        xs[i] *= root;
      }
#pragma unroll
      for (int i = 0; i < V; i += 2) split_bf16(xs[i], xs[i + 1], high_words[i / 2], low_words[i / 2]);
      const int at = (p * kRows + row) * kStride + first;
      if constexpr (V == 8) {
        *reinterpret_cast<uint4*>(high + at) = make_uint4(high_words[0], high_words[1], high_words[2], high_words[3]);
        *reinterpret_cast<uint4*>(low + at) = make_uint4(low_words[0], low_words[1], low_words[2], low_words[3]);
      } else {
        *reinterpret_cast<uint2*>(high + at) = make_uint2(high_words[0], high_words[1]);
        *reinterpret_cast<uint2*>(low + at) = make_uint2(low_words[0], low_words[1]);
      }
    }
    __syncthreads();
    if (stage + Shape::kStage < tokens) fetch(stage + Shape::kStage);  // arrives while this stage is multiplied

    // The matrix unit truncates when it accumulates: let it add up one stage only.
#pragma unroll
    for (int start = 0; start < kWidth; start += kWide) {
      float sum[kHeight][kWide][4] = {};
#pragma unroll
      for (int k = 0; k < Shape::kStage; k += 16 * Shape::kSlices) {
        const int from = (k + 16 * slice) * kStride + fragment;
        uint32_t a[kHeight][4];
#pragma unroll
        for (int m = 0; m < kHeight; ++m) load_fragment(a[m], high + from + tile_row + 16 * m);
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int n = 0; n < kWide; n += 2) {
            uint32_t b[4];
            load_fragment(b, (part == 0 ? high : low) + from + tile_column + 8 * (start + n));
#pragma unroll
            for (int m = 0; m < kHeight; ++m) {
              multiply_add(sum[m][n], a[m], b[0], b[2]);
              multiply_add(sum[m][n + 1], a[m], b[1], b[3]);
            }
          }
      }
#pragma unroll
      for (int m = 0; m < kHeight; ++m)
#pragma unroll
        for (int n = 0; n < kWide; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[m][start + n][i] += sum[m][n][i];
    }
    __syncthreads();
  }

  float* const outer = out.outer + ((split * Shape::kSlices + slice) * in.groups + group) * (P * P);
#pragma unroll
  for (int m = 0; m < kHeight; ++m)
#pragma unroll
    for (int n = 0; n < kWidth; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = tile_row + 16 * m + accumulator_row(lane, half);
        const int j = tile_column + 8 * n + accumulator_column(lane);
        *reinterpret_cast<float2*>(outer + i * P + j) = make_float2(total[m][n][2 * half], total[m][n][2 * half + 1]);
      }

  // Sums of the threads that loaded the same coordinates, over rows in a fixed order.
  double* const linear = out.linear + (split * in.groups + group) * (1 + 2 * P);
  float* const sums = reinterpret_cast<float*>(memory);  // (kRows, P)
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[row * P + first + i] = kind == 0 ? plain[i] : weighted[i];
    __syncthreads();
    if (thread < P) {
      double sum = 0;
      for (int r = 0; r < kRows; ++r) sum += sums[r * P + thread];
      linear[1 + kind * P + thread] = sum;
    }
    __syncthreads();
  }
  if (first == 0) sums[row] = weight;
  __syncthreads();
  if (thread == 0) {
    double sum = 0;
    for (int r = 0; r < kRows; ++r) sum += sums[r];
    *linear = sum;
  }
}

constexpr int kFinishTile = 32, kFinishRows = 8;

// Sum of the partial products at (i, j) over splits and slices, in order.
__device__ __forceinline__ double sum_of_partials(const float* outer, int64_t count, int64_t step, int at) {
  double sum = 0;
#pragma unroll 4
  for (int64_t s = 0; s < count; ++s) sum += outer[s * step + at];
  return sum;
}

// Adds the partial results up in float64 and symmetrises. Grid: groups * tiles^2; block (kFinishTile, kFinishRows).
__global__ void __launch_bounds__(kFinishTile* kFinishRows)
    moments_of_group(const MomentsPartial in, int64_t groups, int64_t splits, int slices, int padded, int dims,
                     double* weight, double* plain, double* weighted, double* outer) {
  __shared__ double mirrored[kFinishTile][kFinishTile + 1];
  const int tiles = (dims + kFinishTile - 1) / kFinishTile;
  const int64_t group = blockIdx.x / (tiles * tiles);
  const int tile = blockIdx.x % (tiles * tiles);
  const int first_row = tile / tiles * kFinishTile, first_column = tile % tiles * kFinishTile;
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t step = groups * padded * padded;
  const float* const partial = in.outer + group * padded * padded;
  double sums[kFinishTile / kFinishRows];
#pragma unroll
  for (int r = 0; r < kFinishTile; r += kFinishRows) {
    const bool here = first_row + y + r < dims && first_column + x < dims;
    const bool there = first_column + y + r < dims && first_row + x < dims;
    const int at = (first_row + y + r) * padded + first_column + x;
    const int mirror = (first_column + y + r) * padded + first_row + x;
    sums[r / kFinishRows] = here ? sum_of_partials(partial, splits * slices, step, at) : 0.0;
    mirrored[y + r][x] = there ? sum_of_partials(partial, splits * slices, step, mirror) : 0.0;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kFinishTile; r += kFinishRows) {
    const int64_t i = first_row + y + r, j = first_column + x;
    if (i < dims && j < dims)
      outer[(group * dims + i) * dims + j] = 0.5 * (sums[r / kFinishRows] + mirrored[x][y + r]);
  }
  if (tile == 0) {
    const int64_t size = 1 + 2 * padded;
    for (int at = y * kFinishTile + x; at <= 2 * dims; at += kFinishTile * kFinishRows) {
      const int source = at <= dims ? at : 1 + padded + (at - 1 - dims);  // the partial sums are padded
      double sum = 0;
#pragma unroll 4
      for (int64_t s = 0; s < splits; ++s) sum += in.linear[(s * groups + group) * size + source];
      if (at == 0)
        weight[group] = sum;
      else if (at <= dims)
        plain[group * dims + at - 1] = sum;
      else
        weighted[group * dims + at - 1 - dims] = sum;
    }
  }
}

// Into how many ranges to cut `stages` so that groups * splits blocks, `capacity` at a time, finish soonest. A block
// costs about four stages on top of its own; more than `most` stages would accumulate too much in float.
inline int64_t choose_splits(int64_t groups, int64_t stages, int64_t capacity, int64_t most) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t fewest = ceil_div(stages, most);
  const int64_t last = fewest + 4 * capacity / groups;
  int64_t best = fewest, best_cost = INT64_MAX;
  for (int64_t splits = fewest; splits <= last && splits <= stages && splits <= 65535; ++splits) {
    const int64_t cost = ceil_div(groups * splits, capacity) * (ceil_div(stages, splits) + 4);
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

}  // namespace skd
