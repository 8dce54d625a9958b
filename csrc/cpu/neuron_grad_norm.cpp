// The norm of one neuron's weight gradient, for many jobs (see geometry.h and gradient.h for how).
//
// Jobs that see the same channels form a panel; the work is split into panels and, where there are few of
// them, ranges of units of x. What is kept is one number per job and unit, so that the result does not depend
// on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../check.h"
#include "../geometry.h"
#include "../norm.h"
#include "gradient.h"

namespace singe {
namespace {

constexpr int64_t kLeastPanel = 8, kMostPanel = 32;  // jobs

struct Panel {
  std::vector<int64_t> jobs;
  int64_t group;
};

// Jobs by group, in panels; with an x for every job, each is its own panel.
std::vector<Panel> make_panels(const Problem& p, const int64_t* neuron, int64_t threads) {
  const int64_t limit = p.shared ? std::clamp((p.jobs + threads - 1) / threads, kLeastPanel, kMostPanel) : 1;
  const int64_t rows = p.shared ? simd::kRows : 1;  // that are worked on at once
  std::vector<std::vector<int64_t>> members(p.groups);
  check_rows(neuron, p.jobs, p.neurons, "neuron");
  for (int64_t k = 0; k < p.jobs; ++k) {
    if (neuron[k] >= 0) members[p.group_of(neuron[k])].push_back(k);
  }
  std::vector<Panel> panels;
  for (int64_t g = 0; g < p.groups; ++g) {
    // as many panels as the limit asks for, of much the same size
    const int64_t count = static_cast<int64_t>(members[g].size()), parts = (count + limit - 1) / limit;
    const int64_t steps = (count + rows - 1) / rows;
    const auto border = [&](int64_t i) {
      return members[g].begin() + std::min(count, steps * i / parts * rows);
    };
    for (int64_t i = 0; i < parts; ++i) panels.push_back({{border(i), border(i + 1)}, g});
  }
  return panels;
}

// Into how many ranges of units to divide the work of every panel, so that no thread has much more to do than
// another: parallel_for hands each the same number of ranges, the last one fewer.
int64_t splits_for(int64_t panels, int64_t units, int64_t threads) {
  const auto longest = [&](int64_t splits) {  // units that the busiest thread works on
    return (panels * splits + threads - 1) / threads * ((units + splits - 1) / splits);
  };
  const int64_t least = std::min(units, (threads + panels - 1) / panels);
  int64_t best = least;
  for (int64_t splits = least; splits <= std::min(units, least + 8); ++splits) {
    if (21 * longest(splits) < 20 * longest(best)) best = splits;  // every range packs all deltas anew
  }
  return best;
}

// Every job's norm in parts, not yet merged: one value per unit of x. Empty where there is nothing to sum.
template <class In, Norm norm>
std::vector<double> unit_norms(const Problem& p, const In* x, const In* delta, const int64_t* neuron) {
  using T = Compute<In>;
  const Geometry& g = p.geometry;
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<Panel> panels = make_panels(p, neuron, threads);
  if (panels.empty() || g.batch == 0 || g.outputs() == 0 || p.group_channels == 0) return {};

  const Gradient<In> layout(g);
  const int64_t units = layout.units(p.group_channels), size = layout.unit_size();
  std::vector<double> norms(p.jobs * units, 0.0);
  const auto pack = [&](int64_t job, int64_t group, int64_t unit, T* to) {
    const int64_t first = job * g.batch * p.channels + group * p.group_channels;
    layout.pack(x + first * g.inputs(), p.channels, p.group_channels, unit, to);
  };
  std::unique_ptr<T[]> packed(p.shared ? new T[p.groups * units * size] : nullptr);
  if (p.shared) {
    torch::stable::parallel_for(0, p.groups * units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(0, i / units, i % units, &packed[i * size]);
    });
  }

  const int64_t count = static_cast<int64_t>(panels.size());
  const int64_t splits = splits_for(count, units, threads);
  torch::stable::parallel_for(0, count * splits, 1, [&](int64_t begin, int64_t end) {
    Gradient<In> gradient(g);
    std::vector<T> own;
    for (int64_t i = begin; i < end; ++i) {
      const auto& [jobs, group] = panels[i / splits];
      const int64_t first = i % splits * units / splits, last = (i % splits + 1) * units / splits;
      if (!p.shared) {
        own.resize((last - first) * size);
        for (int64_t u = first; u < last; ++u) pack(jobs[0], group, u, &own[(u - first) * size]);
      }
      const T* source = p.shared ? &packed[(group * units + first) * size] : own.data();
      std::vector<const In*> deltas;
      for (int64_t job : jobs) deltas.push_back(delta + job * g.batch * g.outputs());
      const double* value = gradient.compute(deltas, source, last - first).data();
      for (int64_t job : jobs) {
        for (int64_t u = first; u < last; ++u) {
          double& sum = norms[job * units + u];
          for (int64_t c = 0; c < layout.unit_columns(); ++c) {
            sum = NormOf<norm>::merge(sum, NormOf<norm>::element(*value++));
          }
        }
      }
    }
  });
  return norms;
}

void neuron_grad_norm(const Tensor& x_in, const Tensor& delta_in, const Tensor& neuron_in,
                      const Tensor& node_weight_in, const Tensor& weight_norm_in, Sizes kernel_size,
                      Sizes stride, Sizes padding, Sizes dilation, int64_t groups, double p, Tensor scores) {
  const Problem problem = make_problem(x_in, delta_in, neuron_in, node_weight_in, weight_norm_in, scores,
                                       kernel_size, stride, padding, dilation, groups);
  const Tensor x = without_gaps(x_in), delta = without_gaps(delta_in);
  const Tensor neurons = without_gaps(neuron_in);
  const Tensor node_weights = without_gaps(node_weight_in);
  const Tensor weight_norms = without_gaps(weight_norm_in);
  const int64_t* neuron = neurons.const_data_ptr<int64_t>();
  const double* node_weight = node_weights.const_data_ptr<double>();
  const double* weight_norm = weight_norms.const_data_ptr<double>();
  double* score = scores.mutable_data_ptr<double>();

  with_norm(p, [&]<Norm norm>() {
    std::vector<double> parts;
    with_floating(x.scalar_type(), [&]<class In>() {
      parts = unit_norms<In, norm>(problem, x.const_data_ptr<In>(), delta.const_data_ptr<In>(), neuron);
    });
    if (parts.empty()) return;
    const int64_t units = static_cast<int64_t>(parts.size()) / problem.jobs;
    for (int64_t k = 0; k < problem.jobs; ++k) {
      const int64_t n = neuron[k];
      if (n < 0) continue;
      double sum = 0;
      for (int64_t u = 0; u < units; ++u) sum = NormOf<norm>::merge(sum, parts[k * units + u]);
      score[n * scores.stride(0)] += node_weight[k] * weight_norm[n] * NormOf<norm>::finish(sum);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CPU, m) {
  m.impl("neuron_grad_norm", TORCH_BOX(&neuron_grad_norm));
}

}  // namespace singe
