// K copies of z: each value is read once for a few copies and written in 16-byte pieces where alignment
// allows.
#include <torch/csrc/stable/library.h>

#include "common.cuh"

namespace singe {
namespace {

struct Shape {
  int64_t jobs, per_job;  // of neuron
  int64_t neurons, size;  // of z's last axes: [..., neurons, size]
  int64_t pieces;         // of z
};

// The neurons that `count` elements from `element` on belong to.
template <int count>
__device__ void neurons_at(int64_t element, const Shape& s, int64_t (&neurons)[count]) {
  int64_t neuron = element / s.size % s.neurons, offset = element % s.size;
#pragma unroll
  for (int v = 0; v < count; ++v) {
    neurons[v] = neuron;
    if (++offset < s.size) continue;
    offset = 0;
    if (++neuron == s.neurons) neuron = 0;
  }
}

// `owners` is how many neurons a piece may belong to: 1, or its width.
template <class T, int width, int owners>
__global__ void __launch_bounds__(kThreads)
    fade(const Piece<T, width>* __restrict__ z, const int64_t* __restrict__ neuron,
         const double* __restrict__ t, Shape s, Piece<T, width>* __restrict__ out) {
  const int64_t begin = first_job(s.jobs, blockIdx.y), end = first_job(s.jobs, blockIdx.y + 1);
  for (int64_t i = global_thread(); i < s.pieces; i += grid_threads()) {
    int64_t owner[owners];
    neurons_at(i * width, s, owner);
    const Piece<T, width> piece = z[i];
    for (int64_t k = begin; k < end; ++k) {
      bool scaled[owners] = {};
      for (int64_t r = 0; r < s.per_job; ++r) {
        const int64_t row = neuron[k * s.per_job + r];
        trap_unless_row(row, s.neurons);
#pragma unroll
        for (int o = 0; o < owners; ++o) scaled[o] |= row == owner[o];
      }
      const auto factor = static_cast<Compute<T>>(t[k]);
      Piece<T, width> copy = piece;
#pragma unroll
      for (int v = 0; v < width; ++v) {
        if (scaled[owners == 1 ? 0 : v])
          copy.value[v] = static_cast<T>(static_cast<Compute<T>>(copy.value[v]) * factor);
      }
      out[k * s.pieces + i] = copy;
    }
  }
}

template <class T, int width, int owners>
void launch(const T* z, const int64_t* neuron, const double* t, Shape s, T* out, cudaStream_t stream) {
  s.pieces /= width;
  launch_kernel("fade_neurons", fade<T, width, owners>, grid_of_jobs(s.pieces, s.jobs), stream,
                reinterpret_cast<const Piece<T, width>*>(z), neuron, t, s,
                reinterpret_cast<Piece<T, width>*>(out));
}

Tensor fade_neurons(const Tensor& z_in, const Tensor& neuron_in, const Tensor& t_in, int64_t axis) {
  check_fade(z_in, neuron_in, t_in, axis);
  const Device device(z_in);
  const Tensor z = without_gaps(z_in), t = without_gaps(t_in);
  const Tensor neuron = without_gaps(neuron_in);
  const int64_t jobs = t.numel();
  Tensor out = empty(z, copied_sizes(z, jobs), z.scalar_type());
  if (out.numel() == 0) return out;
  const Shape shape{jobs, numel_between(neuron, 1, neuron.dim()), z.size(axis),
                    numel_between(z, axis + 1, z.dim()), z.numel()};

  with_floating(z.scalar_type(), [&]<class T>() {
    const T* from = z.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t* rows = neuron.const_data_ptr<int64_t>();
    const double* factor = t.const_data_ptr<double>();
    with_width<T>(shape.pieces, {from, to}, [&]<int width>() {
      if (shape.size % width == 0) {
        launch<T, width, 1>(from, rows, factor, shape, to, device.stream());
      } else {
        launch<T, width, width>(from, rows, factor, shape, to, device.stream());
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CUDA, m) {
  m.impl("fade_neurons", TORCH_BOX(&fade_neurons));
}

}  // namespace singe
