// Stands for CUDA where g++ compiles a .cu file: force-included (-include), on top of schedule.h.
//
// What is missing here is missing on purpose or has not been needed yet: __shared__ arrays (shared
// memory is dynamic), atomics on floating-point numbers, <<< >>>.
#pragma once

#define SANM_CUDA_HOST 1

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#include "schedule.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// ---- Vector types.

#define CUDA_HOST_VECTORS(T, name, bytes)                                      \
  struct alignas(2 * bytes) name##2 { T x, y; };                               \
  struct name##3 { T x, y, z; };                                               \
  struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(char, char, 1)
CUDA_HOST_VECTORS(unsigned char, uchar, 1)
CUDA_HOST_VECTORS(short, short, 2)
CUDA_HOST_VECTORS(unsigned short, ushort, 2)
CUDA_HOST_VECTORS(int, int, 4)
CUDA_HOST_VECTORS(unsigned, uint, 4)
CUDA_HOST_VECTORS(float, float, 4)
CUDA_HOST_VECTORS(long long, longlong, 8)
CUDA_HOST_VECTORS(unsigned long long, ulonglong, 8)
CUDA_HOST_VECTORS(double, double, 8)
#undef CUDA_HOST_VECTORS

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

constexpr int warpSize = 32;

namespace cuda_host {

inline unsigned char* shared_memory() { return current->block->shared.get(); }
inline Group& group() { return *current->block->cluster->group; }

// Ends the launch with this message.
inline void check(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

// The compute capability of the device (80 has no clusters), and the architecture that the code was
// compiled for; both times ten.
inline int capability() { return number("SANM_CUDA_HOST_CAPABILITY", 90); }
inline int code() { return number("SANM_CUDA_HOST_CODE", capability()); }
inline bool has_clusters() { return code() >= 90; }

inline uint64_t meet_block(const char* where, uint64_t contribution = 0) {
  return group().meet(current->block->barrier, group().grid.block_threads(), where, contribution);
}

// The lanes of `mask` meet; lanes that the block does not have do not count.
inline Exchange& exchange_of(unsigned& mask, const char* where) {
  const unsigned size = current->warp_size();
  if (size < 32) mask &= (1u << size) - 1;
  if ((mask >> (current->linear % 32) & 1) == 0)
    throw std::runtime_error(std::string(where) + " by a lane that its mask does not name");
  return current->block->warps[current->linear / 32].of(mask);
}

inline uint64_t meet_warp(unsigned mask, const char* where, uint64_t contribution = 0) {
  Exchange& exchange = exchange_of(mask, where);
  return group().meet(exchange, __builtin_popcount(mask), where, contribution);
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic<T>::value, "what CUDA's shuffles take");
  Exchange& exchange = exchange_of(mask, "a shuffle");
  if ((mask >> source & 1) == 0)
    throw std::runtime_error("a shuffle from a lane that its mask does not name");
  uint64_t* slot = exchange.slot[exchange.generation % 2];
  std::memcpy(&slot[current->linear % 32], &value, sizeof(T));
  group().meet(exchange, __builtin_popcount(mask), "a shuffle", 0);
  std::memcpy(&value, &slot[source], sizeof(T));
  return value;
}

// What the lanes of `mask` have, by op.
template <typename T, typename Op>
T reduce(unsigned mask, T value, Op op) {
  Exchange& exchange = exchange_of(mask, "a reduction");
  uint64_t* slot = exchange.slot[exchange.generation % 2];
  std::memcpy(&slot[current->linear % 32], &value, sizeof(T));
  group().meet(exchange, __builtin_popcount(mask), "a reduction", 0);
  for (unsigned lane = 0; lane < 32; ++lane) {
    T other;
    std::memcpy(&other, &slot[lane], sizeof(T));
    if (mask >> lane & 1) value = op(value, other);
  }
  return value;
}

}  // namespace cuda_host

#define SANM_DEVICE_CHECK(condition, message) cuda_host::check(condition, message)

// ---- Barriers, warps, clusters.

inline void __syncthreads() { cuda_host::meet_block("__syncthreads"); }
inline int __syncthreads_count(int p) {
  return cuda_host::meet_block("__syncthreads_count", p != 0);
}
inline int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
inline int __syncthreads_and(int p) { return __syncthreads_count(p == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { cuda_host::meet_warp(mask, "__syncwarp"); }
inline unsigned __ballot_sync(unsigned mask, int p) {
  const unsigned lane = cuda_host::current->linear % 32;
  return cuda_host::meet_warp(mask, "a vote", uint64_t{p != 0} << lane);
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  const int lane = cuda_host::current->linear % 32;
  return cuda_host::shuffle(mask, x, lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32) {
  const int lane = cuda_host::current->linear % 32, source = lane ^ lanes;
  return cuda_host::shuffle(mask, x, source / width > lane / width ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
  const int lane = cuda_host::current->linear % 32;
  return cuda_host::shuffle(mask, x, lane % width + by < width ? lane + by : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
  const int lane = cuda_host::current->linear % 32;
  return cuda_host::shuffle(mask, x, lane % width - by >= 0 ? lane - by : lane);
}

inline int __reduce_min_sync(unsigned mask, int x) {
  return cuda_host::reduce(mask, x, [](int a, int b) { return std::min(a, b); });
}
inline int __reduce_max_sync(unsigned mask, int x) {
  return cuda_host::reduce(mask, x, [](int a, int b) { return std::max(a, b); });
}

// In code for less than sm_90 they do what device.h does there, whatever the device.
inline unsigned __clusterRelativeBlockRank() {
  return cuda_host::has_clusters() ? cuda_host::current->block->rank : 0;
}
inline unsigned __clusterSizeInBlocks() {
  return cuda_host::has_clusters() ? cuda_host::group().grid.cluster : 1;
}
inline void __cluster_barrier_arrive() {}  // both halves at once, in the wait
inline void __cluster_barrier_wait() {
  if (!cuda_host::has_clusters()) return __syncthreads();
  const cuda_host::Grid& grid = cuda_host::group().grid;
  cuda_host::group().meet(cuda_host::current->block->cluster->barrier,
                          grid.cluster * grid.block_threads(), "the cluster's barrier", 0);
}
namespace cuda_host {
// All threads of a cooperative launch.
inline void meet_grid() {
  const Grid& grid = group().grid;
  check(grid.cooperative, "a grid meets that is not launched to");
  group().meet(group().barrier, grid.block_count() * grid.block_threads(), "the grid's barrier", 0);
}
}  // namespace cuda_host
inline void* __cluster_map_shared_rank(void* p, unsigned rank) {
  if (!cuda_host::has_clusters()) return p;
  cuda_host::Block& own = *cuda_host::current->block;
  cuda_host::check(rank < own.cluster->blocks.size(), "no such rank in the cluster");
  unsigned char* other = own.cluster->blocks[rank]->shared.get();
  cuda_host::check(other != nullptr, "shared memory of a block that has ended");
  return other + (static_cast<unsigned char*>(p) - own.shared.get());
}

// ---- Memory.

template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
void __stwb(T* p, T x) { *p = x; }
template <typename T>
void __stcs(T* p, T x) { *p = x; }
template <typename T>
void __stcg(T* p, T x) { *p = x; }
inline void __threadfence() {}  // atomics order here
inline void __threadfence_block() {}

#define CUDA_HOST_INTEGER std::enable_if_t<std::is_integral<T>::value, T>
template <typename T>
CUDA_HOST_INTEGER atomicAdd(T* p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL); }
template <typename T>
CUDA_HOST_INTEGER atomicOr(T* p, T x) { return __atomic_fetch_or(p, x, __ATOMIC_ACQ_REL); }
template <typename T>
CUDA_HOST_INTEGER atomicAnd(T* p, T x) { return __atomic_fetch_and(p, x, __ATOMIC_ACQ_REL); }
template <typename T>
CUDA_HOST_INTEGER atomicExch(T* p, T x) { return __atomic_exchange_n(p, x, __ATOMIC_ACQ_REL); }
template <typename T>
CUDA_HOST_INTEGER atomicCAS(T* p, T expected, T x) {
  __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
template <typename T>
CUDA_HOST_INTEGER atomicMax(T* p, T x) {
  T old = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (old < x &&
         !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return old;
}
template <typename T>
CUDA_HOST_INTEGER atomicMin(T* p, T x) {
  T old = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (x < old &&
         !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return old;
}
#undef CUDA_HOST_INTEGER

// ---- Arithmetic that CUDA has by these names.

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
template <typename To, typename From>
To cuda_host_bits(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From), "");
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline unsigned __float_as_uint(float a) { return cuda_host_bits<unsigned>(a); }
inline int __float_as_int(float a) { return cuda_host_bits<int>(a); }
inline float __uint_as_float(unsigned a) { return cuda_host_bits<float>(a); }
inline float __int_as_float(int a) { return cuda_host_bits<float>(a); }
inline long long __double_as_longlong(double a) { return cuda_host_bits<long long>(a); }
inline double __longlong_as_double(long long a) { return cuda_host_bits<double>(a); }
using std::max;
using std::min;

// ---- The runtime: one device, made up by the environment.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeCooperative,
};
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_host {
inline thread_local std::string failure;  // what the last launch failed of
inline std::mutex limits_mutex;
inline std::map<const void*, int> limits;  // of dynamic shared memory, where one was set

template <typename... P>
int& limit_of(void (*kernel)(P...)) {
  return limits.try_emplace(reinterpret_cast<const void*>(kernel), 48 * 1024).first->second;
}
}  // namespace cuda_host

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorLaunchFailure        ? cuda_host::failure.c_str()
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInvalidValue         ? "invalid argument"
                                                  : "no kernel image is available";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// SANM_CUDA_HOST_SHARED leaves a block less shared memory.
// SANM_CUDA_HOST_NUMBERS=device has kernels read run-time numbers from memory (common.h).
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int capability = cuda_host::capability();
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_host::number("SANM_CUDA_HOST_MULTIPROCESSORS", 4);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_host::number("SANM_CUDA_HOST_SHARED", (capability >= 90 ? 227 : 99) * 1024);
      break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
  }
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  *attributes = {cuda_host::code(), cuda_host::code()};
  return cuda_host::code() <= cuda_host::capability() ? cudaSuccess
                                                      : cudaErrorNoKernelImageForDevice;
}

// Stricter than CUDA: a limit that is lowered fails the launch of a thread that has just raised it.
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute which, int value) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const std::lock_guard<std::mutex> lock(cuda_host::limits_mutex);
  int& limit = cuda_host::limit_of(kernel);
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most || value < limit)
    return cudaErrorInvalidValue;
  limit = value;
  return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... a) {
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    const cudaLaunchAttribute& attribute = config->attrs[k];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative;
  }
  int limit = 0, major = 0, processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  {
    const std::lock_guard<std::mutex> lock(cuda_host::limits_mutex);
    limit = cuda_host::limit_of(kernel);
  }
  cuda_host::Grid grid;
  grid.blocks = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  grid.threads = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  grid.cluster = cluster;
  grid.cooperative = cooperative;
  grid.shared = config->dynamicSmemBytes;
  grid.kernel = reinterpret_cast<const void*>(kernel);
  if (grid.block_threads() == 0 || grid.block_threads() > 1024 || grid.block_count() == 0 ||
      config->dynamicSmemBytes > static_cast<size_t>(limit) || cluster == 0 || cluster > 8 ||
      config->gridDim.x % cluster != 0 || (cluster > 1 && major < 9))
    return cudaErrorInvalidConfiguration;
  if (cooperative && grid.block_count() > static_cast<uint64_t>(processors))
    return cudaErrorCooperativeLaunchTooLarge;
  const std::tuple<P...> parameters(std::forward<A>(a)...);
  grid.body = [&] { std::apply(kernel, parameters); };
  try {
    cuda_host::run(grid);
  } catch (const std::exception& error) {
    cuda_host::failure = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// ---- Where a thread is. Last: cudaLaunchConfig_t has members of these names.

#define threadIdx (cuda_host::current->index)
#define blockIdx (cuda_host::current->block->index)
#define blockDim (cuda_host::group().grid.threads)
#define gridDim (cuda_host::group().grid.blocks)
