// base minus several contributions in one pass: each piece is read, rounded and written once.
#include <torch/csrc/stable/library.h>

#include "common.cuh"

namespace singe {
namespace {

struct Shape {
  int64_t removed;  // length of index
  int64_t rows;     // of contribution
  int64_t pieces;   // of base
};

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    remove(const Piece<T, width>* __restrict__ contribution, const int64_t* __restrict__ index, Shape s,
           Piece<T, width>* __restrict__ base) {
  using C = Compute<T>;
  for (int64_t i = global_thread(); i < s.pieces; i += grid_threads()) {
    Piece<T, width> piece = base[i];
    C rest[width];
#pragma unroll
    for (int v = 0; v < width; ++v) rest[v] = static_cast<C>(piece.value[v]);
    for (int64_t r = 0; r < s.removed; ++r) {
      const int64_t row = index[r];
      trap_unless_row(row, s.rows);
      if (row < 0) continue;
      const Piece<T, width> change = contribution[row * s.pieces + i];
#pragma unroll
      for (int v = 0; v < width; ++v) rest[v] -= static_cast<C>(change.value[v]);
    }
#pragma unroll
    for (int v = 0; v < width; ++v) piece.value[v] = static_cast<T>(rest[v]);
    base[i] = piece;
  }
}

template <class T, int width>
void launch(const T* contribution, const int64_t* index, Shape s, T* base, cudaStream_t stream) {
  s.pieces /= width;
  launch_kernel("remove_neurons", remove<T, width>, blocks_for(s.pieces, kThreads), stream,
                reinterpret_cast<const Piece<T, width>*>(contribution), index, s,
                reinterpret_cast<Piece<T, width>*>(base));
}

void remove_neurons(Tensor base, const Tensor& contribution_in, const Tensor& index_in) {
  check_contribution(base, contribution_in, index_in);
  STD_TORCH_CHECK(base.is_contiguous(), "base: expected a contiguous tensor");
  const Device device(base);
  const Tensor contribution = without_gaps(contribution_in);
  const Tensor index = without_gaps(index_in);
  const Shape shape{index.numel(), contribution.size(0), base.numel()};
  if (shape.removed == 0 || shape.pieces == 0) return;

  with_floating(base.scalar_type(), [&]<class T>() {
    const T* from = contribution.const_data_ptr<T>();
    T* to = base.mutable_data_ptr<T>();
    with_width<T>(shape.pieces, {from, to}, [&]<int width>() {
      launch<T, width>(from, index.const_data_ptr<int64_t>(), shape, to, device.stream());
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CUDA, m) {
  m.impl("remove_neurons", TORCH_BOX(&remove_neurons));
}

}  // namespace singe
