// A program with one mistake of each kind, named by its argument, and without: `none`.
#include <torch/csrc/stable/c/shim.h>

#include <climits>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

extern "C" AOTITorchError __wrap_torch_parallel_for(int64_t, int64_t, int64_t, ParallelFunc, void*);

int main(int, char** arguments) {
  const std::string mistake = arguments[1];
  const auto numbers = std::make_unique<int[]>(8);
  volatile int eight = 8, large = INT_MAX;
  if (mistake == "address") numbers[eight] = 1;
  if (mistake == "overflow") numbers[0] = large + 1;
  if (mistake == "index") std::vector<int>(3)[eight] = 1;
  if (mistake == "cast") numbers[0] = static_cast<int>(1e30 * large);
  const bool shared = mistake == "race";
  struct Work { int* numbers; bool shared; } work{numbers.get(), shared};
  __wrap_torch_parallel_for(0, 8, 1, [](int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<Work*>(context);
    for (int64_t i = begin; i < end; ++i) work.numbers[work.shared ? 0 : i] += 1;
  }, &work);
  std::puts("done");
}
