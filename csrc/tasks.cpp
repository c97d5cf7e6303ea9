#include "tasks.h"

namespace ssmtune {

Partition make_partition(int64_t batch, int64_t dim, int64_t max_ranges, int64_t sections) {
  Partition partition{batch, dim, std::min(batch, kTasks), sections, sections};
  const int64_t ranges = (kTasks + partition.groups - 1) / partition.groups;
  const int64_t section_ranges = std::min({ranges / sections, partition.units(), max_ranges / sections});
  partition.ranges = sections * std::max<int64_t>(1, section_ranges);
  return partition;
}

Partition make_partition(const std::vector<int64_t>& bounds, int64_t dim, int64_t max_ranges, int64_t sections,
                         std::vector<int64_t>& group_begin) {
  Partition partition = make_partition(1, dim, max_ranges, sections);
  partition.batch = static_cast<int64_t>(bounds.size()) - 1;
  partition.groups = std::min(partition.batch, (kTasks + partition.ranges - 1) / partition.ranges);
  for (int64_t group = 0; group <= partition.groups; ++group) {
    const int64_t step = bounds.back() * group / partition.groups;
    group_begin.push_back(std::lower_bound(bounds.begin(), bounds.end(), step) - bounds.begin());
  }
  partition.group_begin = group_begin.data();
  return partition;
}

int64_t grain(int64_t tasks, int64_t work) {
  constexpr int64_t kWorkPerThread = 1 << 15;
  return std::clamp<int64_t>(kWorkPerThread * tasks / std::max<int64_t>(work, 1), 1, tasks);
}

}  // namespace ssmtune
