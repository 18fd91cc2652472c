// The CUDA kernels, run on the CPU; called through ctypes by test_cuda_build.py.

#include "emulation.h"
// emulation.h first: it stands for the CUDA headers.
#include "moments_finish.h"
#include "taylor_kernel.h"

namespace skd {
namespace {

// As moments_cuda.cu launches them, in so many splits. Returns the number of launches.
template <typename T, int P>
int moments(const MomentsInput& in, int64_t splits, const MomentsResults& to) {
  std::vector<double> memory;
  int launches = 0;
  const auto choose = [&](int64_t) { return splits; };
  const auto allocate = [&](int64_t doubles) {
    memory.resize(doubles);
    std::memset(memory.data(), 0xff, doubles * sizeof(double));  // NaN, in float64 and in float32
    return memory.data();
  };
  const auto launch = [&](dim3 blocks, int threads, auto kernel, auto... arguments) {
    emulation::launch(blocks, {unsigned(threads)}, [&] { kernel(arguments...); });
    ++launches;
  };
  launch_moments<T, P>(in, to, choose, allocate, launch);
  return launches;
}

template <typename T>
int moments_padded(const MomentsInput& in, int64_t splits, const MomentsResults& to) {
  const auto run = in.dims <= 16   ? moments<T, 16>
                   : in.dims <= 32 ? moments<T, 32>
                   : in.dims <= 64 ? moments<T, 64>
                                   : moments<T, 128>;
  return run(in, splits, to);
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

// dtype: 0 float32, 1 bfloat16, 2 float16. Strides of tokens and groups in elements; without `shift` about the mean.
extern "C" int emulate_moments(int dtype, const void* x, const void* grad, const double* shift,
                               int64_t x_token_stride, int64_t x_group_stride, int64_t grad_token_stride,
                               int64_t grad_group_stride, int64_t tokens, int64_t groups, int dims, bool aligned,
                               int64_t splits, double* count, double* about, double* weight, double* plain,
                               double* weighted, double* outer) {
  const int64_t size = dtype == 0 ? 4 : 2;
  const skd::MomentsInput in{{x, x_token_stride * size, x_group_stride * size},
                             {grad, grad_token_stride * size, grad_group_stride * size},
                             shift, tokens, groups, 0, dims, aligned};
  const auto run = dtype == 0   ? skd::moments_padded<float>
                   : dtype == 1 ? skd::moments_padded<skd::BFloat16>
                                : skd::moments_padded<skd::Float16>;
  return run(in, splits, {count, about, weight, plain, weighted, outer});
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
