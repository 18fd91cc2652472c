// Runs CUDA kernels on the CPU, one block at a time: every thread is a coroutine, barriers and warp operations wait
// for all of theirs. Just what the kernels of csrc use. Matrix operations follow the layouts of the PTX manual,
// element by element, and know nothing of the kernels' own index maps.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::min;

namespace emulation {

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Thread {
  dim3 index;
  int number = 0;
  bool done = false;
  ucontext_t context;
  std::vector<char> stack;
};

inline ucontext_t scheduler;
inline Thread* current = nullptr;
inline dim3 block;
inline Barrier whole;
inline std::vector<Barrier> warps;
inline std::vector<const void*> addresses;  // one slot per thread, for warp operations
inline std::vector<uint32_t> words;
inline const std::function<void()>* body = nullptr;

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}
inline void wait_warp() { wait(warps[current->number / 32]); }

inline void enter() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Every aligned access is checked, as the hardware would.
template <typename V>
V checked_load(const V* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0) std::abort();
  return *at;
}

inline void launch(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  const int count = threads.x * threads.y;
  if (count % 32 != 0) std::abort();
  body = &kernel;
  std::vector<std::unique_ptr<Thread>> all;
  for (int t = 0; t < count; ++t) {
    all.push_back(std::make_unique<Thread>());
    all.back()->stack.resize(64 * 1024);
  }
  addresses.resize(count);
  words.resize(count);
  for (block.y = 0; block.y < grid.y; ++block.y)
    for (block.x = 0; block.x < grid.x; ++block.x) {
      whole = Barrier{count};
      warps.assign(count / 32, Barrier{32});
      for (int t = 0; t < count; ++t) {
        Thread& thread = *all[t];
        thread.index = {t % threads.x, t / threads.x};
        thread.number = t;
        thread.done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
      }
      for (int left = count; left > 0;)
        for (auto& thread : all) {
          if (thread->done) continue;
          current = thread.get();
          swapcontext(&scheduler, &current->context);
          if (thread->done) --left;
        }
    }
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block)

inline void __syncthreads() { emulation::wait(emulation::whole); }
template <typename V>
V __ldg(const V* at) {
  return emulation::checked_load(at);
}

inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  using namespace emulation;
  std::memcpy(&words[current->number], &value, 4);
  wait_warp();
  float other;
  std::memcpy(&other, &words[current->number ^ mask], 4);
  wait_warp();
  return other;
}

#include "cuda_math.h"

namespace skd {

// PTX ISA, ldmatrix .m8n8.x4.trans: lane 8 q + r passes the address of row r of matrix q; without .trans lane l gets
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, with .trans those of column l / 4.
inline void load_fragment(uint32_t (&fragment)[4], const uint16_t* row) {
  using namespace emulation;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  addresses[current->number] = row;
  wait_warp();
  const int base = current->number / 32 * 32, lane = current->number % 32;
  for (int q = 0; q < 4; ++q) {
    const auto element = [&](int r) {
      return uint32_t(static_cast<const uint16_t*>(addresses[base + 8 * q + r])[lane / 4]);
    };
    fragment[q] = element(2 * (lane % 4)) | element(2 * (lane % 4) + 1) << 16;
  }
  wait_warp();
}

// PTX ISA, mma.m16n8k16 with bf16: the element i of lane l, g = l / 4, t = l % 4, is
//   a[i]: row g (+ 8 for i in 2, 3, 6, 7), column 2 t + i % 2 (+ 8 for i >= 4)
//   b[i]: row 2 t + i % 2 (+ 8 for i >= 2), column g
//   c[i]: row g (+ 8 for i >= 2), column 2 t + i % 2
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  struct Operands {
    uint32_t a[4], b[2];
  };
  static std::vector<Operands> shared;
  shared.resize(words.size());
  Operands& mine = shared[current->number];
  std::copy(a, a + 4, mine.a);
  mine.b[0] = b0, mine.b[1] = b1;
  wait_warp();
  const int base = current->number / 32 * 32, lane = current->number % 32;
  const auto half = [](uint32_t word, int which) { return from_bits(which ? word & 0xffff0000u : word << 16); };
  const auto a_at = [&](int row, int column) {
    const int owner = row % 8 * 4 + column % 8 / 2, i = column % 2 + (row >= 8 ? 2 : 0) + (column >= 8 ? 4 : 0);
    return half(shared[base + owner].a[i / 2], i % 2);
  };
  const auto b_at = [&](int row, int column) {
    const int owner = column * 4 + row % 8 / 2, i = row % 2 + (row >= 8 ? 2 : 0);
    return half(shared[base + owner].b[i / 2], i % 2);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) sum[i] += a_at(row, k) * b_at(k, column);
  }
  wait_warp();
}

}  // namespace skd
