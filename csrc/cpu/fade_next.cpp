// The next layer's output for K jobs: one block of elements for all jobs, then the next block, so that base
// is read from the cache, and so is a contribution that several jobs in a row share.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>

#include "../check.h"
#include "simd.h"

namespace singe {
namespace {

constexpr int64_t kBlock = 1 << 14;  // elements that are worked on at once
constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

// NaN is not below the floor and stays.
template <class C>
SINGE_INLINE C at_least(C floor, C v) {
  return v < floor ? floor : v;
}

// One block of one job; `change` is null where nothing is added to base.
template <class T>
void fade(const T* __restrict base, const T* __restrict change, Compute<T> factor, Compute<T> floor,
          int64_t n, T* __restrict out) {
  using C = Compute<T>;
  simd::run([=]() SINGE_INLINED {
    if (change == nullptr) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(at_least(floor, static_cast<C>(base[i])));
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const C sum = static_cast<C>(base[i]) + factor * static_cast<C>(change[i]);
        out[i] = static_cast<T>(at_least(floor, sum));
      }
    }
  });
}

Tensor fade_next(const Tensor& base_in, const Tensor& contribution_in, const Tensor& index_in,
                 const Tensor& t_in, bool relu) {
  check_contribution(base_in, contribution_in, index_in);
  const int64_t jobs = index_in.numel(), elements = base_in.numel();
  check_vector(t_in, ScalarType::Double, jobs, base_in, "t");
  const Tensor base = without_gaps(base_in), t = without_gaps(t_in);
  const Tensor contribution = without_gaps(contribution_in);
  const Tensor indices = without_gaps(index_in);
  Tensor out = empty(base, copied_sizes(base, jobs), base.scalar_type());
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const double* node = t.const_data_ptr<double>();
  check_rows(index, jobs, contribution.size(0), "index");

  with_floating(base.scalar_type(), [&]<class T>() {
    using C = Compute<T>;
    const T* from = base.const_data_ptr<T>();
    const T* changes = contribution.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const C floor = relu ? C{0} : -std::numeric_limits<C>::infinity();
    const int64_t blocks = (elements + kBlock - 1) / kBlock;
    torch::stable::parallel_for(0, blocks * jobs, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / jobs * kBlock, k = i % jobs;
        const T* change = index[k] < 0 ? nullptr : changes + index[k] * elements + first;
        fade(from + first, change, static_cast<C>(node[k] - 1), floor, std::min(kBlock, elements - first),
             to + k * elements + first);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CPU, m) {
  m.impl("fade_next", TORCH_BOX(&fade_next));
}

}  // namespace singe
