// gather_histories: users out of a stored CSR, newest items kept.
//
//   values   [E]       items of value_bytes each; may be a memory map, of which only what is picked is read
//   offsets  [N + 1]   int64: history r is values[offsets[r] : offsets[r + 1]]
//   rows     [n]       int64
//   cut      [n]       int64, entries of the history of which the newest max_len are kept; null: all
//   packed_offsets [n + 1], packed [packed_offsets[n]]
// Values are checked here, before anything is read through them; shapes, dtypes and contiguity by the caller.
#pragma once

#include <cstdint>

namespace pcl {

struct StoredHistories {
  const char* values;
  const int64_t* offsets;
  int64_t num_values, num_histories, value_bytes;
};

struct PickedRows {
  const int64_t *rows, *cut;
  int64_t count, max_len;
};

// Writes packed_offsets and returns the last; -1 where offsets do not run from 0 to num_values, or a row, a cut or an
// offset of a picked history is out of range.
int64_t gather_offsets_cpu(const StoredHistories& stored, const PickedRows& picked, int64_t* packed_offsets);

// Copies the items. packed_offsets as gather_offsets_cpu left them.
void gather_histories_cpu(const StoredHistories& stored, const PickedRows& picked, const int64_t* packed_offsets,
                          char* packed, int threads);

}  // namespace pcl
