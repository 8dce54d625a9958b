// A warp per (node, neuron) reads its gradient once; then a thread per neuron adds up the nodes in order.
#include <torch/csrc/stable/library.h>

#include "../norm.h"
#include "common.cuh"

namespace singe {
namespace {

constexpr int kThreads = 256;

template <class T, Norm norm>
__global__ void __launch_bounds__(kThreads)
    row_norms(const T* __restrict__ grad, int64_t rows, int64_t size, double* __restrict__ norms) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = global_thread() / kWarp; row < rows; row += grid_threads() / kWarp) {
    double sum = 0;
    for (int64_t i = lane; i < size; i += kWarp) {
      const double v = static_cast<double>(grad[row * size + i]);
      sum = NormOf<norm>::merge(sum, NormOf<norm>::element(v));
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sum = NormOf<norm>::merge(sum, __shfl_xor_sync(0xffffffffu, sum, step));
    }
    if (lane == 0) norms[row] = NormOf<norm>::finish(sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_nodes(const double* __restrict__ norms, const double* __restrict__ weight_norm,
              const double* __restrict__ node_weight, int64_t nodes, int64_t neurons,
              double* __restrict__ scores) {
  for (int64_t n = global_thread(); n < neurons; n += grid_threads()) {
    double sum = 0;
    for (int64_t k = 0; k < nodes; ++k) sum += node_weight[k] * norms[k * neurons + n];
    scores[n] = weight_norm[n] * sum;
  }
}

Tensor path_scores(const Tensor& grad_in, const Tensor& weight_norm_in, const Tensor& node_weight_in,
                   double p) {
  STD_TORCH_CHECK(grad_in.dim() == 3, "grad: expected [nodes, neurons, elements]");
  const int64_t nodes = grad_in.size(0), neurons = grad_in.size(1), size = grad_in.size(2);
  check_vector(weight_norm_in, ScalarType::Double, neurons, "weight_norm");
  check_vector(node_weight_in, ScalarType::Double, nodes, "node_weight");
  const Device device(grad_in);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor weight_norm = torch::stable::contiguous(weight_norm_in);
  const Tensor node_weight = torch::stable::contiguous(node_weight_in);
  Tensor scores = empty(grad, {neurons}, ScalarType::Double);
  Tensor norms = empty(grad, {nodes, neurons}, ScalarType::Double);
  if (neurons == 0) return scores;

  with_norm(p, [&]<Norm norm>() {
    with_floating(grad.scalar_type(), [&]<class T>() {
      const int64_t rows = nodes * neurons;
      row_norms<T, norm><<<blocks_for(rows * kWarp, kThreads), kThreads, 0, device.stream()>>>(
          grad.const_data_ptr<T>(), rows, size, norms.mutable_data_ptr<double>());
      check_launch("path_scores: row_norms");
    });
  });
  sum_nodes<<<blocks_for(neurons, kThreads), kThreads, 0, device.stream()>>>(
      norms.const_data_ptr<double>(), weight_norm.const_data_ptr<double>(),
      node_weight.const_data_ptr<double>(), nodes, neurons, scores.mutable_data_ptr<double>());
  check_launch("path_scores: sum_nodes");
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CUDA, m) {
  m.impl("path_scores", TORCH_BOX(&path_scores));
}

}  // namespace singe
