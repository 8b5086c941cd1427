// The pool's limit, for Python.
#include "cpu/memory.h"

extern "C" __attribute__((visibility("default"))) uint64_t sanm_cpu_cache_limit(uint64_t bytes) {
  return sanm::Pool::instance().limit(bytes);
}
