// Shared by the CPU kernels: clones for the instruction sets worth having, and loads of every input type.
#pragma once

#include <cstdint>
#include <cstring>

// One binary, three versions of a hot function; the loader picks the best one the processor has. A build for tests may
// set SKD_MOST_REGISTER_BYTES to see the others.
#ifndef SKD_MOST_REGISTER_BYTES
#define SKD_MOST_REGISTER_BYTES 64
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(SKD_NO_CLONES)
#define SKD_LEVELS
#define SKD_CPU_LEVELS "x86-64-v4, x86-64-v3, default"
#if SKD_MOST_REGISTER_BYTES >= 64
#define SKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif SKD_MOST_REGISTER_BYTES >= 32
#define SKD_CLONES __attribute__((target("arch=x86-64-v3")))
#else
#define SKD_CLONES
#endif
#else
#define SKD_CLONES
#define SKD_CPU_LEVELS "default"
#endif
#define SKD_INLINE inline __attribute__((always_inline))

namespace skd {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

SKD_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The number of bytes in a vector register of this processor.
inline int64_t register_bytes() {
#ifdef SKD_LEVELS
  __builtin_cpu_init();
  // Asks for all features of the level, since code compiled for a level uses more of it than the vector instructions.
  if (SKD_MOST_REGISTER_BYTES >= 64 && __builtin_cpu_supports("x86-64-v4")) return 64;
  if (SKD_MOST_REGISTER_BYTES >= 32 && __builtin_cpu_supports("x86-64-v3")) return 32;
#endif
  return 16;
}

// Whether the processor multiplies pairs of bfloat16 in registers of 64 bytes (AVX-512 BF16).
inline bool multiplies_pairs() {
#ifdef SKD_LEVELS
  __builtin_cpu_init();
  return register_bytes() == 64 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

SKD_INLINE double load(double value) { return value; }
SKD_INLINE float load(float value) { return value; }
SKD_INLINE float load(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }
SKD_INLINE float load(Float16 value) {
  // Shift exponent and mantissa into place and scale by 2^112: exact for subnormals too. Inf and NaN, the only values
  // that come out at 2^16 or more, get the largest exponent. No branch, so the compiler vectorises it.
  const float magnitude = from_bits(uint32_t(value.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  bits |= magnitude >= 65536.0f ? 0x7f800000u : 0u;
  return from_bits(bits | uint32_t(value.bits & 0x8000) << 16);
}

}  // namespace skd
