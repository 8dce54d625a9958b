// K copies of z in one pass over the output. z is slabs of [neurons, size]: in a long one, the elements
// between the scaled neurons are copied; short ones (channels last) are copied by the block and scaled while
// in the cache.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "../check.h"
#include "simd.h"

namespace singe {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread
constexpr int64_t kBlock = 1 << 14;  // elements of short slabs that are copied at once

template <class T>
void copy(const T* from, int64_t n, T* to) {
  if (n > 0) std::memcpy(to, from, n * sizeof(T));
}

template <class T>
SINGE_INLINE void scale(const T* __restrict from, Compute<T> factor, int64_t end, int64_t step,
                        T* __restrict to) {
  for (int64_t i = 0; i < end; i += step) to[i] = static_cast<T>(static_cast<Compute<T>>(from[i]) * factor);
}

// Elements [begin, end) of a slab, those of neurons side by side.
struct Stretch {
  int64_t begin, end;
  int64_t length() const { return end - begin; }
};

// What to scale in a slab: ascending, nothing twice.
using Stretches = std::vector<Stretch>;

template <class T>
void fade_slab(const T* from, const Stretches& scaled, Compute<T> factor, int64_t slab, T* to) {
  int64_t done = 0;
  for (const Stretch& s : scaled) {
    copy(from + done, s.begin - done, to + done);
    simd::run([&]() SINGE_INLINED { scale(from + s.begin, factor, s.length(), 1, to + s.begin); });
    done = s.end;
  }
  copy(from + done, slab - done, to + done);
}

// Some elements of slabs.
template <class T>
void fade_block(const T* from, const Stretches& scaled, Compute<T> factor, int64_t slab, int64_t elements,
                T* to) {
  copy(from, elements, to);
  simd::run([&]() SINGE_INLINED {
    for (const Stretch& s : scaled) {
      if (s.length() == 1) {
        scale(from + s.begin, factor, elements - s.begin, slab, to + s.begin);
      } else {
        for (int64_t at = s.begin; at < elements; at += slab)
          scale(from + at, factor, s.length(), 1, to + at);
      }
    }
  });
}

// What one copy scales: its rows of neurons, each `size` long, without the -1s.
Stretches stretches_of(const int64_t* neuron, int64_t count, int64_t size) {
  std::vector<int64_t> rows;
  std::copy_if(neuron, neuron + count, std::back_inserter(rows), [](int64_t n) { return n >= 0; });
  std::sort(rows.begin(), rows.end());
  Stretches stretches;
  for (int64_t row : rows) {
    const Stretch next{row * size, (row + 1) * size};
    if (stretches.empty() || stretches.back().end < next.begin) {
      stretches.push_back(next);
    } else {
      stretches.back().end = next.end;
    }
  }
  return stretches;
}

Tensor fade_neurons(const Tensor& z_in, const Tensor& neuron_in, const Tensor& t_in, int64_t axis) {
  check_fade(z_in, neuron_in, t_in, axis);
  const Tensor z = without_gaps(z_in), t = without_gaps(t_in);
  const Tensor neuron = without_gaps(neuron_in);
  const int64_t jobs = t.numel(), per_job = numel_between(neuron, 1, neuron.dim()), elements = z.numel();
  const int64_t size = numel_between(z, axis + 1, z.dim()), slab = z.size(axis) * size;
  const int64_t* rows = neuron.const_data_ptr<int64_t>();
  const double* node = t.const_data_ptr<double>();
  check_rows(rows, neuron.numel(), z.size(axis), "neuron");
  Tensor out = empty(z, copied_sizes(z, jobs), z.scalar_type());
  if (out.numel() == 0) return out;

  std::vector<Stretches> scaled;
  for (int64_t k = 0; k < jobs; ++k) scaled.push_back(stretches_of(rows + k * per_job, per_job, size));
  const int64_t block = std::max<int64_t>(1, kBlock / slab) * slab;
  const int64_t blocks = (elements + block - 1) / block;
  with_floating(z.scalar_type(), [&]<class T>() {
    const T* from = z.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    // copies of one block follow each other, so that it is read from the cache
    torch::stable::parallel_for(0, blocks * jobs, 1 + kGrain / block, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / jobs * block, k = i % jobs;
        const auto factor = static_cast<Compute<T>>(node[k]);
        T* faded = to + k * elements + first;
        if (block == slab) {
          fade_slab(from + first, scaled[k], factor, slab, faded);
        } else {
          fade_block(from + first, scaled[k], factor, slab, std::min(block, elements - first), faded);
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CPU, m) {
  m.impl("fade_neurons", TORCH_BOX(&fade_neurons));
}

}  // namespace singe
