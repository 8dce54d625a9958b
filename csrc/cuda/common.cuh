// What every CUDA operator needs. The module must load where torch has no CUDA, so nothing here may refer
// strongly to torch's CUDA libraries.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <type_traits>

#include "../check.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace singe {

constexpr int kWarp = 32;

// Makes the tensor's device current and names torch's stream on it.
class Device {
 public:
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

// Blocks for `items` threads, in grids whose threads walk on by the grid's size.
inline unsigned blocks_for(int64_t items, int threads) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + threads - 1) / threads, 1, 1 << 20));
}

// What a dtype is computed in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rows can't be checked on the host without waiting for the device.
__device__ inline void trap_unless_row(int64_t row, int64_t rows) {
  if (row < -1 || row >= rows) __trap();
}

__device__ inline int64_t global_thread() {
  return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
}
__device__ inline int64_t grid_threads() {
  return gridDim.x * static_cast<int64_t>(blockDim.x);
}

}  // namespace singe
