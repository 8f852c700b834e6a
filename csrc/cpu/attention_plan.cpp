#include "../attention_plan.h"

#include <algorithm>
#include <vector>

namespace pcl {
namespace {

bool copy_offsets(const int64_t* offsets, int64_t count, int64_t end, int64_t* copy) {
  copy[0] = offsets[0];
  if (copy[0] != 0) return false;
  for (int64_t i = 0; i < count; ++i) {
    copy[i + 1] = offsets[i + 1];
    if (copy[i + 1] < copy[i]) return false;
  }
  return end < 0 || copy[count] == end;
}

struct WritablePlan {
  int64_t *offsets, *prefix_offsets, *prefix_index, *members, *chunk_begin, *chunk_order, *prefix_chunk, *num_chunks;

  WritablePlan(int64_t* work, int64_t batch, int64_t num_prefixes)
      : offsets(work),
        prefix_offsets(offsets + batch + 1),
        prefix_index(prefix_offsets + num_prefixes + 1),
        members(prefix_index + batch),
        chunk_begin(members + batch),
        chunk_order(chunk_begin + batch + 1),
        prefix_chunk(chunk_order + batch),
        num_chunks(prefix_chunk + num_prefixes + 1) {}
};

// Counting sort of the histories by prefix, -1 first.
void group_members(const WritablePlan& plan, int64_t batch, int64_t num_prefixes) {
  std::vector<int64_t> next(num_prefixes + 1, 0);  // where prefix r - 1 begins
  for (int64_t b = 0; b < batch; ++b) {
    if (plan.prefix_index[b] + 1 < num_prefixes) ++next[plan.prefix_index[b] + 2];
  }
  for (int64_t r = 1; r <= num_prefixes; ++r) next[r] += next[r - 1];
  for (int64_t b = 0; b < batch; ++b) plan.members[next[plan.prefix_index[b] + 1]++] = b;
}

void cut_chunks(const WritablePlan& plan, int64_t batch, int64_t num_prefixes) {
  int64_t chunks = 0, rows = 0, last_block = -1, last_prefix = -2;
  const int64_t each = chunk_rows(plan.offsets[batch]);
  std::fill(plan.chunk_begin, plan.chunk_begin + batch + 1, batch);
  std::fill(plan.prefix_chunk, plan.prefix_chunk + num_prefixes + 1, -1);
  for (int64_t m = 0; m < batch; ++m) {
    const int64_t b = plan.members[m], prefix = plan.prefix_index[b], block = rows / each;
    if (block != last_block || prefix != last_prefix) {
      if (prefix != last_prefix && prefix >= 0) plan.prefix_chunk[prefix] = chunks;
      plan.chunk_begin[chunks++] = m;
    }
    last_block = block;
    last_prefix = prefix;
    rows += plan.offsets[b + 1] - plan.offsets[b];
  }
  *plan.num_chunks = chunks;
  plan.prefix_chunk[num_prefixes] = chunks;
  for (int64_t r = num_prefixes - 1; r >= 0; --r) {
    if (plan.prefix_chunk[r] < 0) plan.prefix_chunk[r] = plan.prefix_chunk[r + 1];
  }
}

void order_chunks(const WritablePlan& plan, int64_t batch) {
  std::vector<double> cost(batch, 0);
  for (int64_t c = 0; c < *plan.num_chunks; ++c) {
    for (int64_t m = plan.chunk_begin[c]; m < plan.chunk_begin[c + 1]; ++m) {
      const int64_t b = plan.members[m], prefix = plan.prefix_index[b];
      const double length = static_cast<double>(plan.offsets[b + 1] - plan.offsets[b]);
      const double shared =
          prefix < 0 ? 0 : static_cast<double>(plan.prefix_offsets[prefix + 1] - plan.prefix_offsets[prefix]);
      cost[c] += length * (2 * shared + length);
    }
  }
  for (int64_t c = 0; c < batch; ++c) plan.chunk_order[c] = c;
  std::stable_sort(plan.chunk_order, plan.chunk_order + *plan.num_chunks,
                   [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
}

}  // namespace

AttentionPlan read_plan(const int64_t* work, int64_t batch, int64_t num_prefixes) {
  const WritablePlan plan(const_cast<int64_t*>(work), batch, num_prefixes);
  return {batch,        num_prefixes,     plan.offsets,     plan.prefix_offsets, plan.prefix_index,
          plan.members, plan.chunk_begin, plan.chunk_order, plan.prefix_chunk,   *plan.num_chunks};
}

bool attention_plan_cpu(const int64_t* offsets, const int64_t* prefix_offsets, const int64_t* prefix_index,
                        int64_t* work, int64_t batch, int64_t num_prefixes, int64_t total, int64_t prefix_total) {
  const WritablePlan plan(work, batch, num_prefixes);
  if (!copy_offsets(offsets, batch, total, plan.offsets)) return false;
  plan.prefix_offsets[0] = 0;
  if (prefix_offsets && !copy_offsets(prefix_offsets, num_prefixes, prefix_total, plan.prefix_offsets)) return false;
  for (int64_t b = 0; b < batch; ++b) {
    plan.prefix_index[b] = prefix_index ? prefix_index[b] : -1;
    if (plan.prefix_index[b] < -1 || plan.prefix_index[b] >= num_prefixes) return false;
  }
  group_members(plan, batch, num_prefixes);
  cut_chunks(plan, batch, num_prefixes);
  order_chunks(plan, batch);
  return true;
}

}  // namespace pcl
