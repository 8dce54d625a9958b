// What every operator needs of torch's stable ABI: checks, dtypes, allocation. Users' mistakes are caught in
// singe/ops.py with better messages; the checks here keep a direct call of torch.ops.singe from reading
// astray.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace singe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_vector(const Tensor& v, ScalarType type, int64_t length, const char* name) {
  STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == length && v.scalar_type() == type, name,
                  ": expected a vector of length ", length, ", float64 (int64 for neuron)");
}

// Calls f.template operator()<T>() with the C++ type of a floating dtype.
template <class F>
void with_floating(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    case ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16");
  }
}

// A new tensor on the device of `like`.
inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// The product of sizes [from, dim).
inline int64_t numel_from(const Tensor& t, int64_t from) {
  int64_t n = 1;
  for (int64_t d = from; d < t.dim(); ++d) n *= t.size(d);
  return n;
}

// The sizes of fade_neurons' result, [K*B, N, *S], with its arguments checked.
inline std::vector<int64_t> faded_sizes(const Tensor& z, const Tensor& neuron, const Tensor& t) {
  STD_TORCH_CHECK(z.dim() >= 2, "z: expected [batch, neurons, ...]");
  STD_TORCH_CHECK(t.dim() == 1, "t: expected a vector");
  STD_TORCH_CHECK(neuron.dim() == 1 || neuron.dim() == 2, "neuron: expected [K] or [K, R]");
  STD_TORCH_CHECK(neuron.scalar_type() == ScalarType::Long && neuron.size(0) == t.size(0),
                  "neuron: expected int64 with a row per element of t");
  check_vector(t, ScalarType::Double, t.size(0), "t");
  std::vector<int64_t> sizes(z.sizes().begin(), z.sizes().end());
  sizes[0] *= t.size(0);
  return sizes;
}

}  // namespace singe
