// K copies of z in one pass over the output: unscaled stretches by memcpy, the scaled channels between them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../check.h"

namespace singe {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

template <class T>
void scale(const T* from, double factor, int64_t n, T* to) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const C f = static_cast<C>(factor);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<C>(from[i]) * f);
}

// One sample: `rows` are the channels to scale, ascending, each `size` long.
template <class T>
void fade(const T* from, const std::vector<int64_t>& rows, double factor, int64_t channels, int64_t size,
          T* to) {
  int64_t done = 0;
  const auto copy_until = [&](int64_t channel) {
    if (channel > done)
      std::memcpy(to + done * size, from + done * size, (channel - done) * size * sizeof(T));
  };
  for (int64_t row : rows) {
    copy_until(row);
    scale(from + row * size, factor, size, to + row * size);
    done = row + 1;
  }
  copy_until(channels);
}

// The rows to scale in every copy: ascending, each once, without the -1s.
std::vector<std::vector<int64_t>> rows_of(const int64_t* neuron, int64_t jobs, int64_t per_job,
                                          int64_t channels) {
  std::vector<std::vector<int64_t>> rows(jobs);
  for (int64_t k = 0; k < jobs; ++k) {
    for (int64_t r = 0; r < per_job; ++r) {
      const int64_t n = neuron[k * per_job + r];
      STD_TORCH_CHECK(n >= -1 && n < channels, "neuron: expected rows below ", channels, ", got ", n);
      if (n >= 0) rows[k].push_back(n);
    }
    std::sort(rows[k].begin(), rows[k].end());
    rows[k].erase(std::unique(rows[k].begin(), rows[k].end()), rows[k].end());
  }
  return rows;
}

Tensor fade_neurons(const Tensor& z_in, const Tensor& neuron_in, const Tensor& t_in) {
  const std::vector<int64_t> sizes = faded_sizes(z_in, neuron_in, t_in);
  const Tensor z = torch::stable::contiguous(z_in), t = torch::stable::contiguous(t_in);
  const Tensor neuron = torch::stable::contiguous(neuron_in);
  Tensor out = empty(z, sizes, z.scalar_type());
  const int64_t jobs = t.numel(), batch = z.size(0), channels = z.size(1), size = numel_from(z, 2);
  const auto rows = rows_of(neuron.const_data_ptr<int64_t>(), jobs, numel_from(neuron, 1), channels);
  const double* factor = t.const_data_ptr<double>();
  const int64_t sample = channels * size;
  if (out.numel() == 0) return out;

  with_floating(z.scalar_type(), [&]<class T>() {
    const T* from = z.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    // copies of one sample follow each other, so that it is read from the cache
    torch::stable::parallel_for(0, batch * jobs, 1 + kGrain / sample, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / jobs, k = i % jobs;
        fade(from + b * sample, rows[k], factor[k], channels, size, to + (k * batch + b) * sample);
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
