// The norm of one neuron's weight gradient, for many jobs, in three launches:
//
//   pack         x into the layout of geometry.h, so that a tap is a constant offset and needs no bounds
//   tile_norms   a block per (jobs, columns): its threads share the positions and keep the tile in registers;
//                the block adds up in a fixed order and leaves one number per (job, tile of columns)
//   add_scores   a warp per neuron walks the jobs in order
//
// A column is a (channel, tap). Nothing is added atomically: the same input gives the same bits.
#include <torch/csrc/stable/library.h>

#include "../geometry.h"
#include "../norm.h"
#include "common.cuh"

namespace singe {
namespace {

constexpr int kWarps = kThreads / kWarp;

// A position of the flattened, pitched layout. Division is several times faster in 32 bits.
template <class Index>
struct Position {
  int64_t b, u0, u1, u2;
  __device__ Position(int64_t flat, int64_t n0, int64_t n1, int64_t n2) {
    Index rest = static_cast<Index>(flat);
    u2 = rest % static_cast<Index>(n2);
    rest /= static_cast<Index>(n2);
    u1 = rest % static_cast<Index>(n1);
    rest /= static_cast<Index>(n1);
    u0 = rest % static_cast<Index>(n0);
    b = rest / static_cast<Index>(n0);
  }
};

__device__ inline bool inside(int64_t i, int64_t n) {
  return i >= 0 && i < n;
}

// packed[set, channel, phase, position]; a set is one job's x, or the only one.
template <class In, class Index>
__global__ void __launch_bounds__(kThreads)
    pack(const In* __restrict__ x, Geometry g, int64_t channels, int64_t rows, In* __restrict__ packed) {
  const Axis &a0 = g.axis[0], &a1 = g.axis[1], &a2 = g.axis[2];
  const int64_t reach = g.reach(), phases = g.phases(), length = g.length();
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {  // a row is (set, channel, phase)
    const int64_t f = row % phases, channel = row / phases % channels, set = row / phases / channels;
    const int64_t first0 = a0.first(f / (a1.phases * a2.phases));
    const int64_t first1 = a1.first(f / a2.phases % a1.phases), first2 = a2.first(f % a2.phases);
    for (int64_t position = global_thread(); position < reach; position += grid_threads()) {
      const Position<Index> u(position, a0.pitch, a1.pitch, a2.pitch);
      const int64_t i0 = u.u0 * a0.stride + first0, i1 = u.u1 * a1.stride + first1;
      const int64_t i2 = u.u2 * a2.stride + first2;
      In value = static_cast<In>(0.0f);
      if (position < length && inside(i0, a0.in) && inside(i1, a1.in) && inside(i2, a2.in)) {
        const int64_t image = (set * g.batch + u.b) * channels + channel;
        value = x[((image * a0.in + i0) * a1.in + i1) * a2.in + i2];
      }
      packed[row * reach + position] = value;
    }
  }
}

// Adds up N values over the lanes of a warp. Lanes swap halves of what they hold, so that each ends up with
// the sums it keeps, N / kWarp of them or one, and N values cost about N exchanges instead of 5 N.
// Returns the index of the first; the pairs are added in the order of a plain butterfly.
template <int N, class T>
__device__ inline int warp_sums(T (&value)[N]) {
  static_assert((N & (N - 1)) == 0, "halves of halves");
  const int lane = threadIdx.x % kWarp;
  int first = 0, held = N;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (held == 1) {
      value[0] += __shfl_xor_sync(0xffffffffu, value[0], step);
      continue;
    }
    held /= 2;
    const bool upper = lane & step;
    if (upper) first += held;
#pragma unroll
    for (int i = 0; i < held; ++i) {
      const T given = upper ? value[i] : value[held + i], kept = upper ? value[held + i] : value[i];
      value[i] = kept + __shfl_xor_sync(0xffffffffu, given, step);
    }
  }
  return first;
}

// One call of the operator.
struct Call {
  Geometry g;
  int64_t jobs, neurons, channels, group_channels, group_neurons;
  int64_t columns, tiles;  // columns of one group, and how many tiles they make
  bool shared;
  Norm norm;
};

// The tile is J jobs by C columns. With J > 1 all jobs see the same channels: x is shared, there are no
// groups.
template <class In, class Index, int J, int C>
__global__ void __launch_bounds__(kThreads)
    tile_norms(const In* __restrict__ packed, const In* __restrict__ delta,
               const int64_t* __restrict__ neuron, Call call, double* __restrict__ parts) {
  using T = Compute<In>;
  const Geometry& g = call.g;
  const int64_t tile = blockIdx.x % call.tiles, first = blockIdx.x / call.tiles * J;
  const int64_t positions = g.batch * g.outputs(), taps = g.taps(), channel_size = g.channel();
  int64_t first_channel = 0;
  if constexpr (J == 1) {
    const int64_t row = neuron[first];
    trap_unless_row(row, call.neurons);
    if (row < 0) return;
    first_channel = row / call.group_neurons * call.group_channels;
    if (!call.shared) first_channel += first * call.channels;
  }

  __shared__ int64_t start[C];  // of a column; a dozen divisions each, which one thread does for all
  if (threadIdx.x < C) {
    const int64_t index = min(tile * C + threadIdx.x, call.columns - 1);
    start[threadIdx.x] = (first_channel + index / taps) * channel_size + g.tap_offset(index % taps);
  }
  __syncthreads();

  // Entries beyond the last job or column compute something that exists and are dropped below.
  const In* row[J];
  const In* column[C];
#pragma unroll
  for (int j = 0; j < J; ++j) row[j] = delta + min(first + j, call.jobs - 1) * positions;
#pragma unroll
  for (int c = 0; c < C; ++c) column[c] = packed + start[c];

  constexpr int kSums = J * C;
  constexpr int kHeld = kSums > kWarp ? kSums / kWarp : 1, kAlike = kSums < kWarp ? kWarp / kSums : 1;
  T sum[kSums] = {};
  const bool dense = g.dense();
  for (int64_t i = threadIdx.x; i < positions; i += kThreads) {
    int64_t at = i;
    if (!dense) {
      const Position<Index> o(i, g.axis[0].out, g.axis[1].out, g.axis[2].out);
      at = ((o.b * g.axis[0].pitch + o.u0) * g.axis[1].pitch + o.u1) * g.axis[2].pitch + o.u2;
    }
    T d[J];
#pragma unroll
    for (int j = 0; j < J; ++j) d[j] = static_cast<T>(row[j][i]);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T value = static_cast<T>(column[c][at]);
#pragma unroll
      for (int j = 0; j < J; ++j) sum[j * C + c] += d[j] * value;
    }
  }

  __shared__ double warp_sum[kWarps][kSums];
  __shared__ double gradient[kSums];
  const int own = warp_sums(sum);
  if (threadIdx.x % kAlike == 0) {  // the first of the lanes that hold the same
#pragma unroll
    for (int i = 0; i < kHeld; ++i) warp_sum[threadIdx.x / kWarp][own + i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += warp_sum[w][threadIdx.x];
    gradient[threadIdx.x] = total;
  }
  __syncthreads();
  if (threadIdx.x < J && first + threadIdx.x < call.jobs) {
    trap_unless_row(neuron[first + threadIdx.x], call.neurons);
    double part = 0;
    for (int c = 0; c < C && tile * C + c < call.columns; ++c) {
      part = merge(call.norm, part, element(call.norm, gradient[threadIdx.x * C + c]));
    }
    parts[(first + threadIdx.x) * call.tiles + tile] = part;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_scores(const double* __restrict__ parts, const int64_t* __restrict__ neuron,
               const double* __restrict__ node_weight, const double* __restrict__ weight_norm, Call call,
               int64_t score_stride, double* __restrict__ scores) {
  const int64_t n = global_thread() / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= call.neurons) return;  // whole warps
  double score = scores[n * score_stride];
  for (int64_t k = 0; k < call.jobs; ++k) {
    if (neuron[k] != n) continue;
    double sum = 0;
    for (int64_t i = lane; i < call.tiles; i += kWarp) sum = merge(call.norm, sum, parts[k * call.tiles + i]);
    for (int step = kWarp / 2; step > 0; step /= 2) {
      sum = merge(call.norm, sum, __shfl_xor_sync(0xffffffffu, sum, step));
    }
    score += node_weight[k] * weight_norm[n] * finish(call.norm, sum);
  }
  if (lane == 0) scores[n * score_stride] = score;
}

struct Pointers {
  const int64_t* neuron;
  const double *node_weight, *weight_norm;
  double* scores;
  int64_t score_stride;
};

template <class In, class Index, int J, int C>
void launch(const Tensor& x, const Tensor& delta, Call call, const Pointers& at, cudaStream_t stream) {
  const Geometry& g = call.g;
  const int64_t rows = (call.shared ? 1 : call.jobs) * call.channels * g.phases();
  Tensor packed = empty(x, {rows * g.reach()}, x.scalar_type());
  const dim3 grid(blocks_for(g.reach(), kThreads), static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  launch_kernel("neuron_grad_norm: pack", pack<In, Index>, grid, stream, x.const_data_ptr<In>(), g,
                call.channels, rows, packed.mutable_data_ptr<In>());

  call.tiles = (call.columns + C - 1) / C;
  const int64_t blocks = (call.jobs + J - 1) / J * call.tiles;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "neuron_grad_norm: too many jobs for one call");
  Tensor parts = empty(x, {call.jobs, call.tiles}, ScalarType::Double);
  launch_kernel("neuron_grad_norm: tile_norms", tile_norms<In, Index, J, C>, static_cast<unsigned>(blocks),
                stream, packed.const_data_ptr<In>(), delta.const_data_ptr<In>(), at.neuron, call,
                parts.mutable_data_ptr<double>());

  const int64_t threads = call.neurons * kWarp;
  launch_kernel("neuron_grad_norm: add_scores", add_scores,
                static_cast<unsigned>((threads + kThreads - 1) / kThreads), stream,
                parts.const_data_ptr<double>(), at.neuron, at.node_weight, at.weight_norm, call,
                at.score_stride, at.scores);
}

template <class In>
void launch(const Tensor& x, const Tensor& delta, const Call& call, const Pointers& at, cudaStream_t stream) {
  constexpr int kTile = std::is_same_v<In, double> ? 4 : 8;  // registers: the tile's square
  const bool alike = call.shared && call.channels == call.group_channels;
  const bool small = call.g.reach() < (int64_t{1} << 31);
  if (alike && small) return launch<In, uint32_t, kTile, kTile>(x, delta, call, at, stream);
  if (alike) return launch<In, uint64_t, kTile, kTile>(x, delta, call, at, stream);
  if (small) return launch<In, uint32_t, 1, kTile>(x, delta, call, at, stream);
  return launch<In, uint64_t, 1, kTile>(x, delta, call, at, stream);
}

void neuron_grad_norm(const Tensor& x_in, const Tensor& delta_in, const Tensor& neuron_in,
                      const Tensor& node_weight_in, const Tensor& weight_norm_in, Sizes kernel_size,
                      Sizes stride, Sizes padding, Sizes dilation, int64_t groups, double p, Tensor scores) {
  const Problem problem = make_problem(x_in, delta_in, neuron_in, node_weight_in, weight_norm_in, scores,
                                       kernel_size, stride, padding, dilation, groups);
  const Geometry& g = problem.geometry;
  Call call{g,
            problem.jobs,
            problem.neurons,
            problem.channels,
            problem.group_channels,
            problem.neurons / groups,
            problem.group_channels * g.taps(),
            0,
            problem.shared,
            Norm::two};
  with_norm(p, [&]<Norm norm>() { call.norm = norm; });
  if (call.jobs == 0 || call.neurons == 0 || call.columns == 0 || g.batch == 0 || g.outputs() == 0) return;

  const Device device(x_in);
  const Tensor x = without_gaps(x_in), delta = without_gaps(delta_in);
  const Tensor neuron = without_gaps(neuron_in);
  const Tensor node_weight = without_gaps(node_weight_in);
  const Tensor weight_norm = without_gaps(weight_norm_in);
  const Pointers at{neuron.const_data_ptr<int64_t>(), node_weight.const_data_ptr<double>(),
                    weight_norm.const_data_ptr<double>(), scores.mutable_data_ptr<double>(),
                    scores.stride(0)};
  with_floating(x.scalar_type(), [&]<class In>() { launch<In>(x, delta, call, at, device.stream()); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singe, CUDA, m) {
  m.impl("neuron_grad_norm", TORCH_BOX(&neuron_grad_norm));
}

}  // namespace singe
