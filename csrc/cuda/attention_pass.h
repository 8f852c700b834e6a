// One pass of queries over their keys: the prefix first, then own rows. Forward and the gradient of q are such passes.
//
// A block owns a group of four slots of 16 rows, a warp each, of one head, and then another; blocks are persistent and
// keep their head. Keys and values come in tiles of four slots, the next one under way while this one is worked on; a
// piece of a prefix stays in shared memory while those who come see the same.
#pragma once

#include "../prompt_attention.h"
#include "attention_slots.h"
#include "isa.h"

namespace pcl {

inline constexpr int kWarps = 4, kThreads = kWarps * kWarp;
inline constexpr int kMostDim = 128;
inline constexpr float kLog2E = 1.44269504088896341f;

// Rows of the whole tensor.
template <class T>
struct AllHeads {
  const T* data;
  int64_t stride, head_stride;

  __device__ __forceinline__ Head<T> head(int64_t h) const { return {data + h * head_stride, stride}; }
};

template <class T>
AllHeads<T> heads_of(const AttentionRows& rows) {
  return {static_cast<const T*>(rows.data), rows.row_stride, rows.head_stride};
}

// What a pass reads.
template <class T>
struct Attention {
  Slots slots, prefixes;
  const int64_t* prefix_index;
  AllHeads<T> q, k, v, prefix_k, prefix_v;
  int num_heads;
  float scale;
  bool causal;

  __host__ __device__ int groups() const { return (slots.count() + kWarps - 1) / kWarps; }
};

template <class T>
Attention<T> attention_of(const AttentionArgs& args) {
  const AttentionPlan& plan = args.plan;
  return {{{plan.offsets, plan.batch, args.total}},
          {{plan.prefix_offsets, plan.num_prefixes, args.prefix_total}},
          plan.prefix_index,
          heads_of<T>(args.q),
          heads_of<T>(args.k),
          heads_of<T>(args.v),
          heads_of<T>(args.prefix_k),
          heads_of<T>(args.prefix_v),
          static_cast<int>(args.num_heads),
          static_cast<float>(args.scale),
          args.causal};
}

// The prefix of a history, -1 without any.
template <class T>
__device__ __forceinline__ int prefix_of(const Attention<T>& attention, int64_t history) {
  if (attention.prefixes.runs.batch == 0) return -1;
  const int64_t r = attention.prefix_index[history];
  return r >= 0 && r < attention.prefixes.runs.batch ? static_cast<int>(r) : -1;
}

// The piece of a prefix that is in shared memory, and the length of that prefix.
struct Resident {
  int prefix, piece, length;
};

// Shared memory of a pass with kRowTiles tensors of the group's own rows, and kMore bytes that follow the items.
template <class T, int kDim, int kRowTiles, int kMore = 0>
struct PassMemory {
  static constexpr int kTile = Rows<T, kDim>::kTileBytes;
  static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kRows = kRowTiles;
  static constexpr int kItems = 640, kFirst = kItems + kMore;  // bytes
  static constexpr int kMostPrefixTiles = sizeof(T) == 2 ? 4 : 1;

  // Of a warp of the group. Slots are counted from the group's first from here on.
  struct Item {
    Slot slot;
    int prefix;
  };
  static_assert(kWarps * kWarps * sizeof(Item) + sizeof(Resident) <= kItems);

  __host__ __device__ static int bytes(int prefix_tiles) {
    return kFirst + (kWarps * kRowTiles + 2 * kStages * kWarps + 2 * prefix_tiles) * kTile;
  }

  unsigned char* base;
  int turn = 0;  // which of the groups that were found is at hand
  __device__ __forceinline__ Item& item_of(int group, int warp) const {
    return reinterpret_cast<Item*>(base)[group * kWarps + warp];
  }
  __device__ __forceinline__ Item& item(int warp) const { return item_of(turn, warp); }
  __device__ __forceinline__ Resident& resident() const { return reinterpret_cast<Resident&>(item_of(kWarps, 0)); }
  __device__ __forceinline__ unsigned char* more() const { return base + kItems; }
  __device__ __forceinline__ unsigned char* rows(int warp, int which) const {
    return base + kFirst + (warp * kRowTiles + which) * kTile;
  }
  // the rows that the group looks at, four slots a stage
  __device__ __forceinline__ unsigned char* others(int stage, int which, int tile) const {
    return base + kFirst + (kWarps * kRowTiles + (stage * 2 + which) * kWarps + tile) * kTile;
  }
  __device__ __forceinline__ unsigned char* prefix(int prefix_tiles, int which, int tile) const {
    return base + kFirst + (kWarps * (kRowTiles + 2 * kStages) + which * prefix_tiles + tile) * kTile;
  }
};

// Which slots the rows of a group look at; last < first: none.
struct Extent {
  int first, last;
};

// Of keys that its queries see, or of queries that see its keys. Histories and slots have the same order: what the
// group's first and last rows look at is all.
template <bool kOfKeys, class Memory>
__device__ __forceinline__ Extent extent_of(const Memory& memory, bool causal) {
  int low = kWarps, high = -1;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (memory.item(w).slot.length == 0) continue;
    low = w < low ? w : low;
    high = w;
  }
  if (high < 0) return {0, -1};
  const Slot &first = memory.item(low).slot, &last = memory.item(high).slot;
  return {causal && !kOfKeys ? low : first.first, causal && kOfKeys ? high : last.last()};
}

// A slot that the group looks at: of its own, or one more of the history that its first or its last slot is of.
template <class Memory>
__device__ __forceinline__ Slot slot_near(const Memory& memory, int slot) {
  return memory.item(clamp(slot, 0, kWarps - 1)).slot.other(slot);
}

// A slot of keys and values for each warp to load.
template <class T, int kDim, class Memory>
__device__ __forceinline__ void load_keys(const Attention<T>& attention, const Memory& memory, int head, int stage,
                                          int slot, const Extent& extent) {
  const int warp = warp_index();
  if (slot + warp <= extent.last) {
    const Slot keys = slot_near(memory, slot + warp);
    const int64_t row = keys.begin + keys.row;
    load_tile<T, kDim>(memory.others(stage, 0, warp), attention.k.head(head), row, keys.count());
    load_tile<T, kDim>(memory.others(stage, 1, warp), attention.v.head(head), row, keys.count());
  }
  cp_async_commit();
}

template <class T, int kDim, class Memory>
__device__ __forceinline__ void load_prefix(const Attention<T>& attention, const Memory& memory, int head,
                                            int prefix_tiles, int prefix, int piece) {
  const int64_t begin = attention.prefixes.runs.begin(prefix);
  const int64_t length = attention.prefixes.runs.end(prefix) - begin;
  sync_threads();  // nobody reads the piece before any more
  if (thread_index() == 0) memory.resident() = {prefix, piece, static_cast<int>(length)};
  for (int tile = warp_index(); tile < prefix_tiles; tile += kWarps) {
    const int64_t row = (static_cast<int64_t>(piece) * prefix_tiles + tile) * kTileRows;
    const int count = static_cast<int>(clamp<int64_t>(length - row, 0, kTileRows));
    load_tile<T, kDim>(memory.prefix(prefix_tiles, 0, tile), attention.prefix_k.head(head), begin + row, count);
    load_tile<T, kDim>(memory.prefix(prefix_tiles, 1, tile), attention.prefix_v.head(head), begin + row, count);
  }
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
}

// The next prefix that the group's queries see, in the order of their numbers; kNoPrefix after the last.
inline constexpr int kNoPrefix = 0x7fffffff;
template <class Memory>
__device__ __forceinline__ int next_prefix(const Memory& memory, int before) {
  int next = kNoPrefix;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int r = memory.item(w).prefix;
    if (r > before && r < next) next = r;
  }
  return next;
}

// All prefixes that the block's queries see, one after another.
template <class T, int kDim, class Memory, class Work>
__device__ __forceinline__ void see_prefixes(const Attention<T>& attention, const Memory& memory, int head,
                                             int prefix_tiles, Work& work) {
  const int own = memory.item(warp_index()).prefix;
  for (int r = next_prefix(memory, -1); r != kNoPrefix; r = next_prefix(memory, r)) {
    int piece = 0, length;
    do {
      const Resident there = memory.resident();
      if (there.prefix != r || there.piece != piece) {
        load_prefix<T, kDim>(attention, memory, head, prefix_tiles, r, piece);
      }
      length = memory.resident().length;
      for (int tile = 0; own == r && tile < prefix_tiles; ++tile) {
        const int left = length - (piece * prefix_tiles + tile) * kTileRows;
        if (left <= 0) break;
        work.see(memory.prefix(prefix_tiles, 0, tile), memory.prefix(prefix_tiles, 1, tile), {left, false});
      }
      ++piece;
    } while (piece * prefix_tiles * kTileRows < length);
  }
}

// Own rows; the first tile has been asked for and has arrived.
template <class T, int kDim, class Memory, class Work>
__device__ __forceinline__ void see_own(const Attention<T>& attention, const Memory& memory, int head,
                                        const Extent& extent, Work& work) {
  const Slot own = memory.item(warp_index()).slot;
  const int last = attention.causal ? clamp(warp_index(), own.first - 1, own.last()) : own.last();
  int stage = 0;
  for (int slot = extent.first;; slot += kWarps) {
    const int next = slot + kWarps;
    const int other = Memory::kStages == 2 ? 1 - stage : 0;
    if (Memory::kStages == 2 && next <= extent.last) {
      load_keys<T, kDim>(attention, memory, head, other, next, extent);
    }
    const int end = clamp(last + 1 - slot, 0, kWarps);
    for (int tile = clamp(own.first - slot, 0, kWarps); tile < end; ++tile) {
      const int left = own.length - (slot + tile - own.first) * kTileRows;
      work.see(memory.others(stage, 0, tile), memory.others(stage, 1, tile),
               {left, attention.causal && slot + tile == warp_index()});
    }
    if (next > extent.last) return;
    if (Memory::kStages == 1) {
      sync_threads();
      load_keys<T, kDim>(attention, memory, head, other, next, extent);
    }
    cp_async_wait<0>();
    sync_threads();
    stage = other;
  }
}

// Work is what becomes of a warp's rows: rows[], the tensors it wants tiles of; load(slot, head, memory), what else;
// begin(slot, head, memory), when all has arrived;
// see(keys, values, which of them its rows see); end(memory).
template <class T, int kDim, class Memory, class Work>
__device__ __forceinline__ void pass_over_keys(const Attention<T>& attention, const Memory& memory, int head,
                                               int prefix_tiles, Work& work) {
  const int warp = warp_index();
  const Slot own = memory.item(warp).slot;
  const Extent extent = extent_of<true>(memory, attention.causal);
#pragma unroll
  for (int i = 0; i < Memory::kRows; ++i) {
    load_tile<T, kDim>(memory.rows(warp, i), work.rows[i].head(head), own.begin + own.row, own.count());
  }
  work.load(own, head, memory);
  load_keys<T, kDim>(attention, memory, head, 0, extent.first, extent);
  cp_async_wait<0>();
  sync_threads();
  work.begin(own, head, memory);
  see_prefixes<T, kDim>(attention, memory, head, prefix_tiles, work);
  see_own<T, kDim>(attention, memory, head, extent, work);
  work.end(memory);
}

// Calls run(head) for every group of this block that has rows, and before ahead(head, first row, rows) for this warp's
// slot of the group after. Each warp looks one group up, four are then at hand.
template <class T, class Memory, class Run, class Ahead>
__device__ __forceinline__ void for_groups(const Attention<T>& attention, Memory& memory, Run run, Ahead ahead) {
  const int warp = warp_index(), lane = lane_index(), head = block_y();
  const int groups = attention.groups();
  if (thread_index() == 0) memory.resident() = {-1, 0, 0};
  for (int first = block_x(); first < groups; first += kWarps * grid_x()) {
    const int begin = (first + warp * grid_x()) * kWarps;
    Slot found = find_slot_warp<kWarps>(attention.slots, begin);
    found.first -= begin;
    if (lane < kWarps) memory.item_of(warp, lane) = {found, found.length == 0 ? -1 : prefix_of(attention, found.run)};
    sync_threads();
    for (memory.turn = 0; memory.turn < kWarps; ++memory.turn) {
      if (sizeof(T) == 2 && memory.turn + 1 < kWarps) {
        const Slot& next = memory.item_of(memory.turn + 1, warp).slot;
        ahead(only_now(head), next.begin + next.row, next.count());
      }
      bool any = false;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) any = any || memory.item(w).slot.length != 0;
      if (any) run(head);
      sync_threads();  // the next group takes the place of this one
    }
  }
}

// Zeros, in a head of packed rows, where no history has any: before the first and after the last. A captured graph may
// have room for more rows than a batch has. Blocks share them as they share groups.
template <class T, int kDim>
__device__ __forceinline__ void clear_rows_of_none(const Histories& runs, T* rows, int num_heads) {
  constexpr int kUnits = kDim * static_cast<int>(sizeof(T)) / 16;
  const int64_t before = runs.begin(0), after = runs.begin(runs.batch), count = before + runs.total - after;
  const int64_t stride = static_cast<int64_t>(num_heads) * kDim;
  for (int64_t i = block_x() * kThreads + thread_index(); i < count * kUnits; i += grid_x() * kThreads) {
    const int64_t other = i / kUnits, row = other < before ? other : other - before + after;
    store(reinterpret_cast<Vec16*>(rows + row * stride + block_y() * kDim) + i % kUnits, Vec16{});
  }
}

// Tiles of a prefix that a pass keeps in shared memory, beside `more` bytes: as many as there is room for and as prefixes
// have on average. More would lie idle, and fewer blocks would run at the same time.
template <class Memory>
int prefix_tiles_of(const AttentionArgs& args, int more = 0) {
  if (args.plan.num_prefixes == 0) return 0;
  const int64_t rows = (args.prefix_total + args.plan.num_prefixes - 1) / args.plan.num_prefixes;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  int most = Memory::kMostPrefixTiles;
  while (most > 1 && Memory::bytes(most) + more > max_shared_bytes()) --most;
  return static_cast<int>(clamp<int64_t>(tiles, 1, most));
}

// Blocks of a persistent kernel: x of each head, at most `most`, and y the head.
template <class Kernel>
Grid blocks_by_head(Kernel kernel, int shared_bytes, int64_t num_heads, int64_t most) {
  const int64_t each = clamp<int64_t>(resident_blocks(kernel, kThreads, shared_bytes) / num_heads, 1, most);
  return {static_cast<unsigned>(each), static_cast<unsigned>(num_heads)};
}

// Whether there are kernels for such heads.
inline bool has_kernels(int64_t head_dim, Scalar dtype) {
  const bool number = dtype == Scalar::kFloat || dtype == Scalar::kBfloat16 || dtype == Scalar::kHalf;
  return number && head_dim > 0 && head_dim <= kMostDim && head_dim % 16 == 0;
}

// Calls run(T{}) with the type of a dtype that has kernels.
template <class Run>
auto with_float(Scalar dtype, Run run) {
  switch (dtype) {
    case Scalar::kBfloat16:
      return run(bf16{});
    case Scalar::kHalf:
      return run(fp16{});
    default:
      return run(float{});
  }
}

// Calls run with the head width as a constant; kInvalidValue where it has no kernels.
template <int kDim = 16, class Run>
int with_dim(int64_t dim, Run run) {
  if constexpr (kDim > kMostDim) {
    return kInvalidValue;
  } else {
    return dim == kDim ? run(std::integral_constant<int, kDim>{}) : with_dim<kDim + 16>(dim, run);
  }
}

}  // namespace pcl
