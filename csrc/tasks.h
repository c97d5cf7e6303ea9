// The work of a CPU kernel: how it is cut into tasks, and how they spread over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#endif
#include <vector>

#include "cpu/buffer.h"
#include "cpu/dispatch.h"

namespace ssmtune {

// Enough to keep some 16 threads busy.
inline constexpr int64_t kTasks = 16;

// About as many, from rows of the batch first and from channels for the rest. `max_ranges` bounds what each range of channels
// costs in memory.
Partition make_partition(int64_t batch, int64_t dim, int64_t max_ranges, int64_t sections = 1);

// The same for packed sequences: from channels first, for the lengths of sequences may differ. Groups of them have about as
// many steps each; `group_begin` is where they are kept.
Partition make_partition(const std::vector<int64_t>& bounds, int64_t dim, int64_t max_ranges, int64_t sections,
                         std::vector<int64_t>& group_begin);

// `work` is about the number of element updates of all tasks: small problems stay on one thread.
int64_t grain(int64_t tasks, int64_t work);

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not see how the threads of torch's pool wait for each other, and would report each result as a race.
// It sees these, which also share small problems, so that there is something to watch.
template <typename Function>
void parallel_for(int64_t begin, int64_t end, int64_t, const Function& function) {
  const int64_t threads = std::min<int64_t>(end - begin, torch::stable::get_num_threads());
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t from = begin + (end - begin) * i / threads, to = begin + (end - begin) * (i + 1) / threads;
    pool.emplace_back([&function, from, to] { function(from, to); });
  }
  for (std::thread& thread : pool) thread.join();
}
#else
using torch::stable::parallel_for;
#endif

template <typename Params>
void run(const Kernel<Params>& kernel, const Params& params, int64_t work) {
  const int64_t tasks = params.partition.tasks();
  parallel_for(0, tasks, grain(tasks, work), [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate(kernel.scratch_floats(params));
    for (int64_t task = begin; task < end; ++task) kernel.run(params, task, scratch.get());
  });
}

template <typename Update, typename Params>
void run_update(Update update, const Params& p, int64_t work) {
  const int64_t units = (p.dim + Partition::kUnit - 1) / Partition::kUnit, tasks = p.batch * units;
  parallel_for(0, tasks, grain(tasks, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % units * Partition::kUnit;
      update(p, task / units, channel, std::min(channel + Partition::kUnit, p.dim));
    }
  });
}

}  // namespace ssmtune
