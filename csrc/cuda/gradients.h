// What gradients of rows and of images share: teams of threads, and how wide accesses and indices are.
#pragma once

#include "cuda/common.h"

namespace sanm {

constexpr int kThreads = 256;  // of a block
// Accesses in flight per source; fewer where each brings many elements, which cost registers.
template <int N>
constexpr int kUnroll = N > 4 ? 2 : 4;
constexpr int64_t kSamples = 65535;  // along y of a grid; more of them take turns
constexpr int64_t kLongRow = 1024;  // elements from which on a row is a block's work, not a warp's

// Threads that share a row.
template <bool kBlock>
struct RowTeam {
  SANM_DEVICE static int size() { return kBlock ? blockDim.x : kWarp; }
  SANM_DEVICE static int rank() { return kBlock ? threadIdx.x : lane(); }
  SANM_DEVICE static int64_t first() {
    return kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * warps() + warp();
  }
  SANM_DEVICE static int64_t step() {
    return kBlock ? gridDim.x : static_cast<int64_t>(gridDim.x) * warps();
  }
  template <typename X, typename Op>
  SANM_DEVICE static X reduce(X x, Op op, X identity) {
    if constexpr (kBlock)
      return block_reduce(x, op, identity, shared_memory<X>());
    else
      return warp_reduce(x, op);
  }
};

// Calls body(kBlock, grid, shared bytes) for rows of K elements, of which there are B.
template <typename Body>
void with_rows(int64_t B, int64_t K, const Body& body) {
  constexpr int64_t kShared = kWarp * sizeof(Peak<double>);
  if (K >= kLongRow)
    body(std::true_type(), blocks_for(B, 1), kShared);
  else
    body(std::false_type(), blocks_for(B, kThreads / kWarp), int64_t{0});
}

// Calls body(N, I()) for samples of E elements: indices I are 32 bits wide where these are enough.
template <typename T, typename Body>
void with_places(int64_t E, bool vectors, const Body& body) {
  if (E > INT32_MAX)
    body(std::integral_constant<int, 1>(), uint64_t{});
  else
    with_access<T>(vectors, [&](auto access) { body(access, uint32_t{}); });
}

}  // namespace sanm
