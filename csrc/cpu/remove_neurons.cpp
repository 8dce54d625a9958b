// base minus several contributions, block by block: base is read and written once, rounded once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "simd.h"

namespace singe {
namespace {

constexpr int64_t kBlock = 1 << 11;  // elements that are worked on at once
constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

// n elements at base less those at every contribution, in place.
template <class T>
void remove(const std::vector<const T*>& contributions, int64_t first, int64_t n, T* __restrict base) {
  using C = Compute<T>;
  C rest[kBlock];
  simd::run([&]() SINGE_INLINED {
    for (int64_t i = 0; i < n; ++i) rest[i] = static_cast<C>(base[i]);
    for (const T* contribution : contributions) {
      const T* from = contribution + first;
      for (int64_t i = 0; i < n; ++i) rest[i] -= static_cast<C>(from[i]);
    }
    for (int64_t i = 0; i < n; ++i) base[i] = static_cast<T>(rest[i]);
  });
}

void remove_neurons(Tensor base, const Tensor& contribution_in, const Tensor& index_in) {
  check_contribution(base, contribution_in, index_in);
  STD_TORCH_CHECK(base.is_contiguous(), "base: expected a contiguous tensor");
  const Tensor contribution = without_gaps(contribution_in);
  const Tensor indices = without_gaps(index_in);
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t removed = indices.numel(), elements = base.numel();
  check_rows(index, removed, contribution.size(0), "index");

  with_floating(base.scalar_type(), [&]<class T>() {
    const T* from = contribution.const_data_ptr<T>();
    T* to = base.mutable_data_ptr<T>();
    std::vector<const T*> contributions;
    for (int64_t r = 0; r < removed; ++r) {
      if (index[r] >= 0) contributions.push_back(from + index[r] * elements);
    }
    if (contributions.empty()) return;
    const int64_t blocks = (elements + kBlock - 1) / kBlock;
    torch::stable::parallel_for(0, blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kBlock; first < std::min(end * kBlock, elements); first += kBlock) {
        remove(contributions, first, std::min(kBlock, elements - first), to + first);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CPU, m) {
  m.impl("remove_neurons", TORCH_BOX(&remove_neurons));
}

}  // namespace singe
