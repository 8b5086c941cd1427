// torch_parallel_for on threads of its own, for a library linked with --wrap=torch_parallel_for.
//
// torch's own runs the ranges on OpenMP's threads, whose barriers ThreadSanitizer does not see: it
// would report every result as a race. What it is asked here is whether the ranges of one loop
// touch each other's memory, for which any threads will do.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

// Smaller loops are split as well, or else few of a test's would be.
constexpr int64_t kThreads = 3;

extern "C" AOTITorchError __wrap_torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                                    ParallelFunc function, void* context) {
  const int64_t step = std::max<int64_t>(1, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step)
    threads.emplace_back(function, first, std::min(end, first + step), context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
