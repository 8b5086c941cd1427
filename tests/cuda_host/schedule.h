// Runs the threads of a CUDA grid on the host: as fibers of one thread, or as real threads.
//
// SANM_CUDA_HOST_SCHEDULER=fibers (default): one cluster at a time, or all of a cooperative
//   launch; a fiber runs until it has to wait, so that results are repeatable. With
//   SANM_CUDA_HOST_ORDER=forward|reverse it is always the first, or last, that can run: it gets as
//   far ahead of the others as the barriers let it, and where one is missing, one of the orders
//   reads what is not there yet.
// SANM_CUDA_HOST_SCHEDULER=threads: for ThreadSanitizer. Only threads that really meet at a barrier
//   or in a warp are ordered; several blocks run at a time.
//
// A block's shared memory is a heap buffer filled with 0xFF (NaN), freed as soon as the block has
// ended. Under AddressSanitizer it is of exactly the size asked for; otherwise kGuard bytes follow
// that must be as they were in the end. Threads that wait for one that never comes are reported.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

inline bool option(const char* name, const char* value) {
  const char* given = std::getenv(name);
  return given != nullptr && std::strcmp(given, value) == 0;
}
inline int number(const char* name, int otherwise) {
  const char* given = std::getenv(name);
  return given == nullptr ? otherwise : std::atoi(given);
}

// A place where `expected` threads meet; each generation of them is one meeting.
struct Meeting {
  std::mutex mutex;
  std::condition_variable wake;
  unsigned arrived = 0;
  uint64_t generation = 0, sum = 0, result = 0;
  size_t first = SIZE_MAX, last = 0;  // of the fibers that have arrived
};

// Threads of a warp that exchange values: two sets of slots, used in turn.
struct Exchange : Meeting {
  uint64_t slot[2][32] = {};
};

struct Warp {
  std::mutex mutex;
  std::map<unsigned, Exchange> exchanges;  // by mask
  Exchange& of(unsigned mask) {
    const std::lock_guard<std::mutex> lock(mutex);
    return exchanges[mask];
  }
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  Index index;
  unsigned rank = 0;  // in the cluster
  std::unique_ptr<unsigned char[]> shared;
  Meeting barrier;
  std::vector<Warp> warps;
  std::atomic<unsigned> alive{0};
};

struct Thread {
  Block* block = nullptr;
  Index index;
  unsigned linear = 0;    // in the block
  size_t position = 0;    // in the group
  Meeting* waits = nullptr;  // a fiber that waits does so for the end of generation `since`
  uint64_t since = 0;
  std::atomic<const char*> where{""};
  std::atomic<bool> ended{false};
  ucontext_t context;
  void* fake_stack = nullptr;  // AddressSanitizer's
  unsigned warp_size() const;
};

struct Grid {
  Index blocks, threads;  // numbers of them
  unsigned cluster = 1;
  bool cooperative = false;  // all clusters at the same time
  size_t shared = 0;
  const void* kernel = nullptr;
  std::function<void()> body;
  unsigned block_threads() const { return threads.x * threads.y * threads.z; }
  uint64_t block_count() const { return uint64_t{blocks.x} * blocks.y * blocks.z; }
};

struct Group;  // what runs at a time

struct Cluster {
  Group* group = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting barrier;
};

// A real thread that is kept for the next launch. Each has a mutex of its own: workers are ordered
// after who starts them and before who waits for them, and not against each other.
class Worker {
 public:
  Worker() : thread_([this] { loop(); }) { thread_.detach(); }  // lives as long as the process

  void start(std::function<void()> job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = std::move(job);
    busy_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (busy_) changed_.wait(lock);
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      while (!busy_) changed_.wait(lock);
      lock.unlock();
      job_();
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> job_;
  bool busy_ = false;
  std::thread thread_;
};

// Thrown in every other thread once one has failed.
struct Abandoned {};

inline thread_local Thread* current = nullptr;

// Where tally.cpp is loaded it is told what happens; elsewhere these are null.
#define CUDA_HOST_TALLY __attribute__((weak, visibility("default")))
CUDA_HOST_TALLY void tally_blocks(const Grid&, Thread* const*);  // those of a cluster begin
CUDA_HOST_TALLY void tally_meeting(const Meeting&);              // its threads have met
CUDA_HOST_TALLY void tally_launch(const Grid&);                  // all blocks have ended

struct Group {
  const Grid& grid;
  bool fibers;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Thread>> threads;
  Meeting barrier;  // of a cooperative launch
  std::atomic<bool> failed{false};
  std::mutex message_mutex;
  std::string message;
  // Threads that wait or have ended; those that have ended, times 2³². Relaxed: orders nothing.
  std::atomic<uint64_t> idle{0};

#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 256;
#endif

  Group(const Grid& grid_, bool fibers_) : grid(grid_), fibers(fibers_) {}

  void add_cluster(uint64_t number) {
    clusters.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters.back();
    cluster.group = this;
    for (unsigned rank = 0; rank < grid.cluster; ++rank) {
      cluster.blocks.push_back(std::make_unique<Block>());
      Block& block = *cluster.blocks.back();
      const uint64_t b = number * grid.cluster + rank;
      block.cluster = &cluster;
      block.rank = rank;
      block.index = {static_cast<unsigned>(b % grid.blocks.x),
                     static_cast<unsigned>(b / grid.blocks.x % grid.blocks.y),
                     static_cast<unsigned>(b / grid.blocks.x / grid.blocks.y)};
      block.shared.reset(new unsigned char[grid.shared + kGuard]);
      std::memset(block.shared.get(), 0xFF, grid.shared + kGuard);
      block.warps = std::vector<Warp>((grid.block_threads() + 31) / 32);
      block.alive = grid.block_threads();
      for (unsigned t = 0; t < grid.block_threads(); ++t) {
        threads.push_back(std::make_unique<Thread>());
        Thread& thread = *threads.back();
        thread.block = &block;
        thread.linear = t;
        thread.position = threads.size() - 1;
        thread.index = {t % grid.threads.x, t / grid.threads.x % grid.threads.y,
                        t / grid.threads.x / grid.threads.y};
      }
    }
  }

  // The first failure counts; the launch reports it.
  void fail(const std::string& what) {
    {
      const std::lock_guard<std::mutex> lock(message_mutex);
      if (message.empty()) message = what;
    }
    failed = true;
    if (fibers) return;
    wake(barrier);
    for (auto& cluster : clusters) {
      wake(cluster->barrier);
      for (auto& block : cluster->blocks) {
        wake(block->barrier);
        for (Warp& warp : block->warps) {
          const std::lock_guard<std::mutex> lock(warp.mutex);
          for (auto& exchange : warp.exchanges) wake(exchange.second);
        }
      }
    }
  }
  static void wake(Meeting& meeting) {
    const std::lock_guard<std::mutex> lock(meeting.mutex);
    meeting.wake.notify_all();
  }

  void deadlock() {
    std::string what = "deadlock:";
    std::map<std::string, int> waiting;
    for (auto& thread : threads) {
      const Index& b = thread->block->index;
      const std::string block = "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) +
                                ", " + std::to_string(b.z) + "): ";
      const std::string where = std::string("waiting in ") + thread->where.load();
      ++waiting[block + (thread->ended ? "ended" : where)];
    }
    for (const auto& entry : waiting)
      what += "\n  " + entry.first + ": " + std::to_string(entry.second) + " threads";
    fail(what);
  }

  void thread_main(Thread& thread) {
    current = &thread;
    try {
      if (!failed) grid.body();
    } catch (const Abandoned&) {
    } catch (const std::exception& error) {
      fail(error.what());
    }
    thread.ended = true;
    if (--thread.block->alive == 0) {
      const unsigned char* end = thread.block->shared.get() + grid.shared;
      if (std::any_of(end, end + kGuard, [](unsigned char x) { return x != 0xFF; }))
        fail("a write past the end of shared memory");
      thread.block->shared.reset();
    }
    const uint64_t one = (uint64_t{1} << 32) + 1;
    const uint64_t now = idle.fetch_add(one, std::memory_order_relaxed) + one;
    if (!fibers && static_cast<uint32_t>(now) == threads.size() && now >> 32 != threads.size() &&
        !failed)
      deadlock();
  }

  // Meets `expected` threads; returns the sum of their contributions.
  uint64_t meet(Meeting& m, unsigned expected, const char* where, uint64_t contribution) {
    Thread& self = *current;
    std::unique_lock<std::mutex> lock(m.mutex);
    m.sum += contribution;
    m.first = std::min(m.first, self.position);
    m.last = std::max(m.last, self.position);
    if (++m.arrived == expected) {
      if (tally_meeting) tally_meeting(m);
      m.result = m.sum;
      m.sum = 0;
      m.arrived = 0;
      ++m.generation;
      if (fibers) next = reverse ? std::max(next, m.last) : std::min(next, m.first);
      m.first = SIZE_MAX;
      m.last = 0;
      idle.fetch_sub(expected - 1, std::memory_order_relaxed);
      if (!fibers) m.wake.notify_all();
      return m.result;
    }
    self.where = where;
    self.since = m.generation;
    const uint64_t now = idle.fetch_add(1, std::memory_order_relaxed) + 1;
    if (fibers) {
      lock.unlock();
      self.waits = &m;
      next_fiber();
      self.waits = nullptr;
    } else {
      if (static_cast<uint32_t>(now) == threads.size()) {
        lock.unlock();
        deadlock();
        lock.lock();
      }
      while (m.generation == self.since && !failed) m.wake.wait(lock);
    }
    if (m.generation == self.since) throw Abandoned();
    return m.result;
  }

  // ---- Real threads.

  void run_threads() {
    static std::mutex one_launch;
    static std::vector<Worker*> workers;  // never deleted: they run until the process ends
    const std::lock_guard<std::mutex> lock(one_launch);
    while (workers.size() < threads.size()) workers.push_back(new Worker);
    for (auto& thread : threads)
      workers[thread->position]->start([this, t = thread.get()] { thread_main(*t); });
    for (auto& thread : threads) workers[thread->position]->wait();
  }

  // ---- Fibers.

  static constexpr size_t kStack = 256 * 1024;
  bool reverse = false;
  size_t next = 0;  // no fiber before it (after it, in reverse) can run
  ucontext_t home;
  void* home_fake_stack = nullptr;
  const void* home_stack = nullptr;
  size_t home_size = 0;

  // Stacks are mapped once per host thread and kept.
  static unsigned char* stack(size_t number) {
    static thread_local std::vector<unsigned char*> stacks;
    while (stacks.size() <= number) {
      void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
      stacks.push_back(static_cast<unsigned char*>(p));
    }
    return stacks[number];
  }

  bool ready(const Thread& t) const {
    return !t.ended && (t.waits == nullptr || t.waits->generation != t.since || failed);
  }

  // Goes to the next fiber that can run; home where all have ended; nowhere if it is this one.
  void next_fiber() {
    Thread& self = *current;
    for (; next < threads.size(); reverse ? --next : ++next) {  // −1 is past the end, too
      if (!ready(*threads[next])) continue;
      if (threads[next].get() != &self) go(&self, threads[next].get());
      return;
    }
    if (idle >> 32 == threads.size()) return go(&self, nullptr);
    if (!failed) deadlock();
    next = reverse ? threads.size() - 1 : 0;
    next_fiber();  // now all can: they throw
  }

  // From one fiber to another; null is home.
  void go(Thread* from, Thread* to) {
#ifdef __SANITIZE_ADDRESS__
    void** save = from == nullptr ? &home_fake_stack : from->ended ? nullptr : &from->fake_stack;
    __sanitizer_start_switch_fiber(save, to == nullptr ? home_stack : stack(to->position),
                                   to == nullptr ? home_size : kStack);
#endif
    current = to;
    swapcontext(from == nullptr ? &home : &from->context, to == nullptr ? &home : &to->context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from == nullptr ? home_fake_stack : from->fake_stack, nullptr,
                                    nullptr);
#endif
  }

  static inline thread_local Group* starting = nullptr;

  static void fiber_main() {
    Group& group = *starting;
    Thread& self = *current;
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (group.home_stack == nullptr) {
      group.home_stack = bottom;
      group.home_size = size;
    }
#endif
    group.thread_main(self);
    group.next_fiber();
  }

  void run_fibers() {
    reverse = option("SANM_CUDA_HOST_ORDER", "reverse");
    starting = this;
    for (size_t k = 0; k < threads.size(); ++k) {
      ucontext_t& context = threads[k]->context;
      getcontext(&context);
      context.uc_stack.ss_sp = stack(k);
      context.uc_stack.ss_size = kStack;
      context.uc_link = nullptr;
      makecontext(&context, fiber_main, 0);
    }
    next = reverse ? threads.size() - 1 : 0;
    go(nullptr, threads[next].get());
    current = nullptr;
  }
};

inline unsigned Thread::warp_size() const {
  const unsigned n = block->cluster->group->grid.block_threads(), first = linear / 32 * 32;
  return n - first < 32 ? n - first : 32;
}

inline void run(const Grid& grid) {
  const bool fibers = !option("SANM_CUDA_HOST_SCHEDULER", "threads");
  const bool reverse = option("SANM_CUDA_HOST_ORDER", "reverse");
  const uint64_t clusters = grid.block_count() / grid.cluster;
  const uint64_t at_a_time =
      grid.cooperative ? clusters
      : fibers         ? 1
                       : std::max<uint64_t>(1, 512 / (grid.cluster * grid.block_threads()));
  for (uint64_t first = 0; first < clusters; first += at_a_time) {
    Group group(grid, fibers);
    for (uint64_t k = first; k < std::min(clusters, first + at_a_time); ++k)
      group.add_cluster(reverse ? clusters - 1 - k : k);
    if (tally_blocks) tally_blocks(grid, &current);
    fibers ? group.run_fibers() : group.run_threads();
    if (group.failed) throw std::runtime_error(group.message);
  }
  if (tally_launch) tally_launch(grid);
}

}  // namespace cuda_host
