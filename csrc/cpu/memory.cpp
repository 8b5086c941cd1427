// The pool's limit and current size in bytes, for Python.
#include "cpu/memory.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Returns the previous limit.
EXPORTED uint64_t sanm_cpu_cache_limit(uint64_t bytes) {
  return sanm::Pool::instance().limit(bytes);
}

EXPORTED uint64_t sanm_cpu_cache_kept() { return sanm::Pool::instance().kept(); }
