// Gradients of own rows. A block takes a group of four slots of one head, a warp each: first as queries, over the keys
// that they see, then as keys, over the queries that see them. What both need of the neighbourhood comes from memory
// once; the second time, and for the blocks beside, it is in L2. Between the two, while the queries are in shared
// memory, a block adds up what they give to a short prefix that all share.
#include "attention_grads.h"
#include "attention_prefix_sums.h"

namespace pcl {

namespace {

template <class T>
constexpr int kGradStages = sizeof(T) == 2 ? 2 : 1;
constexpr int kNumbersBytes = kTileRows * static_cast<int>(sizeof(RowNumbers));

// Blocks on a multiprocessor, as many as registers last for without spilling.
template <class T, int kDim>
constexpr int kBlocks = sizeof(T) == 2 && kDim <= 64 ? 3 : 2;

// Own rows: q, grad_out and out, then keys and values. Others: keys and values, then q and grad_out with their numbers.
template <class T, int kDim>
struct OwnMemory : PassMemory<T, kDim, kMakesNumbers<T, kDim> ? 3 : 2, kGradStages<T> * kWarps * kNumbersBytes> {
  __device__ __forceinline__ RowNumbers* numbers(int stage, int tile) const {
    return reinterpret_cast<RowNumbers*>(this->more() + (stage * kWarps + tile) * kNumbersBytes);
  }
  // behind the one tile of the prefix
  __device__ __forceinline__ float* prefix_sums() const {
    return reinterpret_cast<float*>(this->base + this->bytes(1));
  }
};

template <class T, int kDim>
struct GradQ {
  AllHeads<T> rows[3];  // q, grad_out, out
  const RowNumbers* numbers;
  const RowStats* stats;
  T* grad_q;
  int num_heads;
  float scale;
  PrefixSums<T, kDim> prefix;

  Slot own;
  int head;
  unsigned char* q;
  HeldTile<T, kDim> queries, grad_out;
  Wide<kDim> sums;
  RowNumbers row[2];

  template <class Memory>
  __device__ __forceinline__ void load(const Slot& slot, int head_number, const Memory& memory) const {
    RowNumbers* const to = memory.numbers(0, warp_index());
    const int64_t first = slot.begin + slot.row;
    if constexpr (kMakesNumbers<T, kDim>) {
      load_stats(to, stats, num_heads, head_number, first, slot.count());
    } else {
      load_numbers(to, numbers, num_heads, head_number, first, slot.count());
    }
  }

  template <class Memory>
  __device__ __forceinline__ void begin(const Slot& slot, int head_number, const Memory& memory) {
    own = slot;
    head = head_number;
    q = memory.rows(warp_index(), 0);
    queries.hold(q);
    grad_out.hold(memory.rows(warp_index(), 1));
    sums.clear();
    RowNumbers* const here = memory.numbers(0, warp_index());
    if constexpr (kMakesNumbers<T, kDim>) {
      make_numbers<T, kDim>(here, memory.rows(warp_index(), 1), memory.rows(warp_index(), 2), scale);
      sync_warp();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) row[r] = here[lane_index() / 4 + 8 * r];
  }

  __device__ __forceinline__ void see(const unsigned char* keys, const unsigned char* values, const Seen& seen) {
    const Block scores = product_with<T, kDim>(queries, keys);
    Block grads = product_with<T, kDim>(grad_out, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const RowNumbers& numbers_of_row = row[i / 2 % 2];
      const float weight = numbers_of_row.weight<T>(scores.at[i], scale * kLog2E);
      grads.at[i] = numbers_of_row.grad(weight, grads.at[i], scale);
    }
    if (!seen.all()) {
#pragma unroll
      for (int i = 0; i < 8; ++i) grads.at[i] = seen.at(i) ? grads.at[i] : 0.f;
    }
    add_product<T>(sums, grads, keys);
  }

  template <class Memory>
  __device__ __forceinline__ void end(const Memory& memory) {
    if constexpr (PrefixSums<T, kDim>::kFits) {
      if (prefix.partial != nullptr) {
        sync_threads();
        prefix.see_group(memory);
        sync_threads();
      }
    }
    const int64_t stride = static_cast<int64_t>(num_heads) * kDim;
    T* to = grad_q + (own.begin + own.row) * stride + head * kDim;
    store_wide<T, kDim>(sums, q, to, stride, own.count());
  }
};

// A slot of queries for each warp to load.
template <class T, int kDim>
__device__ __forceinline__ void load_queries(const AttentionBackward<T>& backward, const OwnMemory<T, kDim>& memory,
                                             int head, int stage, int slot, const Extent& extent) {
  const int warp = warp_index();
  if (slot + warp <= extent.last) {
    const Attention<T>& attention = backward.attention;
    const Slot queries = slot_near(memory, slot + warp);
    const int64_t row = queries.begin + queries.row;
    RowNumbers* const numbers = memory.numbers(stage, warp);
    load_tile<T, kDim>(memory.others(stage, 0, warp), attention.q.head(head), row, queries.count());
    load_tile<T, kDim>(memory.others(stage, 1, warp), backward.grad_out.head(head), row, queries.count());
    if constexpr (kMakesNumbers<T, kDim>) {
      load_tile<T, kDim>(memory.rows(warp, 2), backward.out.head(head), row, queries.count());
      load_stats(numbers, backward.stats, attention.num_heads, head, row, queries.count());
    } else {
      load_numbers(numbers, backward.numbers, attention.num_heads, head, row, queries.count());
    }
  }
  cp_async_commit();
}

// Waits for what the block has loaded, and makes its numbers.
template <class T, int kDim>
__device__ __forceinline__ void wait_for_queries(const OwnMemory<T, kDim>& memory, int stage, float scale) {
  cp_async_wait<0>();
  if constexpr (kMakesNumbers<T, kDim>) {
    const int warp = warp_index();
    sync_warp();
    make_numbers<T, kDim>(memory.numbers(stage, warp), memory.others(stage, 1, warp), memory.rows(warp, 2), scale);
  }
  sync_threads();
}

// All queries of a block's keys; the first tile has arrived.
template <class T, int kDim>
__device__ __forceinline__ void see_queries(const AttentionBackward<T>& backward, const KeyGrads<T>& grads,
                                            const OwnMemory<T, kDim>& memory, int head, const Extent& extent,
                                            KeySums<T, kDim>& sums) {
  using Memory = OwnMemory<T, kDim>;
  const int warp = warp_index();
  const Slot own = memory.item(warp).slot;
  const bool causal = backward.attention.causal;
  const int first = causal ? clamp(warp, own.first, own.last() + 1) : own.first, last = own.last();
  HeldTile<T, kDim> keys;
  HeldValues<T, kDim> values;
  keys.hold(memory.rows(warp, 0));
  values.hold(memory.rows(warp, 1));
  int stage = 0;
  for (int slot = extent.first;; slot += kWarps) {
    const int next = slot + kWarps;
    const int other = Memory::kStages == 2 ? 1 - stage : 0;
    if (Memory::kStages == 2 && next <= extent.last) load_queries(backward, memory, head, other, next, extent);
    const int end = clamp(last + 1 - slot, 0, kWarps);
    for (int tile = clamp(first - slot, 0, kWarps); tile < end; ++tile) {
      const unsigned char *q = memory.others(stage, 0, tile), *grad_out = memory.others(stage, 1, tile);
      const KeyBlocks<T, kDim> blocks(keys, values, q, grad_out, memory.numbers(stage, tile),
                                      causal && slot + tile == warp, backward.attention.scale);
      sums.see(blocks, q, grad_out, grads);
    }
    if (next > extent.last) return;
    if (Memory::kStages == 1) {
      sync_threads();
      load_queries(backward, memory, head, other, next, extent);
    }
    wait_for_queries(memory, other, backward.attention.scale);
    stage = other;
  }
}

// Where the rows are is read once more, so that registers need not last for it before.
template <class T, int kDim>
__device__ __forceinline__ void store_keys(const KeyGrads<T>& grads, const OwnMemory<T, kDim>& memory, int num_heads,
                                           int head, const KeySums<T, kDim>& sums) {
  const int warp = warp_index();
  const Slot& own = memory.item(warp).slot;
  const int64_t stride = static_cast<int64_t>(num_heads) * kDim, to = (own.begin + own.row) * stride + head * kDim;
  if (grads.k != nullptr) store_wide<T, kDim>(sums.k, memory.rows(warp, 0), grads.k + to, stride, own.count());
  if (grads.v != nullptr) store_wide<T, kDim>(sums.v, memory.rows(warp, 1), grads.v + to, stride, own.count());
}

template <class T, int kDim>
__device__ __forceinline__ void pass_over_queries(const AttentionBackward<T>& backward, const KeyGrads<T>& grads,
                                                  const OwnMemory<T, kDim>& memory, int head) {
  const Attention<T>& attention = backward.attention;
  const int warp = warp_index();
  const Slot& own = memory.item(warp).slot;
  const Extent extent = extent_of<false>(memory, attention.causal);
  const int64_t row = own.begin + own.row;
  load_tile<T, kDim>(memory.rows(warp, 0), attention.k.head(head), row, own.count());
  load_tile<T, kDim>(memory.rows(warp, 1), attention.v.head(head), row, own.count());
  load_queries(backward, memory, head, 0, extent.first, extent);
  wait_for_queries(memory, 0, attention.scale);
  KeySums<T, kDim> sums;
  sums.clear();
  see_queries(backward, grads, memory, head, extent, sums);
  store_keys(grads, memory, attention.num_heads, head, sums);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kDim>))
    grad_own_rows_kernel(AttentionBackward<T> backward, int prefix_tiles, OwnGrads<T> grads, float* partial) {
  const Attention<T>& attention = backward.attention;
  OwnMemory<T, kDim> memory{{shared_memory()}};
  GradQ<T, kDim> work;
  work.rows[0] = attention.q;
  work.rows[1] = backward.grad_out;
  work.rows[2] = backward.out;
  work.numbers = backward.numbers;
  work.stats = backward.stats;
  work.grad_q = grads.q;
  work.num_heads = attention.num_heads;
  work.scale = attention.scale;
  work.prefix = {memory.prefix_sums(), partial, grads.prefix, attention.scale};
  if (partial != nullptr) work.prefix.clear();
  const auto run = [&](int head) {
    if (grads.q != nullptr) {
      pass_over_keys<T, kDim>(attention, memory, head, prefix_tiles, work);
      sync_threads();  // the keys take the place of the queries
    }
    if (grads.own.k != nullptr || grads.own.v != nullptr) {
      pass_over_queries(backward, grads.own, memory, head);
    }
  };
  for_groups(attention, memory, run, [&](int head, int64_t first, int count) {
    prefetch_tile<T, kDim>(attention.q.head(head), first, count);
    prefetch_tile<T, kDim>(attention.k.head(head), first, count);
    prefetch_tile<T, kDim>(attention.v.head(head), first, count);
    prefetch_tile<T, kDim>(backward.grad_out.head(head), first, count);
    if constexpr (kMakesNumbers<T, kDim>) prefetch_tile<T, kDim>(backward.out.head(head), first, count);
  });
  if (partial != nullptr) {
    sync_threads();
    work.prefix.write();
  }
  const Histories& histories = attention.slots.runs;
  if (grads.q != nullptr) clear_rows_of_none<T, kDim>(histories, grads.q, attention.num_heads);
  if (grads.own.k != nullptr) clear_rows_of_none<T, kDim>(histories, grads.own.k, attention.num_heads);
  if (grads.own.v != nullptr) clear_rows_of_none<T, kDim>(histories, grads.own.v, attention.num_heads);
}

template <class T, int kDim>
constexpr int kSumsBytes = PrefixSums<T, kDim>::kCount * static_cast<int>(sizeof(float));

// How the kernel is launched.
struct OwnLaunch {
  int prefix_tiles, shared_bytes;
  Grid grid;
};

template <class T, int kDim>
OwnLaunch own_launch(const AttentionArgs& args, bool queries, bool prefix) {
  using Memory = OwnMemory<T, kDim>;
  const int sums = prefix ? kSumsBytes<T, kDim> : 0;
  const int prefix_tiles = queries ? prefix_tiles_of<Memory>(args, sums) : 0;
  const int shared_bytes = Memory::bytes(prefix_tiles) + sums;
  const int groups = attention_of<T>(args).groups();
  return {prefix_tiles, shared_bytes,
          blocks_by_head(grad_own_rows_kernel<T, kDim>, shared_bytes, args.num_heads, groups)};
}

template <class T>
bool prefix_fits(const AttentionArgs& args) {
  const bool one = args.plan.num_prefixes == 1 && args.prefix_total > 0 && args.prefix_total <= kTileRows;
  return one && args.total > 0 && with_dim(args.head_dim, [](auto dim) {
           return PrefixSums<T, dim()>::kFits &&
                  OwnMemory<T, dim()>::bytes(1) + kSumsBytes<T, dim()> <= max_shared_bytes();
         });
}

}  // namespace

template <class T>
bool grads_with_own(const AttentionArgs& args, const OwnGrads<T>& grads) {
  return grads.q != nullptr && prefix_fits<T>(args);
}

template <class T>
int64_t own_partial_bytes(const AttentionArgs& args) {
  if (!prefix_fits<T>(args)) return 0;
  int64_t bytes = 0;
  with_dim(args.head_dim, [&](auto dim) {
    const Grid grid = own_launch<T, dim()>(args, true, true).grid;
    bytes = static_cast<int64_t>(grid.x) * grid.y * kSumsBytes<T, dim()>;
    return 0;
  });
  return bytes;
}

template <class T>
int own_least_shared(int64_t head_dim) {
  return with_dim(head_dim, [](auto dim) { return OwnMemory<T, dim()>::bytes(1); });
}

template <class T>
int grad_own_rows(const AttentionArgs& args, const AttentionBackward<T>& backward, const OwnGrads<T>& grads,
                  float* partial, void* stream) {
  const bool prefix = partial != nullptr;
  return with_dim(args.head_dim, [&](auto dim) -> int {
    const OwnLaunch how = own_launch<T, dim()>(args, grads.q != nullptr, prefix);
    const int error = launch(grad_own_rows_kernel<T, dim()>, how.grid, kThreads, how.shared_bytes, stream, backward,
                             how.prefix_tiles, grads, partial);
    if (error != 0 || !prefix) return error;
    return add_prefix_shares<T>(args, grads.prefix, 1, partial, static_cast<int>(how.grid.x), stream);
  });
}

template bool grads_with_own<bf16>(const AttentionArgs&, const OwnGrads<bf16>&);
template bool grads_with_own<fp16>(const AttentionArgs&, const OwnGrads<fp16>&);
template bool grads_with_own<float>(const AttentionArgs&, const OwnGrads<float>&);
template int64_t own_partial_bytes<bf16>(const AttentionArgs&);
template int64_t own_partial_bytes<fp16>(const AttentionArgs&);
template int64_t own_partial_bytes<float>(const AttentionArgs&);
template int own_least_shared<bf16>(int64_t);
template int own_least_shared<fp16>(int64_t);
template int own_least_shared<float>(int64_t);
template int grad_own_rows<bf16>(const AttentionArgs&, const AttentionBackward<bf16>&, const OwnGrads<bf16>&, float*,
                                 void*);
template int grad_own_rows<fp16>(const AttentionArgs&, const AttentionBackward<fp16>&, const OwnGrads<fp16>&, float*,
                                 void*);
template int grad_own_rows<float>(const AttentionArgs&, const AttentionBackward<float>&, const OwnGrads<float>&, float*,
                                  void*);

}  // namespace pcl
