// Every operator's schema. singe/ops.py describes what they compute; implementations register themselves at
// the end of csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(singe, m) {
  m.def("fade_neurons(Tensor z, Tensor neuron, Tensor t, int axis) -> Tensor");
  m.def("fade_next(Tensor base, Tensor contribution, Tensor index, Tensor t, bool relu) -> Tensor");
  m.def(
      "neuron_grad_norm(Tensor x, Tensor delta, Tensor neuron, Tensor node_weight, Tensor weight_norm, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, float p, "
      "Tensor(a!) scores) -> ()");
  m.def("remove_neurons(Tensor(a!) base, Tensor contribution, Tensor index) -> ()");
}
