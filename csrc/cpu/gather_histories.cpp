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

namespace {

// Where the kept items of the i-th picked history end in values.
int64_t end_of(const StoredHistories& stored, const PickedRows& picked, int64_t i) {
  const int64_t r = picked.rows[i];
  return picked.cut ? stored.offsets[r] + picked.cut[i] : stored.offsets[r + 1];
}

// Asks for a short history some copies before it is read: histories lie anywhere, and waiting for each takes longer
// than copying it. The rest of a long one is found by the processor itself.
void ask_for(const char* from, int64_t bytes) {
  constexpr int64_t kLine = 64, kLines = 16;
  for (int64_t byte = 0; byte < std::min(bytes, kLines * kLine); byte += kLine) __builtin_prefetch(from + byte);
}

}  // namespace

void gather_histories_cpu(const StoredHistories& stored, const PickedRows& picked, const int64_t* packed_offsets,
                          char* packed, int threads) {
  constexpr int64_t kRowsPerTask = 64, kAhead = 8;
  const int64_t bytes = stored.value_bytes, tasks = (picked.count + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t work = packed_offsets[picked.count] * bytes / 4;  // up to 1 MB, one thread is done before another wakes
  parallel_for_shares(tasks, threads_for(work, threads), [&](int64_t task) {
    const int64_t first = task * kRowsPerTask, last = std::min(first + kRowsPerTask, picked.count);
    const auto source = [&](int64_t i) {
      return stored.values + (end_of(stored, picked, i) - (packed_offsets[i + 1] - packed_offsets[i])) * bytes;
    };
    const auto size = [&](int64_t i) { return (packed_offsets[i + 1] - packed_offsets[i]) * bytes; };
    for (int64_t i = first; i < std::min(first + kAhead, last); ++i) ask_for(source(i), size(i));
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last) ask_for(source(i + kAhead), size(i + kAhead));
      if (size(i)) std::memcpy(packed + packed_offsets[i] * bytes, source(i), size(i));
    }
  });
}

}  // namespace pcl
