// Stands for torch's CUDA library, which is loaded as that one is: where the operators have to look for it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" __attribute__((visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
