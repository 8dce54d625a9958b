// A kernel that is right and some that are not: a program to see that the emulation and the sanitizers tell.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr unsigned kWarp = 32, kThreads = 128, kAll = 0xffffffffu;

// out[block] = the sum of the block's part of x
template <bool barrier>
__global__ void add(const float* x, int n, float* out) {
  __shared__ float part[kThreads / kWarp];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < static_cast<unsigned>(n) ? x[i] : 0;
  for (unsigned step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = sum;
  if (barrier) __syncthreads();
  if (threadIdx.x != 0) return;
  out[blockIdx.x] = 0;
  for (float p : part) out[blockIdx.x] += p;
}

__global__ void read_behind(const float* x, int n, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= static_cast<unsigned>(n)) out[0] = x[i];
}

__global__ void write_behind_shared(const float*, int n, float* out) {
  __shared__ float part[kThreads];
  float* here = part;
  here[threadIdx.x + n % 2] = 1;
  out[0] = here[0];
}

__global__ void read_across(const float* x, int, float* out) {
  struct alignas(16) Piece {
    float value[4];
  };
  const Piece piece = *reinterpret_cast<const Piece*>(x + 1);
  out[0] = piece.value[0];
}

__global__ void leave_before_barrier(const float*, int, float*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void wait_at_two_barriers(const float*, int, float*) {
  if (threadIdx.x < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_without_a_lane(const float* x, int, float* out) {
  if (threadIdx.x != 9) out[0] = __shfl_xor_sync(kAll, x[0], 1);
}

__global__ void trap(const float*, int n, float*) {
  if (n > 0) __trap();
}

using Kernel = void (*)(const float*, int, float*);
const std::map<std::string, Kernel> kKernels{
    {"add", add<true>},
    {"add without a barrier", add<false>},
    {"leave before a barrier", leave_before_barrier},
    {"read across a piece", read_across},
    {"read behind", read_behind},
    {"shuffle without a lane", shuffle_without_a_lane},
    {"trap", trap},
    {"wait at two barriers", wait_at_two_barriers},
    {"write behind shared memory", write_behind_shared},
};

}  // namespace

int main(int, char** arguments) {
  constexpr int n = 1001;
  constexpr unsigned blocks = (n + kThreads - 1) / kThreads;
  const std::vector<float> ones(n, 1.0f);
  std::vector<float> sums(blocks);
  const cudaLaunchConfig_t config{
      std::string(arguments[2]) == "no blocks" ? 0 : blocks, kThreads, 0, nullptr, nullptr, 0};
  try {
    cudaLaunchKernelEx(&config, kKernels.at(arguments[1]), ones.data(), n, sums.data());
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  float sum = 0;
  for (float s : sums) sum += s;
  std::printf("%s, sum %g\n", cudaGetErrorString(cudaGetLastError()), sum);
}
