// Host side of the CUDA kernels: errors, the current stream, properties of the device.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>

namespace skd {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// PyTorch's current stream on `device`. The function is looked up at run time instead of linked, so that the
// extension also loads under a PyTorch built without CUDA. Python loads libtorch_cuda with local symbols, so that a
// search of the global symbols may miss it.
inline cudaStream_t current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr) {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      if (library != nullptr) symbol = dlsym(library, name);
    }
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function != nullptr, "aoti_torch_get_current_cuda_stream not found: this PyTorch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "cannot get the current CUDA stream of device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of `tensor` current, for PyTorch's copy of the CUDA runtime and for this library's own.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_), stream_(current_stream(device_)) {
    check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  cudaStream_t stream() const { return stream_; }

  // The number of blocks of `kernel` that run at the same time. The driver is asked once per kernel and device;
  // threads that ask at the same time get the same answer.
  template <auto kernel>
  int64_t capacity(int threads) const {
    constexpr int kDevices = 64;  // the answer for devices beyond these is not kept
    static std::atomic<int64_t> known[kDevices];
    const bool remembered = device_ >= 0 && device_ < kDevices;
    if (const int64_t blocks = remembered ? known[device_].load(std::memory_order_relaxed) : 0; blocks > 0)
      return blocks;
    int multiprocessors = 0, blocks = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_), "multiprocessors");
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "occupancy");
    STD_TORCH_CHECK(blocks > 0, "the kernel does not fit on device ", device_);
    if (remembered) known[device_].store(int64_t(multiprocessors) * blocks, std::memory_order_relaxed);
    return int64_t(multiprocessors) * blocks;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Whether every row of `tensor`, whose last dimension has unit stride, may be read 16 bytes at a time.
inline bool is_aligned(const torch::stable::Tensor& tensor) {
  const int64_t vector = 16 / static_cast<int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) aligned = aligned && tensor.stride(d) % vector == 0;
  return aligned && tensor.size(tensor.dim() - 1) % vector == 0;
}

}  // namespace skd
