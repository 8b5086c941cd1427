// Counts what each launch does: barriers, warp exchanges, and bytes of global memory.
//
// Kernels compiled for ThreadSanitizer call a function of it at each load and store. A library of
// this file is loaded before them and has these functions instead. Tensors lie in an arena of its
// own, in place of torch's allocator: an access is of global memory if it falls in there.
//
// Memory moves in sectors of 32 bytes. A block moves a sector when it first touches it, and again if
// since then it has touched more than its multiprocessor's level-1 cache may hold for it. "Since
// then" goes by phases, from barrier to barrier, as within a phase the fibers run one after another.
// A phase in which a block reads a sector from beyond is one trip to memory that it waits for.
//
// SANM_CUDA_HOST_TALLY names the file that gets a line of JSON per launch.
#include <c10/core/Allocator.h>
#include <dlfcn.h>

#include <cstdio>

#include "schedule.h"

namespace cuda_host {
namespace {

constexpr size_t kArena = size_t{4} << 30, kSector = 32, kCached = 64 * 1024 / kSector;
constexpr int kRanks = 8;

template <typename T>
T* reserve(size_t count) {  // zeros, which take no memory before they are written to
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

unsigned char* const arena = reserve<unsigned char>(kArena);

// Gives each tensor memory of its own, never used again.
struct Arena : c10::Allocator {
  size_t used = 0;
  std::mutex mutex;
  c10::DataPtr allocate(size_t n) override {
    const std::lock_guard<std::mutex> lock(mutex);
    const size_t at = used;
    used += (n + 511) / 512 * 512;
    if (used > kArena) throw std::bad_alloc();
    return {arena + at, arena + at, [](void*) {}, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return [](void*) {}; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

const bool installed = [] {
  c10::SetAllocator(c10::DeviceType::CPU, new Arena, 100);
  return true;
}();

enum { kBarriers, kExchanges, kTrips, kWaits };
struct Count {  // of a launch
  uint64_t waits[kWaits] = {}, slowest[kWaits] = {};  // of all blocks, and the most that one has
  uint64_t memory[2] = {}, l2[2] = {}, asked[2] = {};  // bytes read and written
};
Count count;

// The blocks of the cluster that runs, by rank. Phases are counted on from block to block.
struct Present {
  uint32_t* seen[2] = {};  // sector → phase in which it was last read, or written
  uint32_t first = 1, phase = 0;
  std::vector<uint64_t> touched;  // phase − first → sectors up to its start
  uint64_t sectors = 0, waits[kWaits] = {};
  bool waited = false;

  void end() {
    for (int k = 0; k < kWaits; ++k) {
      count.waits[k] += waits[k];
      count.slowest[k] = std::max(count.slowest[k], waits[k]);
      waits[k] = 0;
    }
  }
  void next() {
    ++phase;
    touched.push_back(sectors);
    waited = false;
  }
};
Present present[kRanks];
Thread* const* thread = nullptr;  // the one that runs; null between launches
uint32_t launch = 1;
uint32_t* const launches[2] = {reserve<uint32_t>(kArena / kSector),  // sector → the last that read
                               reserve<uint32_t>(kArena / kSector)};  // it, or wrote it

void touch(const volatile void* p, size_t bytes, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(arena);
  if (at >= kArena || thread == nullptr || *thread == nullptr) return;
  Present& block = present[(*thread)->block->rank];
  count.asked[write] += bytes;
  for (size_t s = at / kSector; s <= (at + bytes - 1) / kSector; ++s) {
    uint32_t& seen = block.seen[write][s];
    if (seen == block.phase) continue;
    if (seen < block.first || block.sectors - block.touched[seen - block.first] > kCached) {
      count.l2[write] += kSector;
      count.memory[write] += launches[write][s] == launch ? 0 : kSector;
      launches[write][s] = launch;
      if (!write && !block.waited) ++block.waits[kTrips];
      block.waited = block.waited || !write;
    }
    seen = block.phase;
    ++block.sectors;
  }
}

// An atomic operation is a load and a store. On a __device__ variable, which lies in the library, it
// is a trip to memory; the emulation's own atomics are of objects that it has allocated.
void exchange(const volatile void* p, size_t bytes) {
  touch(p, bytes, false);
  touch(p, bytes, true);
  Dl_info library{};
  if (thread == nullptr || *thread == nullptr || !dladdr(const_cast<const void*>(p), &library)) return;
  Present& block = present[(*thread)->block->rank];
  block.waited = true;
  ++block.waits[kTrips];
}

}  // namespace

void tally_blocks(const Grid& grid, Thread* const* running) {
  thread = running;
  for (unsigned rank = 0; rank < grid.cluster; ++rank) {
    Present& block = present[rank];
    for (uint32_t*& seen : block.seen)
      if (seen == nullptr) seen = reserve<uint32_t>(kArena / kSector);
    block.end();
    block.first = block.phase + 1;
    block.touched.clear();
    block.next();
  }
}

void tally_meeting(const Meeting& meeting) {
  const Block& block = *(*thread)->block;
  const bool cluster = &meeting == &block.cluster->barrier;
  if (!cluster && &meeting != &block.barrier) {
    ++present[block.rank].waits[kExchanges];
    return;
  }
  for (const auto& member : block.cluster->blocks) {
    if (!cluster && member.get() != &block) continue;
    ++present[member->rank].waits[kBarriers];
    present[member->rank].next();
  }
}

void tally_launch(const Grid& grid) {
  for (Present& block : present) block.end();
  if (grid.cooperative)  // all blocks are of rank 0, at the same time, and alike
    for (int k = 0; k < kWaits; ++k) count.slowest[k] = count.waits[k] / grid.block_count();
  const char* const name = std::getenv("SANM_CUDA_HOST_TALLY");
  Dl_info library{};
  dladdr(grid.kernel, &library);
  if (std::FILE* file = name ? std::fopen(name, "a") : nullptr) {
    std::fprintf(file,
                 "{\"kernel\": %td, \"blocks\": %llu, \"threads\": %u, \"cluster\": %u, "
                 "\"shared\": %zu, \"barriers\": %llu, \"exchanges\": %llu, \"trips\": %llu, "
                 "\"slowest\": [%llu, %llu, %llu], "
                 "\"memory\": [%llu, %llu], \"l2\": [%llu, %llu], \"asked\": [%llu, %llu]}\n",
                 static_cast<const char*>(grid.kernel) -
                     static_cast<const char*>(library.dli_fbase),
                 (unsigned long long)grid.block_count(), grid.block_threads(), grid.cluster,
                 grid.shared, (unsigned long long)count.waits[kBarriers],
                 (unsigned long long)count.waits[kExchanges],
                 (unsigned long long)count.waits[kTrips],
                 (unsigned long long)count.slowest[kBarriers],
                 (unsigned long long)count.slowest[kExchanges],
                 (unsigned long long)count.slowest[kTrips], (unsigned long long)count.memory[0], (unsigned long long)count.memory[1],
                 (unsigned long long)count.l2[0], (unsigned long long)count.l2[1],
                 (unsigned long long)count.asked[0], (unsigned long long)count.asked[1]);
    std::fclose(file);
  }
  count = Count();
  thread = nullptr;
  ++launch;
}

}  // namespace cuda_host

// ---- What g++ calls.

#define HOOK extern "C" CUDA_HOST_TALLY

#define ACCESS(bytes)                                                                           \
  HOOK void __tsan_read##bytes(void* p) { cuda_host::touch(p, bytes, false); }                  \
  HOOK void __tsan_write##bytes(void* p) { cuda_host::touch(p, bytes, true); }                  \
  HOOK void __tsan_unaligned_read##bytes(void* p) { cuda_host::touch(p, bytes, false); }        \
  HOOK void __tsan_unaligned_write##bytes(void* p) { cuda_host::touch(p, bytes, true); }        \
  HOOK void __tsan_volatile_read##bytes(void* p) { cuda_host::touch(p, bytes, false); }         \
  HOOK void __tsan_volatile_write##bytes(void* p) { cuda_host::touch(p, bytes, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
HOOK void __tsan_read_range(void* p, size_t n) { cuda_host::touch(p, n, false); }
HOOK void __tsan_write_range(void* p, size_t n) { cuda_host::touch(p, n, true); }
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}

// Orders are the strongest.
#define FETCH(bits, T, name)                                                                    \
  HOOK T __tsan_atomic##bits##_fetch_##name(volatile T* p, T x, int) {                          \
    cuda_host::exchange(p, sizeof(T));                                                          \
    return __atomic_fetch_##name(p, x, __ATOMIC_SEQ_CST);                                       \
  }
#define EXCHANGE(bits, T, strength, weak)                                                       \
  HOOK bool __tsan_atomic##bits##_compare_exchange_##strength(volatile T* p, T* expected, T x,  \
                                                              int, int) {                       \
    cuda_host::exchange(p, sizeof(T));                                                          \
    return __atomic_compare_exchange_n(p, expected, x, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
#define ATOMIC(bits, T)                                                                         \
  HOOK T __tsan_atomic##bits##_load(const volatile T* p, int) {                                 \
    cuda_host::touch(p, sizeof(T), false);                                                      \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                \
  }                                                                                             \
  HOOK void __tsan_atomic##bits##_store(volatile T* p, T x, int) {                              \
    cuda_host::touch(p, sizeof(T), true);                                                       \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                             \
  HOOK T __tsan_atomic##bits##_exchange(volatile T* p, T x, int) {                              \
    cuda_host::touch(p, sizeof(T), true);                                                       \
    return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                         \
  }                                                                                             \
  FETCH(bits, T, add) FETCH(bits, T, sub) FETCH(bits, T, or) FETCH(bits, T, and)                \
  EXCHANGE(bits, T, strong, false) EXCHANGE(bits, T, weak, true)
ATOMIC(8, unsigned char)
ATOMIC(32, unsigned)
ATOMIC(64, unsigned long long)
