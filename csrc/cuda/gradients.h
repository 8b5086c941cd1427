// What gradients of rows and of images share: thread teams, widths of accesses and indices.
#pragma once

#include "cuda/common.h"

namespace sanm {

constexpr int kThreads = 256;  // per block
// Accesses in flight per source; fewer for wide ones, which need many registers.
template <int N>
constexpr int kUnroll = N > 4 ? 2 : 4;
constexpr int64_t kSamples = 65535;  // the largest gridDim.y; a loop covers more samples
constexpr int64_t kLongRow = 1024;  // elements from which a row is processed by a block, not a warp

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

// Calls body(kBlock, blocks, shared bytes) for B rows of K elements.
template <typename Body>
void with_rows(int64_t B, int64_t K, const Body& body) {
  constexpr int64_t kShared = kWarp * sizeof(Peak<double>);
  if (K >= kLongRow)
    body(std::true_type(), blocks_for(B, 1), kShared);
  else
    body(std::false_type(), blocks_for(B, kThreads / kWarp), int64_t{0});
}

// Calls body(N, I()) for samples of E elements, I the index type: 32 bits if these suffice.
template <typename T, typename Body>
void with_places(int64_t E, bool vectors, const Body& body) {
  if (E > INT32_MAX)
    body(std::integral_constant<int, 1>(), uint64_t{});
  else
    with_access<T>(vectors, [&](auto access) { body(access, uint32_t{}); });
}

}  // namespace sanm
