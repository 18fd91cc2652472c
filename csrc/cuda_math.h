// Arithmetic and index maps of the CUDA kernels. Plain C++ too: the tests run the kernels on the CPU.
//
// Without nvcc, whoever includes this header defines load_fragment and multiply_add, and CUDA's built-in names.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_common.h"  // the element types and their conversions on the host

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SKD_HD __host__ __device__ __forceinline__
#else
#define SKD_HD inline
#endif

namespace skd {

SKD_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return from_bits(bits);
#endif
}

SKD_HD uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

SKD_HD float to_float(float value) { return value; }
SKD_HD float to_float(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }
SKD_HD float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  return load(value);
#endif
}

// The elements of one 16-byte load.
template <typename T>
SKD_HD void unpack(const uint4& raw, float (&values)[16 / sizeof(T)]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < int(16 / sizeof(T)); ++i) {
    if constexpr (sizeof(T) == 4)
      values[i] = float_of(words[i]);
    else
      values[i] = to_float(T{uint16_t(words[i / 2] >> 16 * (i % 2))});
  }
}

// |x g|: the first-order change of the cost if this coordinate of this token were removed.
SKD_HD float taylor_term(float x, float grad) { return fabsf(x * grad); }

// The square root with an error of 2^-23, which is enough here; the exact function has a branch.
SKD_HD float square_root(float value) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return sqrtf(value);
#endif
}

// Two floats as bf16, round to nearest even; `first` goes to the low half, which is the lower address.
SKD_HD uint32_t pack_bf16(float first, float second) {
#ifdef __CUDA_ARCH__
  const __nv_bfloat162 packed = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &packed, sizeof word);
  return word;
#else
  const auto round = [](float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return uint32_t(0x7fff);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(first) | round(second) << 16;
#endif
}

// Splits pairs of a into bf16 numbers: a = high + low to 2^-18 of a. The function returns twice the low part, because
//   Y^T Y = H^T H + H^T L + L^T H = (M + M^T) / 2   with   M = H^T H + H^T (2 L)
// except for L^T L, which is below the accuracy that is kept. So two products replace three, and M is symmetrised
// later.
SKD_HD void split_bf16(float first, float second, uint32_t& high, uint32_t& twice_low) {
  high = pack_bf16(first, second);
  twice_low = pack_bf16(2.0f * (first - float_of(high << 16)), 2.0f * (second - float_of(high & 0xffff0000u)));
}

// Warp-level matrix product, mma.m16n8k16 of bf16 into float, on a block of tokens stored as [token][coordinate].
//
// load_fragment reads 16 tokens x 16 coordinates by ldmatrix.x4.trans: every lane passes the address of one row of 8
// coordinates, lanes 8q..8q+7 those of the 8 x 8 matrix q, which becomes register q. The transposed load leaves lane l
// with coordinate l / 4 and tokens 2 (l % 4), 2 (l % 4) + 1 of each matrix, which is how the instruction wants both of
// its operands:
//   A, 16 coordinates x 16 tokens: four registers, the last 8 coordinates in the odd ones, the last 8 tokens in the
//      last two;
//   B, 16 tokens x 8 coordinates: two registers, the last 8 tokens in the second. One load gives two of them, each in
//      neighbouring registers, which is where the instruction reads them: in another order they would be moved first.
SKD_HD int left_token(int lane) { return lane / 16 * 8 + lane % 8; }
SKD_HD int left_coordinate(int lane) { return lane / 8 % 2 * 8; }
SKD_HD int right_token(int lane) { return lane / 8 % 2 * 8 + lane % 8; }
SKD_HD int right_coordinate(int lane) { return lane / 16 * 8; }

// Row and column, within 16 x 8, of the accumulators 2 half and 2 half + 1 (the next column).
SKD_HD int accumulator_row(int lane, int half) { return lane / 4 + 8 * half; }
SKD_HD int accumulator_column(int lane) { return lane % 4 * 2; }

#ifdef __CUDACC__
__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], const uint16_t* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
void load_fragment(uint32_t (&fragment)[4], const uint16_t* row);
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#endif

}  // namespace skd
