// Vectors for the CPU kernels: of any width that the caller names, loaded from every input type.
#pragma once

#include <cstddef>
#include <utility>

#include "cpu_common.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed to functions that are inlined

namespace skd {

// A vector of `Bytes` bytes; it may be loaded from unaligned memory.
template <typename A, int64_t Bytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(Bytes), aligned(1), may_alias));
};
template <typename A, int64_t Bytes>
using Vector = typename VectorOf<A, Bytes>::type;

template <int64_t Bytes, typename A>
SKD_INLINE Vector<A, Bytes> load_vector(const A* from) {
  return *reinterpret_cast<const Vector<A, Bytes>*>(from);
}

template <int64_t Bytes, typename A>
SKD_INLINE void store_vector(A* to, Vector<A, Bytes> v) {
  *reinterpret_cast<Vector<A, Bytes>*>(to) = v;
}

// Two vectors of consecutive elements. From 16-bit types one gets the even and the other the odd elements, because
// compilers widen halves of registers badly; `sorted` restores the order where it matters.
template <typename A, int64_t Bytes>
struct Two {
  Vector<A, Bytes> first, second;
};
template <int64_t Bytes>
SKD_INLINE Two<float, Bytes> load_two(const float* from) {
  return {load_vector<Bytes>(from), load_vector<Bytes>(from + Bytes / 4)};
}
template <int64_t Bytes>
SKD_INLINE Two<double, Bytes> load_two(const double* from) {
  return {load_vector<Bytes>(from), load_vector<Bytes>(from + Bytes / 8)};
}
template <int64_t Bytes>
SKD_INLINE Two<float, Bytes> load_two(const BFloat16* from) {
  using Bits = Vector<uint32_t, Bytes>;
  using Floats = Vector<float, Bytes>;
  const Bits bits = *reinterpret_cast<const Bits*>(from);
  return {Floats(bits << 16), Floats(bits & 0xffff0000u)};
}
template <int64_t Bytes>
SKD_INLINE Vector<float, Bytes> from_half(Vector<uint32_t, Bytes> bits) {  // as `load`, of the lower half
  using Bits = Vector<uint32_t, Bytes>;
  using Floats = Vector<float, Bytes>;
  const Floats magnitude = Floats((bits & 0x7fff) << 13) * 0x1p112f;
  const Bits special = Bits(magnitude >= 65536.0f) & 0x7f800000u;
  return Floats(Bits(magnitude) | special | (bits & 0x8000) << 16);
}
template <int64_t Bytes>
SKD_INLINE Two<float, Bytes> load_two(const Float16* from) {
  const auto bits = *reinterpret_cast<const Vector<uint32_t, Bytes>*>(from);
  return {from_half<Bytes>(bits), from_half<Bytes>(bits >> 16)};
}

template <typename V, std::size_t... I>
SKD_INLINE V interleave(V even, V odd, std::size_t first, std::index_sequence<I...>) {
#if __has_builtin(__builtin_shufflevector)
  constexpr int lanes = sizeof...(I);
  return first == 0 ? __builtin_shufflevector(even, odd, int(I / 2 + I % 2 * lanes)...)
                    : __builtin_shufflevector(even, odd, int((lanes + I) / 2 + I % 2 * lanes)...);
#else
  return V{(I % 2 == 0 ? even : odd)[(first + I) / 2]...};
#endif
}
template <typename T, typename A, int64_t Bytes>
SKD_INLINE Two<A, Bytes> sorted(Two<A, Bytes> loaded) {
  if constexpr (sizeof(T) == sizeof(A)) return loaded;
  constexpr std::size_t lanes = Bytes / sizeof(A);
  constexpr auto each = std::make_index_sequence<lanes>{};
  return {interleave(loaded.first, loaded.second, 0, each), interleave(loaded.first, loaded.second, lanes, each)};
}

// The first `count` elements, zeros after them.
template <typename A, int64_t Bytes, typename T>
SKD_INLINE Two<A, Bytes> load_first(const T* from, int64_t count) {
  constexpr int64_t both = 2 * Bytes / sizeof(A);
  if (count >= both) return load_two<Bytes>(from);
  T padded[both] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load_two<Bytes>(padded);
}

template <int64_t Bytes>
SKD_INLINE Vector<float, Bytes> absolute(Vector<float, Bytes> v) {
  return Vector<float, Bytes>(Vector<uint32_t, Bytes>(v) & 0x7fffffffu);
}
template <int64_t Bytes>
SKD_INLINE Vector<double, Bytes> absolute(Vector<double, Bytes> v) {
  return Vector<double, Bytes>(Vector<uint64_t, Bytes>(v) & 0x7fffffffffffffffull);
}

// sum + left right, lane by lane.
template <int64_t Bytes, typename A>
SKD_INLINE Vector<A, Bytes> multiply_add(A left, Vector<A, Bytes> right, Vector<A, Bytes> sum) {
  return sum + left * right;
}
#ifdef SKD_LEVELS
// Each lane of left and right holds two bfloat16; both products are added to the lane of the sum (AVX-512 BF16).
template <int64_t Bytes>
SKD_INLINE Vector<float, Bytes> multiply_add(uint32_t left, Vector<uint32_t, Bytes> right, Vector<float, Bytes> sum) {
  const Vector<uint32_t, Bytes> everywhere = left - Vector<uint32_t, Bytes>{};
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(everywhere), "v"(right));
  return sum;
}
#endif

// The bits of the nearest bfloat16, ties to even; NaN stays NaN.
template <int64_t Bytes>
SKD_INLINE Vector<uint32_t, Bytes> to_bfloat16(Vector<float, Bytes> v) {
  using Bits = Vector<uint32_t, Bytes>;
  const Bits bits = Bits(v), special = Bits(v != v);
  return (((bits + 0x7fff + (bits >> 16 & 1)) & ~special) | (0x7fc00000u & special)) >> 16;
}

// to[i] += values[i], in float64.
template <typename V>
SKD_INLINE void add_to(double* to, V values) {
  using Sums = Vector<double, sizeof(V) / sizeof(values[0]) * sizeof(double)>;
  *reinterpret_cast<Sums*>(to) += __builtin_convertvector(values, Sums);
}

// Sum of the lanes, by halves.
template <typename A, int64_t Bytes>
SKD_INLINE A total(Vector<A, Bytes> v) {
  if constexpr (Bytes == sizeof(A)) {
    return v[0];
  } else {
    Vector<A, Bytes / 2> half[2];
    std::memcpy(half, &v, sizeof half);
    return total<A, Bytes / 2>(half[0] + half[1]);
  }
}

}  // namespace skd
