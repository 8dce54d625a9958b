// Small matrix products in registers, every loaded value used several times.
//
//   dot:   sums[r][c] = sum over i of rows[r][i] * columns[c][i]         columns contiguous along the sum
//   outer: sums[r][c] = sum over i of rows[r][i] * x[i * stride + c]     columns side by side
#pragma once

#include "simd.h"

namespace singe::simd {

constexpr int kRows = 4;        // of the larger tile; the smaller has one
constexpr int kMostSums = 256;  // of any tile

template <class T, int bytes, int R, int C>
SINGE_INLINE void dot_tile(const T* const* rows, const T* const* columns, int64_t length, T* sums) {
  using V = Vec<T, bytes>;
  typename V::type total[R][C] = {};
  int64_t i = 0;
  for (; i + V::lanes <= length; i += V::lanes) {
    typename V::type row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) load(row[r], rows[r] + i);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      typename V::type column;
      load(column, columns[c] + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r][c] += row[r] * column;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      T sum = lane_sum<T, bytes>(total[r][c]);
      for (int64_t j = i; j < length; ++j) sum += rows[r][j] * columns[c][j];
      sums[r * C + c] = sum;
    }
  }
}

template <class T, int bytes, int R, int C>
SINGE_INLINE void outer_tile(const T* const* rows, const T* x, int64_t stride, int64_t length, T* sums) {
  using V = Vec<T, bytes>;
  static_assert(R * C * V::lanes <= kMostSums);
  typename V::type total[R][C] = {};
  for (int64_t i = 0; i < length; ++i) {
    typename V::type column[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) load(column[c], x + i * stride + c * V::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) total[r][c] += column[c] * rows[r][i];
    }
  }
  std::memcpy(sums, total, sizeof(total));
}

// The tiles for this machine and how many columns each computes.
template <class T>
struct Tiles {
  using Dot = void (*)(const T* const* rows, const T* const* columns, int64_t length, T* sums);
  using Outer = void (*)(const T* const* rows, const T* x, int64_t stride, int64_t length, T* sums);
  int dot_columns, outer_columns;
  Dot dot4, dot1;
  Outer outer4, outer1;
};

#define SINGE_TILES(name, target, bytes, dot_vectors, outer_vectors)                                    \
  template <class T, int R>                                                                             \
  target void dot_##name(const T* const* rows, const T* const* columns, int64_t length, T* sums) {      \
    dot_tile<T, bytes, R, dot_vectors>(rows, columns, length, sums);                                    \
  }                                                                                                     \
  template <class T, int R>                                                                             \
  target void outer_##name(const T* const* rows, const T* x, int64_t stride, int64_t length, T* sums) { \
    outer_tile<T, bytes, R, outer_vectors>(rows, x, stride, length, sums);                              \
  }                                                                                                     \
  template <class T>                                                                                    \
  Tiles<T> tiles_##name() {                                                                             \
    return {dot_vectors,                                                                                \
            outer_vectors * Vec<T, bytes>::lanes,                                                       \
            dot_##name<T, kRows>,                                                                       \
            dot_##name<T, 1>,                                                                           \
            outer_##name<T, kRows>,                                                                     \
            outer_##name<T, 1>};                                                                        \
  }

SINGE_TILES(base, , 16, 2, 2)
#if SINGE_X86
SINGE_TILES(v3, SINGE_TARGET_V3, 32, 3, 2)
SINGE_TILES(v4, SINGE_TARGET_V4, 64, 6, 4)
#endif
#undef SINGE_TILES

template <class T>
Tiles<T> tiles() {
#if SINGE_X86
  if (level() == Level::v4) return tiles_v4<T>();
  if (level() == Level::v3) return tiles_v3<T>();
#endif
  return tiles_base<T>();
}

}  // namespace singe::simd
