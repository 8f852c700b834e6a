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

// The kept items of the i-th picked history: where they are and where they go. Held by value in the loop over
// histories, which writes bytes: what it reads through references would be read anew after each of them.
struct Items {
  const char* values;
  const int64_t *offsets, *rows, *cut, *packed_offsets;
  int64_t value_bytes;

  int64_t bytes(int64_t i) const { return (packed_offsets[i + 1] - packed_offsets[i]) * value_bytes; }
  const char* source(int64_t i) const {
    const int64_t end = cut ? offsets[rows[i]] + cut[i] : offsets[rows[i] + 1];
    return values + end * value_bytes - bytes(i);
  }
};

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
  const int64_t tasks = (picked.count + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t bytes = packed_offsets[picked.count] * stored.value_bytes;
  // Up to 1 MB, one thread is done before another wakes.
  parallel_for_shares(tasks, threads_for_bytes(bytes / 4, threads), [&](int64_t task) {
    const Items items{stored.values, stored.offsets, picked.rows, picked.cut, packed_offsets, stored.value_bytes};
    const int64_t first = task * kRowsPerTask, last = std::min(first + kRowsPerTask, picked.count);
    for (int64_t i = first; i < std::min(first + kAhead, last); ++i) ask_for(items.source(i), items.bytes(i));
    char* to = packed + packed_offsets[first] * stored.value_bytes;
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last) ask_for(items.source(i + kAhead), items.bytes(i + kAhead));
      const int64_t size = items.bytes(i);
      if (size) std::memcpy(to, items.source(i), size);
      to += size;
    }
  });
}

}  // namespace pcl
