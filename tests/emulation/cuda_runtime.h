// What csrc/cuda uses of the CUDA runtime, on the host: found instead of NVIDIA's header, it runs a grid's
// blocks one after the other and the threads of a block as fibers (grid.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace emulation {

using Where = std::source_location;

// Runs a grid. An error in a kernel is thrown; on a device it would end the context or pass unseen.
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

void wait_for_block(Where where);

// Hands `value` to the lanes of the warp; returns that of the lane whose number differs in the bits of
// `lane_mask`.
uint64_t exchange(unsigned lanes, uint64_t value, int lane_mask, Where where);

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulation::run(*config, [&] { kernel(arguments...); });
}

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

inline void __syncthreads(emulation::Where where = emulation::Where::current()) {
  emulation::wait_for_block(where);
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int lane_mask,
                  emulation::Where where = emulation::Where::current()) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(lanes, bits, lane_mask, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

[[noreturn]] void __trap();

using std::max;
using std::min;
