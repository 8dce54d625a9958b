// What every CUDA operator needs. The module must load where torch has no CUDA, so nothing here may link to
// torch's CUDA library.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "../check.h"

namespace singe {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// Torch's function that names the current stream of a device; null where torch has no CUDA. A weak symbol
// would stay null there, too, but also everywhere else: Python loads torch's libraries for torch alone.
inline CurrentStream current_stream() {
  static const auto found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

// Makes the tensor's device current and names torch's stream on it.
class Device {
 public:
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(current_stream() != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Starts a kernel in blocks of kThreads. A function call, since only nvcc knows the syntax <<<>>>.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream,
                   Arguments&&... arguments) {
  const cudaLaunchConfig_t config{grid, dim3(kThreads), 0, stream, nullptr, 0};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // forgets it; others' errors are not ours to report
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

// Blocks for `items` threads, in grids whose threads advance by the grid's size.
inline unsigned blocks_for(int64_t items, int threads) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + threads - 1) / threads, 1, 1 << 20));
}

// Rows can't be checked on the host without waiting for the device.
__device__ inline void trap_unless_row(int64_t row, int64_t rows) {
  if (row < -1 || row >= rows) __trap();
}

// `width` neighbouring elements, moved at once.
template <class T, int width>
struct alignas(width * sizeof(T)) Piece {
  T value[width];
};

// Calls f.template operator()<width>() for pieces of 16 bytes where rows of `elements` that begin at these
// pointers split into them, else for pieces of one element.
template <class T, class F>
void with_width(int64_t elements, std::initializer_list<const void*> pointers, F&& f) {
  constexpr int width = 16 / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool whole = elements % width == 0 && std::all_of(pointers.begin(), pointers.end(), aligned);
  if (whole) return f.template operator()<width>();
  f.template operator()<1>();
}

// A grid whose threads each have a piece and a few jobs in a row, so that the piece is read once for them.
inline dim3 grid_of_jobs(int64_t pieces, int64_t jobs) {
  constexpr int64_t few = 8, most = 65535;
  return dim3(blocks_for(pieces, kThreads), static_cast<unsigned>(std::min((jobs + few - 1) / few, most)));
}

// Those jobs: [first_job(jobs, blockIdx.y), first_job(jobs, blockIdx.y + 1)).
__device__ inline int64_t first_job(int64_t jobs, int64_t share) {
  return jobs * share / gridDim.y;
}

__device__ inline int64_t global_thread() {
  return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
}
__device__ inline int64_t grid_threads() {
  return gridDim.x * static_cast<int64_t>(blockDim.x);
}

}  // namespace singe
