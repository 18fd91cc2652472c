// The second kernel of the weighted moments on CUDA, which adds up the partial sums of the first; and the launch of
// both.
#pragma once

#include "moments_kernel.h"

namespace skd {

constexpr int kFinishTile = 16;   // coordinates
constexpr int kFinishLanes = 4;   // threads that share the partial products of the same four entries
constexpr int kFinishFlight = 8;  // loads of partial products in flight per thread
constexpr int kFinishVectors = kFinishTile * kFinishTile / 4;
constexpr int kFinishThreads = 2 * kFinishVectors * kFinishLanes;  // of a tile and its mirror image
constexpr int kFinishColumns = 4 * kFinishTile;                    // plain and weighted sums of both
constexpr int kLinearLanes = kFinishThreads / kFinishColumns;      // threads that share one of those columns
static_assert(kFinishThreads == 2 * kFinishTile * kFinishTile);    // one for each entry of both

// What the threads of the second kernel exchange.
struct MomentsFinish {
  double outer[kFinishLanes][2][kFinishTile][kFinishTile + 1];
  double linear[kLinearLanes][kFinishColumns];
  double weight[kLinearLanes];
  double step[2 * kFinishTile], half[2 * kFinishTile];
};

// A tile of a group's result, on the diagonal or above it, and its mirror image below. One block finishes both,
// because partial products are not symmetric and each result needs entries of both tiles. `rows` and `columns` count
// tiles.
struct MomentsPair {
  int64_t group;
  int rows, columns;

  __device__ __forceinline__ MomentsPair(uint32_t block, int tiles) : group(block / pairs(tiles)), rows(0) {
    for (columns = block % pairs(tiles); columns >= tiles - rows; ++rows) columns -= tiles - rows;
    columns += rows;
  }
  SKD_HD static uint32_t pairs(int tiles) { return tiles * (tiles + 1) / 2; }
  // The i-th coordinate of the rows and then of the columns.
  __device__ __forceinline__ int coordinate(int i) const {
    return (i < kFinishTile ? rows : columns) * kFinishTile + i % kFinishTile;
  }
};

// The sums of four neighbouring entries over every kFinishLanes-th of `count` partial products, starting at `lane`;
// partial products are `step` apart.
__device__ __forceinline__ void sum_products(const float* at, int count, int64_t step, int lane, double (&sum)[4]) {
  at += lane * step;
  for (int left = count - lane; left > 0; left -= kFinishLanes * kFinishFlight) {
    float4 values[kFinishFlight];
#pragma unroll
    for (int f = 0; f < kFinishFlight; ++f, at += kFinishLanes * step)
      values[f] = f * kFinishLanes < left ? *reinterpret_cast<const float4*>(at) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int f = 0; f < kFinishFlight; ++f)
      sum[0] += values[f].x, sum[1] += values[f].y, sum[2] += values[f].z, sum[3] += values[f].w;
  }
}

// Sums the partial products of both tiles into shared memory, reading each once. A tile on the diagonal has no mirror
// image.
__device__ __forceinline__ void gather_products(const MomentsPartial& in, const MomentsPair& pair, int64_t groups,
                                                int count, int padded, MomentsFinish& shared) {
  const int vector = threadIdx.x % kFinishVectors, mirrored = threadIdx.x / kFinishVectors % 2;
  const int lane = threadIdx.x / (2 * kFinishVectors);
  const int row = vector / (kFinishTile / 4), column = vector % (kFinishTile / 4) * 4;
  if (mirrored && pair.rows == pair.columns) return;
  const int i = (mirrored ? pair.columns : pair.rows) * kFinishTile + row;
  const int j = (mirrored ? pair.rows : pair.columns) * kFinishTile + column;
  double sum[4] = {};
  const int64_t step = groups * padded * padded;
  sum_products(in.outer + (pair.group * padded + i) * padded + j, count, step, lane, sum);
#pragma unroll
  for (int c = 0; c < 4; ++c) shared.outer[lane][mirrored][row][column + c] = sum[c];
}

// The same for the plain and weighted sums of the coordinates of both tiles, and for the weight.
__device__ __forceinline__ void gather_linear(const MomentsPartial& in, const MomentsPair& pair, int64_t groups,
                                              int splits, int padded, MomentsFinish& shared) {
  const int column = threadIdx.x % kFinishColumns, lane = threadIdx.x / kFinishColumns;
  const int kind = column / (2 * kFinishTile), coordinate = pair.coordinate(column % (2 * kFinishTile));
  const int64_t size = 1 + 2 * padded;
  const int64_t step = kLinearLanes * groups * size;
  const double* linear = in.linear + (lane * groups + pair.group) * size;
  double sum = 0, weight = 0;
#pragma unroll 4
  for (int s = lane; s < splits; s += kLinearLanes, linear += step) {
    weight += linear[0];
    sum += linear[1 + kind * padded + coordinate];
  }
  shared.linear[lane][column] = sum;
  if (column == 0) shared.weight[lane] = weight;
}

// Re-bases one coordinate's sums from the point to the shift. With `step` the difference of the two and
// half = sum w y + sum w step / 2, the outer product grows by half step^T + step half^T.
__device__ __forceinline__ void rebase(const MomentsInput& in, const MomentsPartial& partial, const MomentsPair& pair,
                                       int padded, const MomentsResults& to, MomentsFinish& shared) {
  const int mine = threadIdx.x, coordinate = pair.coordinate(mine);
  if (coordinate >= in.dims) return;
  double plain = 0, weighted = 0, weight = 0;
  for (int lane = 0; lane < kLinearLanes; ++lane) {
    plain += shared.linear[lane][mine];
    weighted += shared.linear[lane][2 * kFinishTile + mine];
    weight += shared.weight[lane];
  }
  const int64_t at = pair.group * in.dims + coordinate;
  const double count = double(in.tokens), point = partial.point[pair.group * padded + coordinate];
  const double shift = in.shift != nullptr ? in.shift[at] : point + plain / count;
  const double step = point - shift;
  shared.step[mine] = step;
  shared.half[mine] = weighted + 0.5 * weight * step;
  if (pair.rows != pair.columns || mine >= kFinishTile) return;  // each result is written once
  to.shift[at] = shift;
  to.plain[at] = plain + count * step;
  to.weighted[at] = weighted + weight * step;
  if (coordinate == 0) to.weight[pair.group] = weight;
  if (at == 0) *to.count = count;
}

// Each thread writes one entry of the tile or of its mirror image. Both are computed by the same expression from the
// same sums, so that the result is symmetric to the bit.
__device__ __forceinline__ void write_product(const MomentsPair& pair, int dims, const MomentsFinish& shared,
                                              double* outer) {
  const bool diagonal = pair.rows == pair.columns, mirrored = threadIdx.x >= kFinishTile * kFinishTile;
  const int r = threadIdx.x / kFinishTile % kFinishTile, c = threadIdx.x % kFinishTile;
  const int row = (mirrored ? pair.columns : pair.rows) * kFinishTile + r;
  const int column = (mirrored ? pair.rows : pair.columns) * kFinishTile + c;
  if (row >= dims || column >= dims || (diagonal && mirrored)) return;
  const int a = row > column ? c : r, b = row > column ? r : c;
  double above = 0, below = 0;
  for (int lane = 0; lane < kFinishLanes; ++lane) {
    above += shared.outer[lane][0][a][b];
    below += shared.outer[lane][diagonal ? 0 : 1][b][a];
  }
  const int other = kFinishTile + b;
  const double change = shared.half[a] * shared.step[other] + shared.step[a] * shared.half[other];
  outer[(pair.group * dims + row) * dims + column] = 0.5 * (above + below) + change;
}

// Adds the partial results up in float64 in a fixed order, symmetrises and re-bases them: from the point, which is
// exact in float, to the shift, which need not be. Grid: groups * pairs of tiles.
__global__ void __launch_bounds__(kFinishThreads, 2)
    moments_of_group(const MomentsInput in, const MomentsPartial partial, int splits, int slices, int padded,
                     const MomentsResults to) {
  __shared__ MomentsFinish shared;
  const MomentsPair pair(blockIdx.x, (in.dims + kFinishTile - 1) / kFinishTile);
  gather_products(partial, pair, in.groups, splits * slices, padded, shared);
  gather_linear(partial, pair, in.groups, splits, padded, shared);
  __syncthreads();
  if (threadIdx.x < 2 * kFinishTile) rebase(in, partial, pair, padded, to, shared);
  __syncthreads();
  write_product(pair, in.dims, shared, to.outer);
}

// One call -------------------------------------------------------------------------------------------

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

// Everything that one call starts: two kernels, `launch(blocks, threads, kernel, arguments...)`. `allocate(doubles)`
// gives the memory between them, `choose(stages)` the number of ranges of tokens.
template <typename T, int P, typename Choose, typename Allocate, typename Launch>
void launch_moments(MomentsInput in, const MomentsResults& to, const Choose& choose, const Allocate& allocate,
                    const Launch& launch) {
  using Shape = MomentsShape<T, P>;
  const int64_t stages = (in.tokens + Shape::kStage - 1) / Shape::kStage, wanted = choose(stages);
  in.tokens_per_split = (stages + wanted - 1) / wanted * Shape::kStage;
  const int64_t splits = (in.tokens + in.tokens_per_split - 1) / in.tokens_per_split;

  const int64_t outer = splits * Shape::kSlices * in.groups * P * P, point = in.groups * P;  // even numbers of floats
  double* const memory = allocate((outer + point) / 2 + splits * in.groups * (1 + 2 * P));
  float* const floats = reinterpret_cast<float*>(memory);
  const MomentsPartial partial{floats, floats + outer, memory + (outer + point) / 2};

  launch(dim3{static_cast<unsigned>(in.groups), static_cast<unsigned>(splits)}, Shape::kThreads, moments_of_block<T, P>,
         in, partial);
  const uint32_t pairs = MomentsPair::pairs((in.dims + kFinishTile - 1) / kFinishTile);
  launch(dim3{static_cast<unsigned>(in.groups * pairs)}, kFinishThreads, moments_of_group, in, partial, int(splits),
         Shape::kSlices, P, to);
}

}  // namespace skd
