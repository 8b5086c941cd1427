// What sanm_kernels/backends/cuda.py asks the library before it calls a kernel: plain C functions,
// which work with any driver or none.
//
// The library contains the CUDA runtime it was built with, which may need a newer driver than
// torch's, and code for other architectures: what runs on a GPU is decided by the runtime.
#ifndef SANM_CUDA_HOST  // the emulation has no driver
#include <cuda_runtime.h>

#include <string>

namespace sanm {

__global__ void probe_kernel() {}

// "12.4" for 12040
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int version_of(cudaError_t (*ask)(int*)) {
  int version = 0;
  return ask(&version) == cudaSuccess ? version : 0;
}

std::string architectures() {
  std::string text;
  for (int arch : {__CUDA_ARCH_LIST__})  // 800, 900, …: defined by nvcc, from -gencode
    text += (text.empty() ? "" : ", ") + std::to_string(arch / 100) + "." +
            std::to_string(arch / 10 % 10);
  return text;
}

// Why the kernels do not run on GPU `device`; empty if they do. Leaves the device current.
std::string why_not(int device) {
  const int driver = version_of(cudaDriverGetVersion);
  if (driver == 0) return "there is no NVIDIA driver";
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  const std::string runtime = version_text(version_of(cudaRuntimeGetVersion));
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver serves CUDA up to " + version_text(driver) +
           ", and the library was built with CUDA " + runtime +
           ": it needs a newer driver, or a build with an older nvcc";
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "it holds code for compute capability " + architectures() + " (CUDA " + runtime +
         "), GPU " + std::to_string(device) + " has " + std::to_string(major) + "." +
         std::to_string(minor) + " (driver for CUDA " + version_text(driver) +
         "): " + cudaGetErrorString(error);
}

}  // namespace sanm

#define SANM_EXPORT extern "C" __attribute__((visibility("default")))

SANM_EXPORT int sanm_cuda_runtime_version() { return sanm::version_of(cudaRuntimeGetVersion); }
SANM_EXPORT int sanm_cuda_driver_version() { return sanm::version_of(cudaDriverGetVersion); }

// Strings are valid until the thread's next call.
SANM_EXPORT const char* sanm_cuda_architectures() {
  thread_local std::string text;
  return (text = sanm::architectures()).c_str();
}
SANM_EXPORT const char* sanm_cuda_probe(int device) {
  thread_local std::string text;
  text = sanm::why_not(device);
  cudaGetLastError();  // clears the error, which the next call would report again
  return text.empty() ? nullptr : text.c_str();
}
#endif
