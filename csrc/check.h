// What every operator needs of torch's stable ABI: checks, dtypes, allocation. Users' mistakes are caught in
// singe/ops.py with better messages; the checks here keep a direct call of torch.ops.singe from reading out
// of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <numeric>
#include <type_traits>
#include <vector>

namespace singe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device a kernel runs on is that of `like`.
inline void check_device(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.device() == like.device(), name, ": expected the device of the other tensors");
}

inline void check_vector(const Tensor& v, ScalarType type, int64_t length, const Tensor& like,
                         const char* name) {
  check_device(v, like, name);
  STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == length && v.scalar_type() == type, name,
                  ": expected a vector of length ", length, ", float64 (int64 for rows)");
}

// Rows of a tensor, -1 for none.
inline void check_rows(const int64_t* row, int64_t count, int64_t rows, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(row[i] >= -1 && row[i] < rows, name, ": expected rows below ", rows, ", got ", row[i]);
  }
}

// The type that a dtype is computed in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

// Makes a tensor. Torch's stable ABI does not say why it can't, and shortage is the one reason that is left
// once arguments are checked; singe.memory.is_shortage knows these words, so that passes get
// smaller.
template <class Make>
Tensor allocate(int64_t elements, Make&& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, "can't allocate memory for a tensor of ", elements, " elements: ", error.what());
  }
}

// A new tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  const int64_t elements = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  return allocate(elements, [&] { return torch::stable::new_empty(like, sizes, type); });
}

// The tensor itself, or a copy without gaps.
inline Tensor without_gaps(const Tensor& t) {
  return allocate(t.numel(), [&] { return torch::stable::contiguous(t); });
}

// The product of sizes [from, to).
inline int64_t numel_between(const Tensor& t, int64_t from, int64_t to) {
  int64_t n = 1;
  for (int64_t d = from; d < to; ++d) n *= t.size(d);
  return n;
}

// The sizes of `jobs` copies of a tensor, one after the other along the first axis.
inline std::vector<int64_t> copied_sizes(const Tensor& t, int64_t jobs) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] *= jobs;
  return sizes;
}

// The arguments of fade_neurons.
inline void check_fade(const Tensor& z, const Tensor& neuron, const Tensor& t, int64_t axis) {
  STD_TORCH_CHECK(axis >= 1 && axis < z.dim(), "axis: expected 1 to ", z.dim() - 1, ", got ", axis);
  STD_TORCH_CHECK(t.dim() == 1, "t: expected a vector");
  STD_TORCH_CHECK(neuron.dim() == 1 || neuron.dim() == 2, "neuron: expected [K] or [K, R]");
  STD_TORCH_CHECK(neuron.scalar_type() == ScalarType::Long && neuron.size(0) == t.size(0),
                  "neuron: expected int64 with a row per element of t");
  check_device(neuron, z, "neuron");
  check_vector(t, ScalarType::Double, t.size(0), z, "t");
}

// What fade_next and remove_neurons have in common: contribution is [C, *base], index names rows of it.
inline void check_contribution(const Tensor& base, const Tensor& contribution, const Tensor& index) {
  STD_TORCH_CHECK(base.dim() >= 1, "base: expected [batch, ...]");
  check_device(contribution, base, "contribution");
  STD_TORCH_CHECK(contribution.scalar_type() == base.scalar_type() && contribution.dim() == base.dim() + 1,
                  "contribution: expected [C, *base] in the dtype of base");
  for (int64_t d = 0; d < base.dim(); ++d) {
    STD_TORCH_CHECK(contribution.size(d + 1) == base.size(d), "contribution: expected ", base.size(d),
                    " along axis ", d + 1, ", got ", contribution.size(d + 1));
  }
  STD_TORCH_CHECK(index.dim() == 1, "index: expected a vector");
  check_vector(index, ScalarType::Long, index.size(0), base, "index");
}

}  // namespace singe
