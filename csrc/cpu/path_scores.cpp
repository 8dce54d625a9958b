// Norms of all neurons' gradients over the nodes of a layer's path, in one read.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "../norm.h"
#include "simd.h"

namespace singe {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread
constexpr int64_t kChunk = 512;      // elements that are converted to double at once
constexpr int kLanes = 16;

// The running norm of v, in kLanes interleaved sums that one instruction can serve.
#define SINGE_CHUNK_NORM(name, norm)                                                        \
  SINGE_CLONES double name(const double* v, int64_t n) {                                    \
    double lane[kLanes] = {};                                                               \
    int64_t i = 0;                                                                          \
    for (; i + kLanes <= n; i += kLanes) {                                                  \
      for (int l = 0; l < kLanes; ++l) {                                                    \
        lane[l] = NormOf<norm>::merge(lane[l], NormOf<norm>::element(v[i + l]));            \
      }                                                                                     \
    }                                                                                       \
    for (; i < n; ++i) lane[0] = NormOf<norm>::merge(lane[0], NormOf<norm>::element(v[i])); \
    for (int l = 1; l < kLanes; ++l) lane[0] = NormOf<norm>::merge(lane[0], lane[l]);       \
    return lane[0];                                                                         \
  }
SINGE_CHUNK_NORM(chunk_one, Norm::one)
SINGE_CHUNK_NORM(chunk_two, Norm::two)
SINGE_CHUNK_NORM(chunk_inf, Norm::inf)
#undef SINGE_CHUNK_NORM

template <Norm norm>
double chunk_norm(const double* v, int64_t n) {
  if constexpr (norm == Norm::one) return chunk_one(v, n);
  if constexpr (norm == Norm::two) return chunk_two(v, n);
  return chunk_inf(v, n);
}

template <Norm norm, class T>
double row_norm(const T* row, int64_t n) {
  double chunk[kChunk];
  double sum = 0;
  for (int64_t from = 0; from < n; from += kChunk) {
    const int64_t count = std::min(kChunk, n - from);
    for (int64_t i = 0; i < count; ++i) chunk[i] = static_cast<double>(row[from + i]);
    sum = NormOf<norm>::merge(sum, chunk_norm<norm>(chunk, count));
  }
  return NormOf<norm>::finish(sum);
}

Tensor path_scores(const Tensor& grad_in, const Tensor& weight_norm_in, const Tensor& node_weight_in,
                   double p) {
  STD_TORCH_CHECK(grad_in.dim() == 3, "grad: expected [nodes, neurons, elements]");
  const int64_t nodes = grad_in.size(0), neurons = grad_in.size(1), size = grad_in.size(2);
  check_vector(weight_norm_in, ScalarType::Double, neurons, "weight_norm");
  check_vector(node_weight_in, ScalarType::Double, nodes, "node_weight");
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor weight_norms = torch::stable::contiguous(weight_norm_in);
  const Tensor node_weights = torch::stable::contiguous(node_weight_in);
  Tensor scores = empty(grad, {neurons}, ScalarType::Double);
  const double* weight_norm = weight_norms.const_data_ptr<double>();
  const double* node_weight = node_weights.const_data_ptr<double>();
  double* score = scores.mutable_data_ptr<double>();

  with_norm(p, [&]<Norm norm>() {
    with_floating(grad.scalar_type(), [&]<class T>() {
      const T* data = grad.const_data_ptr<T>();
      const int64_t grain = 1 + kGrain / std::max<int64_t>(1, nodes * size);
      torch::stable::parallel_for(0, neurons, grain, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          double sum = 0;
          for (int64_t k = 0; k < nodes; ++k) {
            sum += node_weight[k] * row_norm<norm>(data + (k * neurons + n) * size, size);
          }
          score[n] = weight_norm[n] * sum;
        }
      });
    });
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CPU, m) {
  m.impl("path_scores", TORCH_BOX(&path_scores));
}

}  // namespace singe
