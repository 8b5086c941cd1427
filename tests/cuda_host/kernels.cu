// Small kernels with mistakes put in on purpose, to show what the host harness sees of them.
// Usage: kernels CASE; prints "right" or "wrong", or what the launch failed of.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/device.h"

using namespace sanm;

constexpr int kThreads = 96, kBlocks = 4, kCluster = 2;

enum Case {
  kCorrect, kNoBarrier, kNoClusterBarrier, kNoGridBarrier, kOffByOne, kDeadlock, kForeignLane
};

// out[i] = 1000·(i mirrored in the other block of its cluster) + the sum over its own block + i
// mirrored in the grid. A cooperative launch.
__global__ void mirror_kernel(int* out, int* all, Case c) {
  int* values = shared_memory<int>();
  int* scratch = values + kThreads;
  const int t = threadIdx.x, i = static_cast<int>(global_thread());
  all[i] = i;
  if (c != kNoGridBarrier) cuda_host::meet_grid();
  const int mirrored = all[kBlocks * kThreads - 1 - i];
  values[c == kOffByOne ? t + 1 + kWarp : t] = i;
  if (c != kNoBarrier) __syncthreads();
  const int mine = values[kThreads - 1 - t];
  if (c == kDeadlock && t == 7) return;
  if (c == kForeignLane && t < 5) __syncwarp(~1u);
  const int sum = block_reduce(mine, Sum(), 0, scratch);
  if (c != kNoClusterBarrier) cluster_sync();
  const int other = cluster_load(values + kThreads - 1 - t, cluster_size() - 1 - cluster_rank());
  out[i] = 1000 * other + sum + mirrored;
  cluster_sync();
}

int main(int count, char** arguments) {
  const char* names[] = {"correct",    "no_barrier", "no_cluster_barrier", "no_grid_barrier",
                         "off_by_one", "deadlock",   "foreign_lane"};
  int c = 0;
  while (count > 1 && std::strcmp(names[c], arguments[1]) != 0) ++c;
  std::vector<int> out(kBlocks * kThreads), all(kBlocks * kThreads);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  const cudaLaunchConfig_t config{dim3(kBlocks), dim3(kThreads), (kThreads + kWarp) * sizeof(int),
                                  nullptr,       attributes,     2};
  const cudaError_t error =
      cudaLaunchKernelEx(&config, mirror_kernel, out.data(), all.data(), static_cast<Case>(c));
  if (error != cudaSuccess) return std::printf("%s\n", cudaGetErrorString(error)), 1;
  bool right = true;
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    const int block = i / kThreads, t = i % kThreads, other = block ^ 1;
    const int sum = kThreads * block * kThreads + kThreads * (kThreads - 1) / 2;
    const int mirrored = kBlocks * kThreads - 1 - i;
    right = right && out[i] == 1000 * (other * kThreads + kThreads - 1 - t) + sum + mirrored;
  }
  std::printf(right ? "right\n" : "wrong\n");
}
