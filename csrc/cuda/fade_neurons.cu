// K copies of z: each value is read once a few copies and written in 16-byte pieces where alignment allows.
#include <torch/csrc/stable/library.h>

#include "common.cuh"

namespace singe {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMostCopyBlocks = 64;  // blockIdx.y: how many ways the copies are divided

struct Shape {
  int64_t jobs, per_job;           // of neuron
  int64_t pieces, channel_pieces;  // of z and of one of its channels
  int64_t channels;
};

template <class T, int width>
struct alignas(width * sizeof(T)) Piece {
  T value[width];
};

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    fade(const Piece<T, width>* __restrict__ z, const int64_t* __restrict__ neuron,
         const double* __restrict__ t, Shape s, Piece<T, width>* __restrict__ out) {
  for (int64_t i = global_thread(); i < s.pieces; i += grid_threads()) {
    const int64_t channel = i / s.channel_pieces % s.channels;
    const Piece<T, width> piece = z[i];
    for (int64_t k = blockIdx.y; k < s.jobs; k += gridDim.y) {
      bool scaled = false;
      for (int64_t r = 0; r < s.per_job; ++r) {
        const int64_t row = neuron[k * s.per_job + r];
        trap_unless_row(row, s.channels);
        scaled |= row == channel;
      }
      Piece<T, width> copy = piece;
      if (scaled) {
        const auto factor = static_cast<Compute<T>>(t[k]);
#pragma unroll
        for (int v = 0; v < width; ++v)
          copy.value[v] = static_cast<T>(static_cast<Compute<T>>(copy.value[v]) * factor);
      }
      out[k * s.pieces + i] = copy;
    }
  }
}

template <class T, int width>
void launch(const T* z, const int64_t* neuron, const double* t, Shape s, T* out, cudaStream_t stream) {
  s.pieces /= width;
  s.channel_pieces /= width;
  const unsigned copies = static_cast<unsigned>(std::min<int64_t>(s.jobs, kMostCopyBlocks));
  const dim3 grid(blocks_for(s.pieces, kThreads), copies);
  fade<T, width><<<grid, kThreads, 0, stream>>>(reinterpret_cast<const Piece<T, width>*>(z), neuron, t, s,
                                                reinterpret_cast<Piece<T, width>*>(out));
  check_launch("fade_neurons");
}

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

Tensor fade_neurons(const Tensor& z_in, const Tensor& neuron_in, const Tensor& t_in) {
  const std::vector<int64_t> sizes = faded_sizes(z_in, neuron_in, t_in);
  const Device device(z_in);
  const Tensor z = torch::stable::contiguous(z_in), t = torch::stable::contiguous(t_in);
  const Tensor neuron = torch::stable::contiguous(neuron_in);
  Tensor out = empty(z, sizes, z.scalar_type());
  if (out.numel() == 0) return out;
  const Shape shape{t.numel(), numel_from(neuron, 1), z.numel(), numel_from(z, 2), z.size(1)};

  with_floating(z.scalar_type(), [&]<class T>() {
    constexpr int width = 16 / sizeof(T);
    const T* from = z.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t* rows = neuron.const_data_ptr<int64_t>();
    const double* factor = t.const_data_ptr<double>();
    if (shape.channel_pieces % width == 0 && aligned(from) && aligned(to)) {
      launch<T, width>(from, rows, factor, shape, to, device.stream());
    } else {
      launch<T, 1>(from, rows, factor, shape, to, device.stream());
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CUDA, m) {
  m.impl("fade_neurons", TORCH_BOX(&fade_neurons));
}

}  // namespace singe
