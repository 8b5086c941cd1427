// What every CUDA kernel file needs: stable.h, device.h, allocation, launches.
//
// The files are compiled with -fmad=false: device formulas round exactly as csrc/math does on the
// host, and fused multiply-adds are explicit. They include nothing of CUDA or torch except this.
#pragma once

#ifndef SANM_CUDA_HOST  // else tests/cuda_host/cuda_host.h replaces CUDA and is included first
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <utility>

#include "arguments.h"
#include "cuda/device.h"

// Registers a file's kernels: SANM_CUDA_KERNELS(m) { m.impl("op.cuda", TORCH_BOX(&op)); }
#ifdef SANM_CUDA_HOST
#define SANM_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CPU, m)
#else
#define SANM_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(sanm_kernels, CUDA, m)
#endif

namespace sanm {

// An uninitialised tensor on the device of `on`.
inline Tensor new_tensor(const Tensor& on, const std::vector<int64_t>& size, ScalarType type,
                         bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  return with_memory(size.data(), static_cast<int64_t>(size.size()), type, [&] {
    return torch::stable::empty(
        size, type, std::nullopt, on.device(), std::nullopt,
        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  });
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would report again
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// ---- The device of a tensor.

inline int attribute(const Tensor& on, cudaDeviceAttr which) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, std::max(0, on.get_device_index())),
             "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors(const Tensor& on) {
  return attribute(on, cudaDevAttrMultiProcessorCount);
}
// Maximum dynamic shared memory per block, in bytes.
inline int64_t shared_limit(const Tensor& on) {
  return attribute(on, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Makes the device of `on` current for its lifetime; stream() is torch's current stream there.
class OnDevice {
 public:
#ifdef SANM_CUDA_HOST
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  bool captured() const { return false; }
#else
  explicit OnDevice(const Tensor& on) : index_(on.get_device_index()), guard_(index_) {}

  // Looked up at first use: linking against a CPU-only torch must not need libtorch_cuda.
  cudaStream_t stream() const {
    using Function = int32_t (*)(int32_t, void**);
    static const Function function = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Function>(
          dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    }();
    void* stream = nullptr;
    if (function == nullptr || function(index_, &stream) != 0)
      throw std::runtime_error("torch gives no current CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }
  // Whether the stream is being captured into a CUDA graph.
  bool captured() const {
    cudaStreamCaptureStatus status{};
    check_cuda(cudaStreamIsCapturing(stream(), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// ---- Run-time numbers, such as λ. On the CPU they are read here and passed as kernel arguments;
// on the device the kernel reads them, so that a replayed graph uses their current values.

inline bool on_host(const Tensor& x) {
#ifdef SANM_CUDA_HOST
  return !cuda_host::option("SANM_CUDA_HOST_NUMBERS", "device");
#else
  return x.get_device_index() < 0;
#endif
}

template <int N>
struct Numbers {
  // (N,) double, dense
  explicit Numbers(const Tensor& x) {
    const double* const data = in<double>(x);
    if (on_host(x))
      std::copy_n(data, N, value);
    else
      device = data;
  }
  SANM_DEVICE double operator[](int i) const { return device ? device[i] : value[i]; }

  double value[N] = {};
  const double* device = nullptr;
};

// λ, the first of some run-time numbers, and 1 − λ, each rounded once.
template <typename A>
struct Share {
  template <int N>
  explicit Share(const Numbers<N>& from)
      : own(static_cast<A>(from.value[0])), partner(static_cast<A>(1 - from.value[0])),
        device(from.device) {}
  // The same with the values at the time the kernel runs.
  SANM_DEVICE Share read() const {
    Share now = *this;
    if (device) now.own = static_cast<A>(*device), now.partner = static_cast<A>(1 - *device);
    return now;
  }

  A own, partner;
  const double* device;
};

// ---- Launches.

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Blocks for n items, `per_block` each, for a grid-stride kernel.
inline int64_t blocks_for(int64_t n, int64_t per_block) {
  return std::min<int64_t>(ceil_div(n, per_block), 0x7FFFFFFF);
}

// Queries, once per kernel and device, the architecture that the kernel's code there was compiled
// for (__CUDA_ARCH__ / 10), and raises the kernel's limit of dynamic shared memory to the device's
// maximum: all host threads share the limit, so it cannot be set for each launch. The device is
// current.
template <typename... Parameters>
int architecture(const Tensor& on, void (*kernel)(Parameters...)) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{reinterpret_cast<const void*>(kernel), on.get_device_index()}];
  if (found == 0) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_limit(on))),
               "cudaFuncSetAttribute");
    found = attributes.ptxVersion;  // set for machine code too
  }
  return found;
}

// The portable cluster size, or 1 if the kernel's code has no clusters: that depends on its
// architecture, which may be earlier than the device's (see device.h).
template <typename... Parameters>
int cluster_limit(const Tensor& on, void (*kernel)(Parameters...)) {
  const OnDevice device(on);
  return architecture(on, kernel) >= 90 ? 8 : 1;
}

struct Grid {
  int64_t x, y = 1, z = 1;
};

struct Launch {
  const char* name;  // for error messages
  const Tensor& on;  // determines device and stream
  Grid grid;         // an empty one launches nothing
  int64_t threads;   // per block
  int64_t shared = 0;   // bytes of dynamic shared memory, up to shared_limit(on)
  int64_t cluster = 1;  // blocks per cluster along x, up to cluster_limit(); divides grid.x
  bool cooperative = false;  // all blocks are co-resident: at most multiprocessors(on)
};

// launch({"name", out, {blocks}, kThreads, bytes}, kernel<T>, arguments...)
template <typename... Parameters, typename... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return;
  if (l.grid.x > 0x7FFFFFFF || l.grid.y > 65535 || l.grid.z > 65535)
    throw std::runtime_error(std::string("CUDA: ") + l.name + ": the grid is too large");
  const OnDevice device(l.on);
  if (l.shared > 48 * 1024) architecture(l.on, kernel);  // raises the limit
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (l.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[count++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(l.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (l.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[count++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  const dim3 blocks(static_cast<unsigned>(l.grid.x), static_cast<unsigned>(l.grid.y),
                    static_cast<unsigned>(l.grid.z));
  const cudaLaunchConfig_t config{
      blocks,          dim3(static_cast<unsigned>(l.threads)), static_cast<size_t>(l.shared),
      device.stream(), attributes,                             count};
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), l.name);
}

// Whether p and all multiples of `bytes` from it are aligned to 16 bytes.
inline bool aligned16(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && bytes % 16 == 0;
}

// Whether rows of x (…, K) can be read by vector loads: contiguous, aligned to 16 bytes.
inline bool vector_rows(const Tensor& x) {
  bool vectors = x.stride(x.dim() - 1) == 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d)
    vectors = vectors && aligned16(x.const_data_ptr(), x.stride(d) * x.element_size());
  return vectors;
}

// device_dispatch_stored(), on the host.
template <typename Body>
void dispatch_stored(ScalarType type, const Body& body) {
  dispatch(type, [&](auto zero) {
    if constexpr (sizeof(zero) == sizeof(Bits16))
      body(Bits16{});
    else
      body(zero);
  });
}

// Division by a d ≥ 1 known on the host, by multiplication. In b bits, with 2^(l−1) < d ≤ 2^l and
// m = ⌊2^(b−1+l)/d⌋ + 1, ⌊n/d⌋ is n·m >> (b − 1 + l) for 0 ≤ n < 2^(b−1): m·d exceeds 2^(b−1+l) by
// 2^l at most. The upper half of 2n·m suffices.
template <typename I>
class Divisor {
  using U = std::make_unsigned_t<I>;

 public:
  Divisor() : Divisor(1) {}
  explicit Divisor(int64_t d) : d_(static_cast<I>(d)) {
    while ((uint64_t{1} << shift_) < static_cast<uint64_t>(d)) ++shift_;
    multiplier_ = static_cast<U>((static_cast<unsigned __int128>(1) << (kBits - 1 + shift_)) / d + 1);
  }
  // The quotient; n becomes the remainder.
  SANM_DEVICE I split(I& n) const {
    const U twice = static_cast<U>(n) << 1;
    U upper;
    if constexpr (kBits == 32)
      upper = static_cast<U>(static_cast<uint64_t>(twice) * multiplier_ >> 32);
    else
      upper = __umul64hi(twice, multiplier_);
    const I quotient = static_cast<I>(upper >> shift_);
    n -= quotient * d_;
    return quotient;
  }

 private:
  static constexpr int kBits = 8 * sizeof(I);
  I d_;
  U multiplier_ = 0;
  int shift_ = 0;
};

// Calls body(N), N the elements per access, as a compile-time constant.
template <typename T, typename Body>
void with_access(bool vectors, const Body& body) {
  if (vectors)
    body(std::integral_constant<int, kVector<T>>());
  else
    body(std::integral_constant<int, 1>());
}

}  // namespace sanm
