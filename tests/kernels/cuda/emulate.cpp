// The CUDA kernels, run on the CPU; called through ctypes by test_cuda_build.py.

#include "emulation.h"
// emulation.h first: it stands for the CUDA headers.
#include "moments_kernel.h"
#include "taylor_kernel.h"

namespace skd {
namespace {

template <typename T, int P>
void moments(MomentsInput in, int64_t splits, double* weight, double* plain, double* weighted, double* outer) {
  using Shape = MomentsShape<T, P>;
  const int64_t stages = (in.tokens + Shape::kStage - 1) / Shape::kStage;
  in.tokens_per_split = (stages + splits - 1) / splits * Shape::kStage;
  splits = (in.tokens + in.tokens_per_split - 1) / in.tokens_per_split;
  std::vector<double> linear(splits * in.groups * (1 + 2 * P), NAN);
  std::vector<float> products(splits * Shape::kSlices * in.groups * P * P, NAN);
  const MomentsPartial partial{linear.data(), products.data()};
  emulation::launch({unsigned(in.groups), unsigned(splits)}, {Shape::kThreads},
                    [&] { moments_of_block<T, P>(in, partial); });
  const int64_t tiles = (in.dims + kFinishTile - 1) / kFinishTile;
  emulation::launch({unsigned(in.groups * tiles * tiles)}, {kFinishTile, kFinishRows}, [&] {
    moments_of_group(partial, in.groups, splits, Shape::kSlices, P, in.dims, weight, plain, weighted, outer);
  });
}

template <typename T>
void moments_padded(const MomentsInput& in, int64_t splits, double* weight, double* plain, double* weighted,
                    double* outer) {
  const auto run = in.dims <= 16   ? moments<T, 16>
                   : in.dims <= 32 ? moments<T, 32>
                   : in.dims <= 64 ? moments<T, 64>
                                   : moments<T, 128>;
  run(in, splits, weight, plain, weighted, outer);
}

template <typename T, int V, bool Squared>
void taylor(TaylorInput in, double* scores) {
  const int64_t vectors = (in.dims + V - 1) / V;
  in.lanes = taylor_lanes(vectors);
  const int64_t columns = (vectors + in.lanes - 1) / in.lanes;
  std::vector<double> partial(in.splits * in.dims, NAN);
  emulation::launch({unsigned(columns), unsigned(in.splits)}, {kTaylorThreads},
                    [&] { taylor_of_block<T, V, Squared>(in, partial.data()); });
  emulation::launch({unsigned((in.dims + kTaylorTile - 1) / kTaylorTile)}, {kTaylorTile, kTaylorRows},
                    [&] { taylor_of_coordinate(partial.data(), in.splits, in.dims, scores); });
}

template <typename T>
void taylor_dtype(const TaylorInput& in, bool squared, bool aligned, double* scores) {
  constexpr int V = 16 / sizeof(T);
  const auto run = aligned ? (squared ? taylor<T, V, true> : taylor<T, V, false>)
                           : (squared ? taylor<T, 1, true> : taylor<T, 1, false>);
  run(in, scores);
}

}  // namespace
}  // namespace skd

// dtype: 0 float32, 1 bfloat16, 2 float16.
extern "C" void emulate_moments(int dtype, const void* x, const void* grad, const double* shift,
                                int64_t x_token_stride, int64_t x_group_stride, int64_t grad_token_stride,
                                int64_t grad_group_stride, int64_t tokens, int64_t groups, int dims, bool aligned,
                                int64_t splits, double* weight, double* plain, double* weighted, double* outer) {
  const skd::MomentsInput in{
      x,      grad,   shift, x_token_stride, x_group_stride, grad_token_stride, grad_group_stride,
      tokens, groups, 0,     dims,           aligned};
  const auto run = dtype == 0   ? skd::moments_padded<float>
                   : dtype == 1 ? skd::moments_padded<skd::BFloat16>
                                : skd::moments_padded<skd::Float16>;
  run(in, splits, weight, plain, weighted, outer);
}

extern "C" void emulate_taylor(int dtype, const void* x, const void* grad, int64_t x_stride, int64_t grad_stride,
                               int64_t tokens, int64_t dims, int64_t splits, bool squared, bool aligned,
                               double* scores) {
  const skd::TaylorInput in{x, grad, x_stride, grad_stride, tokens, dims, splits, 0};
  const auto run = dtype == 0   ? skd::taylor_dtype<float>
                   : dtype == 1 ? skd::taylor_dtype<skd::BFloat16>
                                : skd::taylor_dtype<skd::Float16>;
  run(in, squared, aligned, scores);
}

extern "C" int64_t emulate_choose_splits(int64_t groups, int64_t stages, int64_t capacity, int64_t most) {
  return skd::choose_splits(groups, stages, capacity, most);
}
