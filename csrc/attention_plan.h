// attention_plan: checks offsets and prefixes, writes the work list of a batch.
//
//   offsets         [B + 1]   int64
//   prefix_offsets  [R + 1]   int64, null without a prefix
//   prefix_index    [B]       int64, null without a prefix; -1 is no prefix
//   work            [plan_size(B, R)] int64, the work list:
//     offsets         [B + 1]   copies, so that what was checked is what is used
//     prefix_offsets  [R + 1]
//     prefix_index    [B]       -1 without a prefix
//     members         [B]       histories by prefix, then by number
//     chunk_begin     [B + 1]   chunk c is members[chunk_begin[c] : chunk_begin[c + 1]]; B where there is no such chunk
//     chunk_order     [B]       chunks by falling cost; entries past num_chunks are their own number
//     prefix_chunk    [R + 1]   prefix r is seen by the chunks prefix_chunk[r] .. prefix_chunk[r + 1] - 1
//     num_chunks      [1]
// A chunk is a run of members that share a prefix and whose first rows fall into the same chunk_rows(T) of all
// members' rows. It is the unit of work, and sums its histories' prefix gradients: chunks depend on offsets and
// prefixes alone.
#pragma once

#include <cstdint>

namespace pcl {

// At least 256, so that a prefix is loaded for many rows; more where that would make over a thousand chunks, each of
// which keeps sums of its own for the prefix gradients.
constexpr int64_t chunk_rows(int64_t total) {
  constexpr int64_t kLeast = 256, kMostChunks = 1024;
  const int64_t share = total / kMostChunks;
  return share < kLeast ? kLeast : share;
}

struct AttentionPlan {
  int64_t batch, num_prefixes;
  const int64_t *offsets, *prefix_offsets, *prefix_index, *members, *chunk_begin, *chunk_order, *prefix_chunk;
  int64_t num_chunks;
};

AttentionPlan read_plan(const int64_t* work, int64_t batch, int64_t num_prefixes);

// False when a value breaks a rule: offsets that do not start at 0, decrease, or do not end at total (any end when
// total is -1), the same for the prefixes, an index outside -1..R-1. work is then left half written.
bool attention_plan_cpu(const int64_t* offsets, const int64_t* prefix_offsets, const int64_t* prefix_index,
                        int64_t* work, int64_t batch, int64_t num_prefixes, int64_t total, int64_t prefix_total);

}  // namespace pcl
