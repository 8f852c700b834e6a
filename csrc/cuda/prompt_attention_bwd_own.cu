// Gradients of the keys and values of own rows. A block owns four slots of 16 keys, a warp each, of one head, and goes
// over the queries that see them, which come in tiles of four slots, the next one under way.
#include "attention_grads.h"

namespace pcl {

namespace {

template <class T, int kDim>
struct KeyMemory {
  static constexpr int kTile = Rows<T, kDim>::kTileBytes;
  static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kSlots = 512;  // bytes
  static constexpr int kNumbersBytes = kTileRows * static_cast<int>(sizeof(RowNumbers));
  static constexpr int kBytes = kSlots + kWarps * (2 * kTile + kStages * (2 * kTile + kNumbersBytes));
  static_assert(kWarps * sizeof(Slot) <= kSlots);

  unsigned char* base;

  __device__ __forceinline__ Slot& slot(int warp) const { return reinterpret_cast<Slot*>(base)[warp]; }
  __device__ __forceinline__ unsigned char* keys(int warp, int which) const {
    return base + kSlots + (warp * 2 + which) * kTile;
  }
  __device__ __forceinline__ unsigned char* rows(int stage, int which, int tile) const {
    return base + kSlots + (2 * kWarps + (stage * 2 + which) * kWarps + tile) * kTile;
  }
  __device__ __forceinline__ RowNumbers* numbers(int stage, int tile) const {
    unsigned char* first = base + kSlots + kWarps * (2 + 2 * kStages) * kTile;
    return reinterpret_cast<RowNumbers*>(first + (stage * kWarps + tile) * kNumbersBytes);
  }
};

// Slots of queries that see the keys of a block.
template <class Memory>
__device__ __forceinline__ Extent queries_of(const Memory& memory, bool causal, int64_t group) {
  Extent extent{0, -1, 0, 0};
  bool any = false;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const Slot& slot = memory.slot(w);
    if (slot.length == 0) continue;
    const int64_t first = causal ? group * kWarps + w : slot.first, last = slot.first + slot.tiles() - 1;
    extent.first = !any || first < extent.first ? first : extent.first;
    extent.last = !any || last > extent.last ? last : extent.last;
    extent.low = !any || slot.run < extent.low ? slot.run : extent.low;
    extent.high = !any || slot.run > extent.high ? slot.run : extent.high;
    any = true;
  }
  return extent;
}

template <class T, int kDim>
__device__ __forceinline__ void load_queries(const AttentionBackward<T>& backward, const KeyMemory<T, kDim>& memory,
                                             int head, int stage, int64_t slot, const Extent& extent) {
  const int warp = warp_index();
  if (slot + warp <= extent.last) {
    const Attention<T>& attention = backward.attention;
    const Slot queries = find_slot(attention.slots, slot + warp, extent.low, extent.high);
    const int64_t row = queries.begin + queries.row;
    load_tile<T, kDim>(memory.rows(stage, 0, warp), attention.q.head(head), row, queries.count());
    load_tile<T, kDim>(memory.rows(stage, 1, warp), backward.grad_out.head(head), row, queries.count());
    load_numbers(memory.numbers(stage, warp), backward.numbers, attention.num_heads, head, row, queries.count());
  }
  cp_async_commit();
}

// All queries of a block's keys; the first tile has arrived.
template <class T, int kDim>
__device__ __forceinline__ void see_queries(const AttentionBackward<T>& backward, const KeyMemory<T, kDim>& memory,
                                            int head, int64_t group, const Extent& extent, KeySums<T, kDim>& sums) {
  using Memory = KeyMemory<T, kDim>;
  const int warp = warp_index();
  const Slot own = memory.slot(warp);
  const bool causal = backward.attention.causal;
  const int64_t first = causal ? group * kWarps + warp : own.first;
  const int64_t last = own.length == 0 ? -1 : own.first + own.tiles() - 1;
  int stage = 0;
  for (int64_t slot = extent.first;; slot += kWarps) {
    const int64_t next = slot + kWarps;
    const int other = Memory::kStages == 2 ? 1 - stage : 0;
    if (Memory::kStages == 2 && next <= extent.last) load_queries(backward, memory, head, other, next, extent);
    for (int tile = 0; tile < kWarps; ++tile) {
      if (slot + tile < first || slot + tile > last) continue;
      const int row = static_cast<int>(slot + tile - own.first) * kTileRows;
      sums.see(memory.keys(warp, 0), memory.keys(warp, 1), memory.rows(stage, 0, tile), memory.rows(stage, 1, tile),
               memory.numbers(stage, tile), causal ? row - own.row : kNoDiagonal, backward);
    }
    if (next > extent.last) return;
    if (Memory::kStages == 1) {
      sync_threads();
      load_queries(backward, memory, head, other, next, extent);
    }
    cp_async_wait<0>();
    sync_threads();
    stage = other;
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) grad_own_keys_kernel(AttentionBackward<T> backward) {
  const KeyMemory<T, kDim> memory{shared_memory()};
  const Attention<T>& attention = backward.attention;
  const int warp = warp_index(), num_heads = attention.num_heads, head = block_x() % num_heads;
  const int64_t groups = (attention.slots.count() + kWarps - 1) / kWarps;
  const int64_t stride = static_cast<int64_t>(num_heads) * kDim;
  for (int64_t group = block_x() / num_heads; group < groups; group += grid_x() / num_heads) {
    const Slot own = find_slot_warp(attention.slots, group * kWarps + warp);
    if (lane_index() == 0) memory.slot(warp) = own;
    sync_threads();
    const Extent extent = queries_of(memory, attention.causal, group);
    if (extent.first <= extent.last) {
      const int64_t row = own.begin + own.row;
      load_tile<T, kDim>(memory.keys(warp, 0), attention.k.head(head), row, own.count());
      load_tile<T, kDim>(memory.keys(warp, 1), attention.v.head(head), row, own.count());
      load_queries(backward, memory, head, 0, extent.first, extent);
      cp_async_wait<0>();
      sync_threads();
      KeySums<T, kDim> sums;
      sums.clear();
      see_queries(backward, memory, head, group, extent, sums);
      const int64_t to = row * stride + head * kDim;
      if (backward.grad_k != nullptr) {
        store_wide<T, kDim>(sums.k, memory.keys(warp, 0), backward.grad_k + to, stride, own.count());
      }
      if (backward.grad_v != nullptr) {
        store_wide<T, kDim>(sums.v, memory.keys(warp, 1), backward.grad_v + to, stride, own.count());
      }
    }
    sync_threads();  // the next group takes the place of this one
  }
}

}  // namespace

template <class T>
int grad_own_keys(const AttentionArgs& args, const AttentionBackward<T>& backward, void* stream) {
  return with_dim(args.head_dim, [&](auto dim) {
    constexpr int kBytes = KeyMemory<T, dim()>::kBytes;
    const int64_t groups = (backward.attention.slots.count() + kWarps - 1) / kWarps;
    const auto kernel = grad_own_keys_kernel<T, dim()>;
    return launch(kernel, blocks_by_head(kernel, kBytes, args.num_heads, groups), kThreads, kBytes, stream, backward);
  });
}

template int grad_own_keys<bf16>(const AttentionArgs&, const AttentionBackward<bf16>&, void*);
template int grad_own_keys<fp16>(const AttentionArgs&, const AttentionBackward<fp16>&, void*);
template int grad_own_keys<float>(const AttentionArgs&, const AttentionBackward<float>&, void*);

}  // namespace pcl
