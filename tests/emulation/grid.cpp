// The emulated runtime: the blocks of a grid one after the other, in an order drawn anew for each grid.
#include <cuda_runtime.h>

#include "block.h"

namespace emulation {
namespace {

Block block;
cudaError_t last_error = cudaSuccess;

bool can_run(const cudaLaunchConfig_t& config) {
  constexpr unsigned most = 65535, most_threads = 1024;
  const auto& [grid, block, shared, stream, attributes, count] = config;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= INT32_MAX && grid.y >= 1 && grid.y <= most && grid.z >= 1 &&
         grid.z <= most && threads >= 1 && threads <= most_threads && block.z <= 64 && shared == 0;
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (!can_run(config)) return last_error = cudaErrorInvalidConfiguration;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::vector<unsigned> order = numbers(uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::shuffle(order.begin(), order.end(), Block::random);
  for (unsigned number : order) {
    blockIdx = index_of(number, gridDim);
    block.run(thread);
  }
  return cudaSuccess;
}

void wait_for_block(Where where) {
  block.wait(State::at_barrier, where);
}

uint64_t exchange(unsigned lanes, uint64_t value, int lane_mask, Where where) {
  if (lanes != 0xffffffffu) throw std::runtime_error("only whole warps can shuffle here");
  return block.exchange(value, lane_mask, where);
}

}  // namespace emulation

cudaError_t cudaGetLastError() {
  return std::exchange(emulation::last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

void __trap() {
  throw std::runtime_error("a thread trapped");
}
