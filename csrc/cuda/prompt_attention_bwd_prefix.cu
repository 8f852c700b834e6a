// Gradients of the keys and values of prefixes. A block owns 16 rows of a prefix, one head, and one of equal shares of
// all rows that see the prefix; its warps take a part of the share each, 16 queries at a time, every warp by itself.
// What they find is added in the order of the warps, then of the shares. There are more shares than one only as long as
// the GPU is not full without: what is kept between the two kernels is bounded by the blocks that run at the same time.
#include "attention_grads.h"

namespace pcl {

namespace {

template <class T, int kDim>
struct PrefixMemory {
  static constexpr int kTile = Rows<T, kDim>::kTileBytes;
  static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kNumbersBytes = kTileRows * static_cast<int>(sizeof(RowNumbers));
  static constexpr int kStage = 3 * kTile + kNumbersBytes;
  static constexpr int kSums = kTileRows * kDim * static_cast<int>(sizeof(float));  // of one warp
  static constexpr int kWarpBytes = kStages * kStage > kSums ? kStages * kStage : kSums;
  static constexpr int kBytes = 2 * kTile + kWarps * kWarpBytes;

  unsigned char* base;

  __device__ __forceinline__ unsigned char* keys(int which) const { return base + which * kTile; }
  __device__ __forceinline__ unsigned char* warp(int w) const { return base + 2 * kTile + w * kWarpBytes; }
  __device__ __forceinline__ unsigned char* rows(int stage, int which) const {
    return warp(warp_index()) + stage * kStage + which * kTile;
  }
  __device__ __forceinline__ RowNumbers* numbers(int stage) const {
    return reinterpret_cast<RowNumbers*>(rows(stage, 3));
  }
};

// 16 rows after 16 rows of one member after another.
struct Walk {
  Histories histories;
  const int64_t* members;
  int64_t member, end, left;  // tiles left
  int64_t begin, length, row;

  __device__ __forceinline__ void enter() {
    const int64_t history = clamp<int64_t>(members[member], 0, histories.batch - 1);
    begin = histories.begin(history);
    length = histories.end(history) - begin;
  }

  // Past members without rows.
  __device__ __forceinline__ void settle() {
    while (left > 0 && row >= length) {
      if (++member >= end) {
        left = 0;
        return;
      }
      enter();
      row = 0;
    }
  }

  __device__ __forceinline__ int count() const { return static_cast<int>(clamp<int64_t>(length - row, 0, kTileRows)); }

  __device__ __forceinline__ void advance() {
    --left;
    row += kTileRows;
    settle();
  }
};

// The first i of low .. high - 1 for which is_after(i), high when there is none; false comes before true. A warp
// searches together: what it reads on the way is far, and 32 at once take as long as one.
template <class IsAfter>
__device__ __forceinline__ int64_t first_after(int64_t low, int64_t high, IsAfter is_after) {
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + lane_index() * step;
    const int count = count_bits(ballot(probe < high && !is_after(probe < high ? probe : low)));  // before it
    const int64_t end = low + count * step;
    high = count == 0 ? low : high < end ? high : end;
    low = count == 0 ? low : end - step + 1;
  }
  return low;
}

// All members that see a prefix, and none of their rows yet.
template <class T>
__device__ __forceinline__ Walk members_of(const Attention<T>& attention, const AttentionMembers& members, int prefix) {
  const Histories& histories = attention.slots.runs;
  const int64_t begin = clamp<int64_t>(members.begins[prefix], 0, histories.batch);
  const int64_t end = clamp<int64_t>(members.begins[prefix + 1], begin, histories.batch);
  return {histories, members.members, begin, end, 0, 0, 0, 0};
}

// This warp's part of a share of the rows that see a prefix, of all members that do, of which there are some.
template <class T>
__device__ __forceinline__ Walk part_of(const Attention<T>& attention, const int64_t* slots, Walk walk, int share,
                                        int shares) {
  const int64_t base = walk.member == 0 ? 0 : slots[walk.member - 1];
  const int64_t all = clamp<int64_t>(slots[walk.end - 1] - base, 0, attention.slots.count());
  const int64_t parts = static_cast<int64_t>(shares) * kWarps,
                part = static_cast<int64_t>(share) * kWarps + warp_index();
  const int64_t first = all * part / parts;
  walk.left = all * (part + 1) / parts - first;
  if (walk.left == 0) return walk;
  const int64_t begin = walk.member;
  walk.member = first_after(begin, walk.end - 1, [=](int64_t m) { return slots[m] - base > first; });
  walk.enter();
  const int64_t before = walk.member == begin ? 0 : slots[walk.member - 1] - base;
  walk.row = clamp<int64_t>(first - before, 0, attention.slots.count()) * kTileRows;
  walk.settle();
  return walk;
}

// The next 16 queries; where their numbers are to be made, what they are made of.
template <class T, int kDim>
__device__ __forceinline__ void load_part(const AttentionBackward<T>& backward, const PrefixMemory<T, kDim>& memory,
                                          int head, int stage, const Walk& walk) {
  if (walk.left > 0) {
    const int64_t row = walk.begin + walk.row;
    const int num_heads = backward.attention.num_heads, count = walk.count();
    load_tile<T, kDim>(memory.rows(stage, 0), backward.attention.q.head(head), row, count);
    load_tile<T, kDim>(memory.rows(stage, 1), backward.grad_out.head(head), row, count);
    if (backward.numbers != nullptr) {
      load_numbers(memory.numbers(stage), backward.numbers, num_heads, head, row, count);
    } else {
      load_tile<T, kDim>(memory.rows(stage, 2), backward.out.head(head), row, count);
      load_stats(memory.numbers(stage), backward.stats, num_heads, head, row, count);
    }
  }
  cp_async_commit();
}

template <class T, int kDim>
__device__ __forceinline__ void see_part(const AttentionBackward<T>& backward, const KeyGrads<T>& grads,
                                         const PrefixMemory<T, kDim>& memory, int head, Walk walk,
                                         KeySums<T, kDim>& sums) {
  constexpr int kStages = PrefixMemory<T, kDim>::kStages;
  HeldTile<T, kDim> keys;
  HeldValues<T, kDim> values;
  keys.hold(memory.keys(0));
  values.hold(memory.keys(1));
  int stage = 0;
  if (kStages == 2) load_part(backward, memory, head, 0, walk);
  while (walk.left > 0) {
    if (kStages == 2) {
      walk.advance();
      load_part(backward, memory, head, 1 - stage, walk);
      cp_async_wait<1>();
    } else {
      load_part(backward, memory, head, 0, walk);
      walk.advance();
      cp_async_wait<0>();
    }
    sync_warp();
    if (backward.numbers == nullptr) {
      make_numbers<T, kDim>(memory.numbers(stage), memory.rows(stage, 1), memory.rows(stage, 2),
                            backward.attention.scale);
      sync_warp();
    }
    const unsigned char *q = memory.rows(stage, 0), *grad_out = memory.rows(stage, 1);
    const KeyBlocks<T, kDim> blocks(keys, values, q, grad_out, memory.numbers(stage), false, backward.attention.scale);
    sums.see(blocks, q, grad_out, grads);
    sync_warp();
    stage = kStages - 1 - stage;
  }
  cp_async_wait<0>();
}

// Adds the warps' sums up, in their order, in those of warp 0.
template <class T, int kDim>
__device__ __forceinline__ void add_warps(const PrefixMemory<T, kDim>& memory, Wide<kDim>& wide) {
  sync_threads();
  auto* own = reinterpret_cast<float*>(memory.warp(warp_index())) + lane_index();
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(j * 4 + i) * kWarp] = wide.sums[j][i];
  }
  sync_threads();
  for (int w = 1; w < kWarps && warp_index() == 0; ++w) {
    const auto* more = reinterpret_cast<const float*>(memory.warp(w)) + lane_index();
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) wide.sums[j][i] += more[(j * 4 + i) * kWarp];
    }
  }
  sync_threads();
}

// partial [slots of prefixes, H, shares, k and v, 16 rows of kDim as lanes hold them]; null with one share.
template <class T, int kDim>
__device__ __forceinline__ void write_sums(const PrefixMemory<T, kDim>& memory, const Wide<kDim>& wide, int which,
                                           const Slot& slot, int head, int num_heads, float* partial, T* grad) {
  if (partial != nullptr) {
    float* to = partial + (static_cast<int64_t>(block_x()) * 2 + which) * kTileRows * kDim + lane_index();
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(j * 4 + i) * kWarp] = wide.sums[j][i];
    }
    return;
  }
  const int64_t stride = static_cast<int64_t>(num_heads) * kDim;
  T* to = grad + (slot.begin + slot.row) * stride + head * kDim;
  store_wide<T, kDim>(wide, memory.keys(which), to, stride, slot.count());
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, (sizeof(T) == 2 && kDim <= 64 ? 3 : 2))
    grad_prefix_kernel(AttentionBackward<T> backward, KeyGrads<T> grads, AttentionMembers members, int shares,
                       float* partial) {
  const PrefixMemory<T, kDim> memory{shared_memory()};
  const Attention<T>& attention = backward.attention;
  const int share = block_x() % shares, head = block_x() / shares % attention.num_heads;
  const Slot slot = find_slot_warp(attention.prefixes, block_x() / shares / attention.num_heads);
  if (slot.length == 0) return;
  KeySums<T, kDim> sums;
  sums.clear();
  const Walk all = members_of(attention, members, slot.run);
  if (all.member < all.end) {
    if (warp_index() < 2) {
      const Head<T> from = (warp_index() == 0 ? attention.prefix_k : attention.prefix_v).head(head);
      load_tile<T, kDim>(memory.keys(warp_index()), from, slot.begin + slot.row, slot.count());
    }
    cp_async_commit();
    const Walk part = part_of(attention, members.slots, all, share, shares);
    cp_async_wait<0>();
    sync_threads();
    see_part(backward, grads, memory, head, part, sums);
  }
  if (grads.k != nullptr) {
    add_warps(memory, sums.k);
    if (warp_index() == 0) write_sums(memory, sums.k, 0, slot, head, attention.num_heads, partial, grads.k);
  }
  if (grads.v != nullptr) {
    add_warps(memory, sums.v);
    if (warp_index() == 0) write_sums(memory, sums.v, 1, slot, head, attention.num_heads, partial, grads.v);
  }
}

// A block adds up the shares of 32 numbers, of k for y 0 and of v for y 1: each warp every kWarps-th share, then the
// warps' sums in their order.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    add_shares_kernel(Slots prefixes, int num_heads, const float* partial, int shares, KeyGrads<T> grads) {
  constexpr int kNumbersEach = kTileRows * kDim, kBlocksEach = kNumbersEach / kWarp, kUnderWay = 16;
  T* const grad = block_y() == 0 ? grads.k : grads.v;
  if (grad == nullptr) return;
  const int slot_head = block_x() / kBlocksEach, first = block_x() % kBlocksEach, lane = lane_index();
  const float* from = partial + (static_cast<int64_t>(slot_head) * shares * 2 + block_y()) * kNumbersEach;
  from += first * kWarp + lane;
  double sum = 0;
  for (int s = warp_index(); s < shares; s += kUnderWay * kWarps) {
    float found[kUnderWay];
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      const int share = s + i * kWarps;
      found[i] = share < shares ? from[static_cast<int64_t>(share) * 2 * kNumbersEach] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) sum += found[i];
  }
  auto* const sums = reinterpret_cast<double*>(shared_memory());
  sums[thread_index()] = sum;
  sync_threads();
  if (warp_index() != 0) return;
  const Slot slot = find_slot_warp(prefixes, slot_head / num_heads);
  const int i = first % 4, row = lane / 4 + (i & 2) * 4;
  if (row >= slot.count()) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane];
  const int column = first / 4 * 8 + lane % 4 * 2 + (i & 1);
  T* to = grad + ((slot.begin + slot.row + row) * num_heads + slot_head % num_heads) * kDim + column;
  if constexpr (sizeof(T) == 2) {
    *to = round_to<T>(static_cast<float>(sum));
  } else {
    *to = static_cast<float>(sum);
  }
}

// In how many shares the rows that see a prefix are cut: prefixes are taken to be of one length, the slots that are
// empty then cost nothing.
template <class T, int kDim>
int shares_of(const AttentionArgs& args) {
  constexpr int kFewest = 2 * kWarps;  // slots of queries worth a share
  const int64_t rows = (args.prefix_total + args.plan.num_prefixes - 1) / args.plan.num_prefixes;
  const int64_t owned = args.plan.num_prefixes * ((rows + kTileRows - 1) / kTileRows) * args.num_heads;
  const int64_t room = resident_blocks(grad_prefix_kernel<T, kDim>, kThreads, PrefixMemory<T, kDim>::kBytes) / owned;
  const int64_t most = (args.total / kTileRows + args.plan.batch) / kFewest;
  return static_cast<int>(clamp<int64_t>(room < most ? room : most, 1, 1 << 16));
}

bool has_prefix(const AttentionArgs& args) { return args.plan.num_prefixes > 0 && args.prefix_total > 0; }

}  // namespace

template <class T>
int64_t prefix_partial_bytes(const AttentionArgs& args) {
  if (!has_prefix(args)) return 0;
  int64_t bytes = 0;
  with_dim(args.head_dim, [&](auto dim) {
    const int64_t owned = attention_of<T>(args).prefixes.count() * args.num_heads;
    const int shares = shares_of<T, dim()>(args);
    bytes = shares == 1 ? 0 : owned * shares * 2 * kTileRows * dim() * static_cast<int64_t>(sizeof(float));
    return 0;
  });
  return bytes;
}

template <class T>
int prefix_least_shared(int64_t head_dim) {
  return with_dim(head_dim, [](auto dim) { return PrefixMemory<T, dim()>::kBytes; });
}

template <class T>
int grad_prefix_keys(const AttentionArgs& args, const AttentionBackward<T>& backward, const KeyGrads<T>& grads,
                     const AttentionMembers& members, float* partial, void* stream) {
  if (!has_prefix(args)) return 0;
  return with_dim(args.head_dim, [&](auto dim) -> int {
    constexpr int kBytes = PrefixMemory<T, dim()>::kBytes;
    const int shares = shares_of<T, dim()>(args);
    const Slots& prefixes = backward.attention.prefixes;
    const auto owned = static_cast<unsigned>(prefixes.count() * args.num_heads);
    float* const sums = shares == 1 ? nullptr : partial;
    const int error = launch(grad_prefix_kernel<T, dim()>, {owned * shares}, kThreads, kBytes, stream, backward, grads,
                             members, shares, sums);
    if (error != 0 || shares == 1) return error;
    return add_prefix_shares<T>(args, grads, prefixes.count(), sums, shares, stream);
  });
}

template <class T>
int add_prefix_shares(const AttentionArgs& args, const KeyGrads<T>& grads, int64_t slots, const float* partial,
                      int shares, void* stream) {
  return with_dim(args.head_dim, [&](auto dim) {
    const auto blocks = static_cast<unsigned>(slots * args.num_heads * (kTileRows * dim() / kWarp));
    return launch(add_shares_kernel<T, dim()>, {blocks, 2}, kThreads, kThreads * static_cast<int>(sizeof(double)),
                  stream, attention_of<T>(args).prefixes, static_cast<int>(args.num_heads), partial, shares, grads);
  });
}

template int64_t prefix_partial_bytes<bf16>(const AttentionArgs&);
template int64_t prefix_partial_bytes<fp16>(const AttentionArgs&);
template int64_t prefix_partial_bytes<float>(const AttentionArgs&);
template int prefix_least_shared<bf16>(int64_t);
template int prefix_least_shared<fp16>(int64_t);
template int prefix_least_shared<float>(int64_t);
template int grad_prefix_keys<bf16>(const AttentionArgs&, const AttentionBackward<bf16>&, const KeyGrads<bf16>&,
                                    const AttentionMembers&, float*, void*);
template int grad_prefix_keys<fp16>(const AttentionArgs&, const AttentionBackward<fp16>&, const KeyGrads<fp16>&,
                                    const AttentionMembers&, float*, void*);
template int grad_prefix_keys<float>(const AttentionArgs&, const AttentionBackward<float>&, const KeyGrads<float>&,
                                     const AttentionMembers&, float*, void*);

template int add_prefix_shares<bf16>(const AttentionArgs&, const KeyGrads<bf16>&, int64_t, const float*, int, void*);
template int add_prefix_shares<fp16>(const AttentionArgs&, const KeyGrads<fp16>&, int64_t, const float*, int, void*);
template int add_prefix_shares<float>(const AttentionArgs&, const KeyGrads<float>&, int64_t, const float*, int, void*);

}  // namespace pcl
