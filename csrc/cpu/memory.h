// A memory pool for large results.
//
// For every large tensor the allocator maps fresh memory, and the operating system zeroes each page
// at the first write to it: for two views of 64 images of 224×224 that takes several times as long
// as computing them. A block of kPooledBytes or more is therefore kept when its tensor is freed,
// and reused for the next result that it fits. The pool is bounded; the oldest blocks are freed
// first.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "stable.h"

// torch ≥ 2.11 has it; with 2.10 the address is null, and nothing is pooled.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* metadata, int64_t metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace sanm {

constexpr size_t kPooledBytes = 1 << 20;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kKeptBytes = 0;  // reused memory would hide errors from the sanitizer
#else
constexpr size_t kKeptBytes = size_t{512} << 20;
#endif

// Free blocks. take() and give() never wait for the lock, since a child forked while another thread
// held it would wait for ever: if it is taken, they use the allocator.
class Pool {
 public:
  // One per library, never destroyed: tensors may outlive static objects.
  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  // A block of at least `bytes`, a multiple of kPage; sets `bytes` to its size. Null if out of
  // memory.
  void* take(size_t& bytes) {
    if (std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block)
        if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
            (best == free_.end() || block->bytes < best->bytes))
          best = block;
      if (best != free_.end()) {
        void* const data = best->data;
        bytes = best->bytes;
        kept_ -= bytes;
        free_.erase(best);
        return data;
      }
    }
    return std::aligned_alloc(kPage, bytes);
  }

  void give(void* data, size_t bytes) {
    std::vector<Block> dropped;
    if (std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      free_.push_back({data, bytes});
      kept_ += bytes;
      dropped = excess();
    } else {
      dropped.push_back({data, bytes});
    }
    release(dropped);
  }

  // Sets the limit of pooled bytes; returns the previous one.
  size_t limit(size_t bytes) {
    std::unique_lock lock(mutex_);
    const size_t before = limit_.exchange(bytes);
    release(excess());
    return before;
  }

  size_t kept() {
    std::unique_lock lock(mutex_);
    return kept_;
  }

  bool keeps(size_t bytes) const { return bytes >= kPooledBytes && bytes <= limit_; }

  static constexpr size_t kPage = 4096;

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  // Removes the oldest blocks beyond the limit from the pool, and returns them.
  std::vector<Block> excess() {
    auto end = free_.begin();
    for (; end != free_.end() && kept_ > limit_; ++end) kept_ -= end->bytes;
    std::vector<Block> result(free_.begin(), end);
    free_.erase(free_.begin(), end);
    return result;
  }

  static void release(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) std::free(block.data);
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // the oldest first
  size_t kept_ = 0;
  std::atomic<size_t> limit_{kKeptBytes};
};

// An uninitialised dense tensor, in pooled memory if it is large enough. Not by
// torch::stable::empty, whose dispatch takes longer than a small kernel.
inline Tensor dense_tensor(const int64_t* size, int64_t dim, ScalarType type_,
                           bool channels_last) {
  using torch::stable::detail::from, torch::stable::detail::to;
  size_t bytes = dense_bytes(size, dim, type_).value();
  bytes = (bytes + Pool::kPage - 1) / Pool::kPage * Pool::kPage;
  std::vector<int64_t> stride(dim, 1);
  for (int64_t d = dim - 1; d > 0; --d)
    stride[d - 1] = stride[d] * std::max<int64_t>(size[d], 1);
  if (channels_last) stride = {stride[0], 1, size[3] * size[1], size[1]};
  const int32_t type = to<int32_t>(from(type_)), cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  Pool& pool = Pool::instance();
  void* const data = torch_from_blob && pool.keeps(bytes) ? pool.take(bytes) : nullptr;
  if (!data) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, size, stride.data(), type, cpu, 0, &handle));
    return Tensor(handle);
  }
  const AOTITorchError error = torch_from_blob(
      data, dim, size, stride.data(), 0, type, cpu, -1, &handle, aoti_torch_layout_strided(),
      nullptr, 0,
      [](void* block, void* context) {
        Pool::instance().give(block, reinterpret_cast<size_t>(context));
      },
      reinterpret_cast<void*>(bytes));
  if (error) pool.give(data, bytes);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

inline Tensor new_tensor(const int64_t* size, int64_t dim, ScalarType type, bool channels_last) {
  return with_memory(size, dim, type, [&] { return dense_tensor(size, dim, type, channels_last); });
}

inline Tensor new_tensor(std::initializer_list<int64_t> size, ScalarType type) {
  return new_tensor(size.begin(), static_cast<int64_t>(size.size()), type, false);
}

// Contiguous, or channels_last: a memory format that kernels read without a copy.
inline Tensor new_image(const std::vector<int64_t>& size, ScalarType type, bool channels_last) {
  return new_tensor(size.data(), static_cast<int64_t>(size.size()), type, channels_last);
}

}  // namespace sanm
