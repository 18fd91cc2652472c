// The first kernel of the weighted moments on CUDA: sums over ranges of tokens. moments_cuda.cu explains the whole.
#pragma once

#include "cuda_math.h"

namespace skd {

constexpr int kSample = 31;  // tokens whose mean stands in for that of all while they are summed

// Work of one thread block for D coordinates padded to P, in stages of kStage tokens.
template <typename T, int P>
struct MomentsShape {
  static constexpr int kVector = 16 / sizeof(T);     // elements of one load
  static constexpr int kLanes = P / kVector;         // threads that share a token; they are in one warp
  static constexpr int kTileRows = P < 32 ? P : 32;  // coordinates a warp multiplies
  static constexpr int kTileColumns = P < 32 ? P : P < 128 ? 32 : 64;  // by these
  static constexpr int kColumns = P < 32 ? P : 32;                     // multiplied at a time, to save registers
  static constexpr int kAcross = P / kTileColumns;                     // tiles in a row
  static constexpr int kTiles = P / kTileRows * kAcross;
  static constexpr int kSlices = kTiles == 1 ? 4 : 1;  // warps that share a tile, each with its own tokens
  static constexpr int kThreads = 32 * kTiles * kSlices;
  static constexpr int kBlocks = P == 128 ? 1 : 3;  // per multiprocessor, at least: sets the register budget
  static constexpr int kRows = kThreads / kLanes;   // tokens the block loads at a time
  static constexpr int kPasses = 4;                 // loads of x and of grad in flight per thread
  static constexpr int kStage = kRows * kPasses;
  static constexpr int kStride = P + 8;  // length of a staged row: 8 rows then start in 8 different bank groups
  static constexpr int kStagedBytes = 2 * kStage * kStride * 2;
  static constexpr int kSumBytes = kRows * P * 4;
  static constexpr int kBytes = kStagedBytes > kSumBytes ? kStagedBytes : kSumBytes;
  static_assert(kThreads % kLanes == 0 && kLanes <= 32 && kStage % (16 * kSlices) == 0 && kThreads >= P &&
                kBytes <= 48 * 1024);
};

// (T, G, D) with unit stride along D.
struct MomentsView {
  const void* data;
  int64_t token_stride, group_stride;  // in bytes
};

struct MomentsInput {
  MomentsView x, grad;
  const double* shift;  // (G, D), what the results are about; null: the mean of the tokens
  int64_t tokens, groups, tokens_per_split;
  int dims;
  bool aligned;  // rows may be read 16 bytes at a time
};

// What the first kernel leaves for the second: for each split, slice and group the P x P product; for each group the
// point that was subtracted; for each split and group the weight, plain and weighted sums.
struct MomentsPartial {
  float* outer;    // (splits * slices, G, P, P)
  float* point;    // (G, P)
  double* linear;  // (splits, G, 1 + 2 P)
};

// Where the results go: (), (G, D), (G), (G, D), (G, D), (G, D, D).
struct MomentsResults {
  double *count, *shift, *weight, *plain, *weighted, *outer;
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

// What one thread of a block loads: V coordinates of the tokens row, row + kRows, ... of every stage. Threads and
// tokens that do not exist read ones that do, so that loads have no condition; what they read is discarded later.
template <typename T, int P>
struct MomentsLoads {
  using Shape = MomentsShape<T, P>;

  int row, first;  // the token of a stage and the first coordinate
  bool active;     // whether there is such a coordinate
  int count;       // of coordinates from there on
  int tokens;      // of the block
  const char *x, *grad;
  uint64_t x_stride, grad_stride;
  uint4 x_raw[Shape::kPasses], grad_raw[Shape::kPasses];

  __device__ __forceinline__ MomentsLoads(const MomentsInput& in, int64_t group, int64_t split)
      : row(threadIdx.x / Shape::kLanes), first(threadIdx.x % Shape::kLanes * Shape::kVector), active(first < in.dims) {
    const int column = active ? first : 0;
    const int64_t begin = split * in.tokens_per_split;
    count = in.dims - column;
    tokens = int(min(in.tokens_per_split, in.tokens - begin));
    x = at(in.x, begin, group, column), x_stride = in.x.token_stride;
    grad = at(in.grad, begin, group, column), grad_stride = in.grad.token_stride;
  }

  __device__ __forceinline__ static const char* at(const MomentsView& view, int64_t token, int64_t group, int column) {
    return static_cast<const char*>(view.data) + token * view.token_stride + group * view.group_stride +
           column * int(sizeof(T));
  }

  template <bool Aligned>
  __device__ __forceinline__ uint4 load(const char* from) const {
    if constexpr (Aligned)
      return __ldg(reinterpret_cast<const uint4*>(from));
    else
      return load_elements(reinterpret_cast<const T*>(from), count);
  }

  template <bool Aligned>
  __device__ __forceinline__ void fetch(int stage) {
#pragma unroll
    for (int p = 0; p < Shape::kPasses; ++p) {
      const uint32_t token = min(stage + p * Shape::kRows + row, tokens - 1);  // unsigned: its product is cheaper
      x_raw[p] = load<Aligned>(x + token * x_stride);
      grad_raw[p] = load<Aligned>(grad + token * grad_stride);
    }
  }
};

// The index of the i-th token of the sample. The sample is spread evenly over all tokens, starting at 0.382 of the
// spacing, and its size is prime: otherwise it might consist of the class tokens of a batch, which are unlike the
// rest.
SKD_HD int64_t sampled_token(int64_t i, int64_t tokens) {
  return tokens < kSample ? i : tokens * (1000 * i + 382) / (1000 * kSample);
}

// The mean of the sample at the coordinate `threadIdx.x`, which is near the mean of all tokens. Every block of a
// group adds the same numbers in the same order, so all get the same bits. `sums` (kRows, P) is scratch.
template <typename T, int P, bool Aligned>
__device__ __forceinline__ float sampled_mean(const MomentsInput& in, int64_t group, const MomentsLoads<T, P>& loads,
                                              float* sums) {
  using Shape = MomentsShape<T, P>;
  constexpr int V = Shape::kVector, kRows = Shape::kRows, kLoads = (kSample + kRows - 1) / kRows;
  const int number = int(min(in.tokens, int64_t(kSample))), column = loads.active ? loads.first : 0;
  uint4 raw[kLoads];
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const int64_t token = sampled_token(min(l * kRows + loads.row, number - 1), in.tokens);
    raw[l] = loads.template load<Aligned>(loads.at(in.x, token, group, column));
  }
  float sum[V] = {};
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    float xs[V];
    unpack<T>(raw[l], xs);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += l * kRows + loads.row < number ? xs[i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sums[loads.row * P + loads.first + i] = sum[i];
  __syncthreads();
  float total = 0;
  if (threadIdx.x < P)
    for (int r = 0; r < min(kRows, kSample); ++r) total += sums[r * P + threadIdx.x];
  return total / float(number);
}

__device__ __forceinline__ void store_words(uint16_t* at, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void store_words(uint16_t* at, const uint32_t (&words)[2]) {
  *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
}

// A thread's sums for its coordinates.
template <int V>
struct MomentsSums {
  float plain[V] = {}, weighted[V] = {}, weight = 0;
};

// Writes sqrt(w) y of the fetched tokens to shared memory as bf16: `high`, and in `low` twice the remainder. In a
// `Whole` stage all tokens exist. Coordinates past D get numbers that nobody reads.
template <bool Whole, typename T, int P>
__device__ __forceinline__ void stage_tokens(const MomentsLoads<T, P>& loads, int stage, float reciprocal,
                                             const float* points, uint16_t* high, uint16_t* low,
                                             MomentsSums<16 / sizeof(T)>& sums) {
  using Shape = MomentsShape<T, P>;
  constexpr int V = Shape::kVector;
  float point[V];  // read again in every stage, because the products need its registers
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(points + loads.first + i);
    point[i] = four.x, point[i + 1] = four.y, point[i + 2] = four.z, point[i + 3] = four.w;
  }
#pragma unroll
  for (int p = 0; p < Shape::kPasses; ++p) {
    const bool exists = Whole || stage + p * Shape::kRows + loads.row < loads.tokens;
    float xs[V], grads[V], w = 0;
    unpack<T>(loads.x_raw[p], xs);
    unpack<T>(loads.grad_raw[p], grads);
#pragma unroll
    for (int i = 0; i < V; ++i) w += taylor_term(xs[i], grads[i]);
    if (!exists || !loads.active) w = 0;
#pragma unroll
    for (int offset = Shape::kLanes / 2; offset > 0; offset /= 2) w += __shfl_xor_sync(0xffffffffu, w, offset);
    w *= reciprocal;
    sums.weight += w;
    const float root = square_root(w);
    uint32_t high_words[V / 2], low_words[V / 2];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      xs[i] = exists ? xs[i] - point[i] : 0.0f;
      sums.plain[i] += xs[i];
      sums.weighted[i] += w * xs[i];
      xs[i] *= root;
    }
#pragma unroll
    for (int i = 0; i < V; i += 2) split_bf16(xs[i], xs[i + 1], high_words[i / 2], low_words[i / 2]);
    const int at = (p * Shape::kRows + loads.row) * Shape::kStride + loads.first;
    store_words(high + at, high_words);
    store_words(low + at, low_words);
  }
}

// The product of one warp: one tile, summed over the 16 tokens from 16 slice, 16 (slice + kSlices), ... of each
// stage.
template <typename T, int P>
struct MomentsTile {
  using Shape = MomentsShape<T, P>;
  static constexpr int kHeight = Shape::kTileRows / 16, kWidth = Shape::kTileColumns / 8;  // in instructions
  static constexpr int kWide = Shape::kColumns / 8;

  int lane, slice, row, column;  // of the tile's first entry
  int left, right;               // where this lane's rows of the fragments begin
  float total[kHeight][kWidth][4] = {};

  __device__ __forceinline__ MomentsTile() {
    const int warp = threadIdx.x / 32, tile = warp / Shape::kSlices;
    lane = threadIdx.x % 32, slice = warp % Shape::kSlices;
    row = tile / Shape::kAcross * Shape::kTileRows, column = tile % Shape::kAcross * Shape::kTileColumns;
    left = (16 * slice + left_token(lane)) * Shape::kStride + left_coordinate(lane) + row;
    right = (16 * slice + right_token(lane)) * Shape::kStride + right_coordinate(lane) + column;
  }

  // Adds the product of the staged tokens, some columns at a time. Tensor cores truncate when they accumulate, so
  // their accumulators cover one stage only, and are then added to the sums in ordinary float32.
  __device__ __forceinline__ void add_stage(const uint16_t* high, const uint16_t* low) {
#pragma unroll
    for (int start = 0; start < kWidth; start += kWide) {
      float sum[kHeight][kWide][4] = {};
#pragma unroll
      for (int k = 0; k < Shape::kStage; k += 16 * Shape::kSlices) {
        uint32_t a[kHeight][4];
#pragma unroll
        for (int m = 0; m < kHeight; ++m) load_fragment(a[m], high + left + k * Shape::kStride + 16 * m);
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int n = 0; n < kWide; n += 2) {
            uint32_t b[4];
            load_fragment(b, (part == 0 ? high : low) + right + k * Shape::kStride + 8 * (start + n));
#pragma unroll
            for (int m = 0; m < kHeight; ++m) {
              multiply_add(sum[m][n], a[m], b[0], b[1]);
              multiply_add(sum[m][n + 1], a[m], b[2], b[3]);
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
  }

  __device__ __forceinline__ void write(float* outer) const {
#pragma unroll
    for (int m = 0; m < kHeight; ++m)
#pragma unroll
      for (int n = 0; n < kWidth; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = row + 16 * m + accumulator_row(lane, half), j = column + 8 * n + accumulator_column(lane);
          const float* const pair = &total[m][n][2 * half];
          *reinterpret_cast<float2*>(outer + i * P + j) = make_float2(pair[0], pair[1]);
        }
  }
};

// Adds the sums of all threads that loaded the same coordinates, in a fixed order. `scratch` is (kRows, P).
template <typename T, int P>
__device__ __forceinline__ void write_sums(const MomentsLoads<T, P>& loads, const MomentsSums<16 / sizeof(T)>& sums,
                                           float* scratch, double* linear) {
  constexpr int kRows = MomentsShape<T, P>::kRows;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
    for (int i = 0; i < int(16 / sizeof(T)); ++i)
      scratch[loads.row * P + loads.first + i] = kind == 0 ? sums.plain[i] : sums.weighted[i];
    __syncthreads();
    if (threadIdx.x < P) {
      double sum = 0;
      for (int r = 0; r < kRows; ++r) sum += scratch[r * P + threadIdx.x];
      linear[1 + kind * P + threadIdx.x] = sum;
    }
    __syncthreads();
  }
  if (loads.first == 0) scratch[loads.row] = sums.weight;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int r = 0; r < kRows; ++r) sum += scratch[r];
    *linear = sum;
  }
}

// The kernel: sums over one group and one range of tokens, about a point that is exact in float. Grid (groups,
// splits).
template <typename T, int P>
__global__ void __launch_bounds__(MomentsShape<T, P>::kThreads, MomentsShape<T, P>::kBlocks)
    moments_of_block(const MomentsInput in, const MomentsPartial out) {
  using Shape = MomentsShape<T, P>;
  __shared__ __align__(16) unsigned char memory[Shape::kBytes];
  __shared__ __align__(16) float points[P];
  uint16_t* const high = reinterpret_cast<uint16_t*>(memory);  // (kStage, kStride) bf16
  uint16_t* const low = high + Shape::kStage * Shape::kStride;
  float* const scratch = reinterpret_cast<float*>(memory);
  const int64_t group = blockIdx.x, split = blockIdx.y;
  const int thread = threadIdx.x;

  MomentsLoads<T, P> loads(in, group, split);
  const auto fetch = [&](int stage) {
    in.aligned ? loads.template fetch<true>(stage) : loads.template fetch<false>(stage);
  };
  fetch(0);  // arrives while the point is found
  float mine = 0;
  if (in.shift != nullptr)
    mine = thread < in.dims ? float(in.shift[group * in.dims + thread]) : 0.0f;
  else
    mine = in.aligned ? sampled_mean<T, P, true>(in, group, loads, scratch)
                      : sampled_mean<T, P, false>(in, group, loads, scratch);
  if (thread < P) {
    points[thread] = mine;
    if (split == 0) out.point[group * P + thread] = mine;
  }
  __syncthreads();

  MomentsSums<Shape::kVector> sums;
  MomentsTile<T, P> tile;
  const float reciprocal = 1.0f / float(in.dims);
  for (int stage = 0; stage < loads.tokens; stage += Shape::kStage) {
    if (stage + Shape::kStage <= loads.tokens)
      stage_tokens<true>(loads, stage, reciprocal, points, high, low, sums);
    else
      stage_tokens<false>(loads, stage, reciprocal, points, high, low, sums);
    __syncthreads();
    if (stage + Shape::kStage < loads.tokens) fetch(stage + Shape::kStage);  // arrives while this stage is multiplied
    tile.add_stage(high, low);
    __syncthreads();
  }
  tile.write(out.outer + ((split * Shape::kSlices + tile.slice) * in.groups + group) * (P * P));
  write_sums(loads, sums, scratch, out.linear + (split * in.groups + group) * (1 + 2 * P));
}

}  // namespace skd
