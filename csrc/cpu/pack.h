// Tensors into the layouts that the tiles read, converted to the type they compute in.
#pragma once

#include <algorithm>
#include <cstring>

#include "../geometry.h"

namespace singe {

template <class In, class T>
void convert(const In* from, int64_t step, int64_t n, T* to) {
  if constexpr (std::is_same_v<In, T>) {
    if (step == 1) {
      if (n > 0) std::memcpy(to, from, n * sizeof(T));
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * step]);
}

// The part of one phase of an axis that exists in the input: indices [begin, end), the first one at
// `element`.
struct Span {
  int64_t begin, end, element;

  Span(const Axis& a, int64_t phase)
      : begin(std::min(a.begin(phase), a.pitch)),
        end(std::min(a.end(phase, a.pitch), a.pitch)),
        element(begin * a.stride + a.first(phase)) {}
};

// One channel of the whole batch, in phases: `x` is the channel in the first image, the next is `image` on.
template <class In, class T>
void pack_channel(const In* x, int64_t image, const Geometry& g, T* to) {
  const auto& [a0, a1, a2] = g.axis;
  const int64_t phases = g.phases(), reach = g.reach();
  std::memset(to, 0, phases * reach * sizeof(T));
  for (int64_t f = 0; f < phases; ++f, to += reach) {
    const Span s0(a0, f / (a1.phases * a2.phases)), s1(a1, f / a2.phases % a1.phases), s2(a2, f % a2.phases);
    for (int64_t b = 0; b < g.batch; ++b) {
      for (int64_t u0 = s0.begin, i0 = s0.element; u0 < s0.end; ++u0, i0 += a0.stride) {
        for (int64_t u1 = s1.begin, i1 = s1.element; u1 < s1.end; ++u1, i1 += a1.stride) {
          const In* row = x + b * image + (i0 * a1.in + i1) * a2.in + s2.element;
          T* line = to + ((b * a0.pitch + u0) * a1.pitch + u1) * a2.pitch + s2.begin;
          convert(row, a2.stride, s2.end - s2.begin, line);
        }
      }
    }
  }
}

// Positions [from, from + n) of one job's delta, zeros where the layout has no output.
template <class In, class T>
void pack_delta(const In* delta, const Geometry& g, int64_t from, int64_t n, T* to) {
  if (g.dense()) return convert(delta + from, 1, n, to);
  const auto& [a0, a1, a2] = g.axis;
  const int64_t line = from / a2.pitch, end = from + n;
  int64_t u1 = line % a1.pitch, u0 = line / a1.pitch % a0.pitch, b = line / a1.pitch / a0.pitch;
  std::memset(to, 0, n * sizeof(T));
  for (int64_t begin = line * a2.pitch; begin < end; begin += a2.pitch) {
    if (u0 < a0.out && u1 < a1.out) {
      const int64_t first = std::max(begin, from), last = std::min(begin + a2.out, end);
      const In* row = delta + ((b * a0.out + u0) * a1.out + u1) * a2.out;
      convert(row + (first - begin), 1, last - first, to + (first - from));
    }
    if (++u1 == a1.pitch) u1 = 0, ++u0;
    if (u0 == a0.pitch) u0 = 0, ++b;
  }
}

}  // namespace singe
