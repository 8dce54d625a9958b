// A convolution's geometry, laid out so that a weight gradient becomes dot products of contiguous rows.
//
// Along one axis the window's tap j at output o reads the zero-padded input at o*stride + j*dilation. Split
// the padded input into phases by its index modulo the stride, and the same tap reads phase(j) at o +
// shift(j). So with all axes flattened at one pitch, a tap of the gradient is the dot product of delta with
// one phase of x at a constant offset. Positions that exist only to keep the pitch hold zeros in delta.
//
// An axis is `pitch` long: at least `out`, and less than the `out + shift` a window reaches where the zeros
// at the end of one row can serve as those at the beginning of the next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "check.h"

namespace singe {

struct Axis {
  int64_t in = 1, out = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
  int64_t phases = 1;  // how many of the stride's phases some tap reads
  int64_t pitch = 1;

  constexpr int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  constexpr int64_t phase(int64_t tap) const { return tap % phases; }
  // Index u of a phase is input element u * stride + first(phase), where that exists.
  constexpr int64_t first(int64_t phase) const { return phase * dilation % stride - padding; }
  // The indices [begin, end) of a phase that exist in the input, for a row of `length`.
  constexpr int64_t begin(int64_t phase) const { return ceil_index(-first(phase)); }
  constexpr int64_t end(int64_t phase, int64_t length) const {
    return std::max(begin(phase), std::min(length, ceil_index(in - first(phase))));
  }

  void layout() {
    phases = std::min(kernel, stride / std::gcd(stride, dilation));
    const int64_t reach = out + shift(kernel - 1);
    int64_t shared = reach - out;
    for (int64_t f = 0; f < phases; ++f) shared = std::min({shared, begin(f), reach - end(f, reach)});
    pitch = std::max<int64_t>(1, reach - std::max<int64_t>(0, shared));
  }

 private:
  constexpr int64_t ceil_index(int64_t element) const {
    return element <= 0 ? 0 : (element + stride - 1) / stride;
  }
};

struct Geometry {
  static constexpr int kRank = 3;  // lower ranks leave leading axes at size 1
  Axis axis[kRank];
  int64_t batch = 0;

  constexpr int64_t taps() const { return axis[0].kernel * axis[1].kernel * axis[2].kernel; }
  constexpr int64_t phases() const { return axis[0].phases * axis[1].phases * axis[2].phases; }
  constexpr int64_t inputs() const { return axis[0].in * axis[1].in * axis[2].in; }
  constexpr int64_t outputs() const { return axis[0].out * axis[1].out * axis[2].out; }
  constexpr int64_t image() const { return axis[0].pitch * axis[1].pitch * axis[2].pitch; }
  // Length of delta's row: the whole batch, flattened.
  constexpr int64_t length() const { return batch * image(); }
  // Length of one phase of one channel of x: as far as the last tap reaches from delta's last position.
  constexpr int64_t reach() const {
    return length() + offset(axis[0].kernel - 1, axis[1].kernel - 1, axis[2].kernel - 1);
  }
  constexpr int64_t channel() const { return phases() * reach(); }
  // No position is there only to keep the pitch, so delta is its own flattened row.
  constexpr bool dense() const { return image() == outputs(); }

  // Where a tap, numbered as in the flattened window, begins in a channel of x.
  constexpr int64_t tap_offset(int64_t tap) const {
    const int64_t k = tap % axis[2].kernel, j = tap / axis[2].kernel % axis[1].kernel;
    const int64_t i = tap / axis[2].kernel / axis[1].kernel;
    const int64_t phase =
        (axis[0].phase(i) * axis[1].phases + axis[1].phase(j)) * axis[2].phases + axis[2].phase(k);
    return phase * reach() + offset(i, j, k);
  }

 private:
  constexpr int64_t offset(int64_t i, int64_t j, int64_t k) const {
    return (axis[0].shift(i) * axis[1].pitch + axis[1].shift(j)) * axis[2].pitch + axis[2].shift(k);
  }
};

// One call of neuron_grad_norm: the shapes, checked.
struct Problem {
  Geometry geometry;
  int64_t jobs, batch, neurons, groups;
  int64_t channels;        // of x
  int64_t group_channels;  // of x, that one neuron sees
  bool shared;             // one x for all jobs

  int64_t group_of(int64_t neuron) const { return neuron / (neurons / groups); }
};

using Sizes = std::vector<int64_t>;

inline Problem make_problem(const Tensor& x, const Tensor& delta, const Tensor& neuron,
                            const Tensor& node_weight, const Tensor& weight_norm, const Tensor& scores,
                            const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                            const Sizes& dilation, int64_t groups) {
  const int64_t rank = static_cast<int64_t>(kernel_size.size());
  STD_TORCH_CHECK(rank <= Geometry::kRank, "kernel_size: expected at most 3 axes, got ", rank);
  STD_TORCH_CHECK(stride.size() == kernel_size.size() && padding.size() == kernel_size.size() &&
                      dilation.size() == kernel_size.size(),
                  "stride, padding, dilation: expected as many values as kernel_size");
  STD_TORCH_CHECK(x.dim() == rank + 2 && delta.dim() == rank + 2, "x, delta: expected ", rank + 2, " axes");
  STD_TORCH_CHECK(x.scalar_type() == delta.scalar_type(), "x, delta: expected the same dtype");
  check_device(delta, x, "delta");

  Problem p{};
  p.jobs = delta.size(0);
  p.batch = p.geometry.batch = delta.size(1);
  p.neurons = weight_norm.numel();
  p.channels = x.size(1);
  p.groups = groups;
  p.shared = x.size(0) == p.batch && p.jobs != 1;
  STD_TORCH_CHECK(p.shared || x.size(0) == p.jobs * p.batch, "x: expected ", p.batch, " or ",
                  p.jobs * p.batch, " rows, got ", x.size(0));
  STD_TORCH_CHECK(groups > 0 && p.channels % groups == 0 && p.neurons % groups == 0,
                  "groups: must divide channels and neurons");
  p.group_channels = p.channels / groups;
  check_vector(neuron, ScalarType::Long, p.jobs, x, "neuron");
  check_vector(node_weight, ScalarType::Double, p.jobs, x, "node_weight");
  check_vector(weight_norm, ScalarType::Double, p.neurons, x, "weight_norm");
  check_vector(scores, ScalarType::Double, p.neurons, x, "scores");
  for (int64_t d = 0; d < rank; ++d) {
    Axis& a = p.geometry.axis[Geometry::kRank - rank + d];
    a = {x.size(d + 2), delta.size(d + 2), kernel_size[d], stride[d], padding[d], dilation[d]};
    STD_TORCH_CHECK(a.kernel > 0 && a.stride > 0 && a.padding >= 0 && a.dilation > 0, "bad geometry");
    const int64_t span = a.in + 2 * a.padding - a.dilation * (a.kernel - 1);
    const int64_t out = span < 1 ? 0 : (span - 1) / a.stride + 1;
    STD_TORCH_CHECK(a.out == out, "delta: expected ", out, " positions along axis ", d, ", got ", a.out);
    a.layout();
  }
  return p;
}

}  // namespace singe
