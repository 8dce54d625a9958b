// The next layer's output for K jobs: a piece of base is read once for a few jobs, and so is the piece of a
// contribution that several of them in a row share.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "common.cuh"

namespace singe {
namespace {

struct Shape {
  int64_t jobs;
  int64_t rows;    // of contribution
  int64_t pieces;  // of base
};

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    fade(const Piece<T, width>* __restrict__ base, const Piece<T, width>* __restrict__ contribution,
         const int64_t* __restrict__ index, const double* __restrict__ t, Shape s, Compute<T> floor,
         Piece<T, width>* __restrict__ out) {
  using C = Compute<T>;
  const int64_t begin = first_job(s.jobs, blockIdx.y), end = first_job(s.jobs, blockIdx.y + 1);
  for (int64_t i = global_thread(); i < s.pieces; i += grid_threads()) {
    const Piece<T, width> from = base[i];
    Piece<T, width> change = from;
    int64_t loaded = -1;
    Piece<T, width>* to = out + begin * s.pieces + i;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = index[k];
      trap_unless_row(row, s.rows);
      if (row >= 0 && row != loaded) {
        change = contribution[row * s.pieces + i];
        loaded = row;
      }
      const C factor = static_cast<C>(t[k] - 1);
      Piece<T, width> next;
#pragma unroll
      for (int v = 0; v < width; ++v) {
        C value = static_cast<C>(from.value[v]);
        if (row >= 0) value += factor * static_cast<C>(change.value[v]);
        next.value[v] = static_cast<T>(value < floor ? floor : value);  // NaN is not below it and stays
      }
      *to = next;
      to += s.pieces;
    }
  }
}

template <class T, int width>
void launch(const T* base, const T* contribution, const int64_t* index, const double* t, Shape s, bool relu,
            T* out, cudaStream_t stream) {
  using Piece = Piece<T, width>;
  using C = Compute<T>;
  s.pieces /= width;
  const C floor = relu ? C{0} : -std::numeric_limits<C>::infinity();
  launch_kernel("fade_next", fade<T, width>, grid_of_jobs(s.pieces, s.jobs), stream,
                reinterpret_cast<const Piece*>(base), reinterpret_cast<const Piece*>(contribution), index, t,
                s, floor, reinterpret_cast<Piece*>(out));
}

Tensor fade_next(const Tensor& base_in, const Tensor& contribution_in, const Tensor& index_in,
                 const Tensor& t_in, bool relu) {
  check_contribution(base_in, contribution_in, index_in);
  const int64_t jobs = index_in.numel();
  check_vector(t_in, ScalarType::Double, jobs, base_in, "t");
  const Device device(base_in);
  const Tensor base = without_gaps(base_in), t = without_gaps(t_in);
  const Tensor contribution = without_gaps(contribution_in);
  const Tensor index = without_gaps(index_in);
  Tensor out = empty(base, copied_sizes(base, jobs), base.scalar_type());
  if (out.numel() == 0) return out;
  const Shape shape{jobs, contribution.size(0), base.numel()};

  with_floating(base.scalar_type(), [&]<class T>() {
    const T* from = base.const_data_ptr<T>();
    const T* changes = contribution.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    with_width<T>(shape.pieces, {from, changes, to}, [&]<int width>() {
      launch<T, width>(from, changes, index.const_data_ptr<int64_t>(), t.const_data_ptr<double>(), shape,
                       relu, to, device.stream());
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CUDA, m) {
  m.impl("fade_next", TORCH_BOX(&fade_next));
}

}  // namespace singe
