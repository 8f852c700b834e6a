#include "../gather_histories.h"

#include <algorithm>
#include <cstring>

#include "../parallel.h"

namespace pcl {

int64_t gather_offsets_cpu(const StoredHistories& stored, const PickedRows& picked, int64_t* packed_offsets) {
  if (stored.offsets[0] != 0 || stored.offsets[stored.num_histories] != stored.num_values) return -1;
  packed_offsets[0] = 0;
  for (int64_t i = 0; i < picked.count; ++i) {
    const int64_t r = picked.rows[i];
    if (r < 0 || r >= stored.num_histories) return -1;
    const int64_t begin = stored.offsets[r], end = stored.offsets[r + 1];
    if (begin < 0 || end < begin || end > stored.num_values) return -1;
    const int64_t length = picked.cut ? picked.cut[i] : end - begin;
    if (length < 0 || length > end - begin) return -1;
    packed_offsets[i + 1] = packed_offsets[i] + std::min(length, picked.max_len);
  }
  return packed_offsets[picked.count];
}

void gather_histories_cpu(const StoredHistories& stored, const PickedRows& picked, const int64_t* packed_offsets,
                          char* packed, int threads) {
  constexpr int64_t kRowsPerTask = 64;
  const int64_t bytes = stored.value_bytes, tasks = (picked.count + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(tasks, threads_for(packed_offsets[picked.count] * bytes, threads), [&](int64_t task) {
    const int64_t last = std::min((task + 1) * kRowsPerTask, picked.count);
    for (int64_t i = task * kRowsPerTask; i < last; ++i) {
      const int64_t r = picked.rows[i], length = packed_offsets[i + 1] - packed_offsets[i];
      const int64_t end = picked.cut ? stored.offsets[r] + picked.cut[i] : stored.offsets[r + 1];
      if (length)
        std::memcpy(packed + packed_offsets[i] * bytes, stored.values + (end - length) * bytes, length * bytes);
    }
  });
}

}  // namespace pcl
