#include "embed.h"
#include "numbers.h"
#include "rows.h"

namespace pcl {

namespace {

// Where the rows that are added up begin, in numbers from the start of their tables; -1 for none.
struct Sources {
  int64_t table, position, prompt;
};

template <class T>
struct Tables {
  const T *table, *position, *prompt;
};

__device__ __forceinline__ int64_t item_at(const EmbedRows& rows, int64_t t, int64_t table_rows) {
  const int64_t item =
      rows.wide_items ? static_cast<const int64_t*>(rows.items)[t] : static_cast<const int32_t*>(rows.items)[t];
  return item >= 0 && item < table_rows ? item : 0;
}

// r: steps before the end of history b, which is -1 where there is none.
__device__ __forceinline__ int64_t prompt_row(const EmbedRows& rows, const EmbedShape& shape, int64_t b, int64_t r) {
  if (b < 0 || r >= shape.prompt_len) return -1;
  const int64_t which = rows.prompt_index == nullptr ? 0 : rows.prompt_index[b];
  return which < 0 || which >= shape.num_prompts ? -1 : which * shape.prompt_len + shape.prompt_len - 1 - r;
}

// Times rows_a_block rows whose sources a block looks up together: 128 rows, where rows are wide.
__host__ __device__ inline int rounds_of(const RowSplit& split) {
  const int rounds = 128 / split.rows_a_block();
  return rounds > 1 ? rounds : 1;
}

// The sums of rows_a_block rows from `begin` on, or up to the last; a thread has kRowsEach of them under way.
template <class T, class Unit>
__device__ __forceinline__ void add_up(const Sources* sources, const Tables<T>& from, T* out, const EmbedShape& shape,
                                       const RowSplit& split, int64_t begin) {
  constexpr int kWidth = kNumbers<T, Unit>;
  const auto at = [](const T* rows, int64_t place, int64_t u) {
    return place < 0 ? Unit{} : load(reinterpret_cast<const Unit*>(rows + place) + u);
  };
  const int lanes = 1 << split.log2_lanes, first = thread_index() >> split.log2_lanes;
  for (int64_t u = thread_index() & (lanes - 1); u < split.units; u += lanes) {
    Unit parts[3][kRowsEach] = {};
#pragma unroll
    for (int j = 0; j < kRowsEach; ++j) {
      const int i = first + j * split.rows_a_pass();
      if (begin + i >= shape.total) continue;
      parts[0][j] = at(from.table, sources[i].table, u);
      parts[1][j] = at(from.position, sources[i].position, u);
      parts[2][j] = at(from.prompt, sources[i].prompt, u);
    }
#pragma unroll
    for (int j = 0; j < kRowsEach; ++j) {
      const int i = first + j * split.rows_a_pass();
      if (begin + i >= shape.total) continue;
      Sum<T> sum[kWidth], part[kWidth];
      widen<T>(parts[0][j], sum);
#pragma unroll
      for (int p = 1; p < 3; ++p) {
        if (p == 2 && sources[i].prompt < 0) continue;  // most rows
        widen<T>(parts[p][j], part);
#pragma unroll
        for (int n = 0; n < kWidth; ++n) sum[n] += part[n];
      }
      store_once(reinterpret_cast<Unit*>(out + (begin + i) * shape.dim) + u, narrow<T, Unit>(sum));
    }
  }
}

// A block owns rounds_of(split) * rows_a_block packed rows: it finds what each is the sum of, then adds up.
template <class T, class Unit>
__global__ void __launch_bounds__(kRowThreads, 3)
    embed_fwd_kernel(EmbedRows rows, Histories histories, Tables<T> from, T* out, EmbedShape shape, RowSplit split) {
  auto* first_last = reinterpret_cast<int64_t*>(shared_memory());
  auto* sources = reinterpret_cast<Sources*>(first_last + 2);
  const int rounds = rounds_of(split), rows_a_block = rounds * split.rows_a_block();
  for_own_rows(histories, rows_a_block, first_last, [&](int i, int64_t t, int64_t b) {
    const int64_t r = b < 0 ? 0 : clamp<int64_t>(histories.end(b) - 1 - t, 0, shape.total);
    const int64_t position = r < shape.max_len ? r : shape.max_len - 1;  // -1 without any
    const int64_t prompt = prompt_row(rows, shape, b, r);
    sources[i] = {item_at(rows, t, shape.table_rows) * shape.table_stride,
                  from.position == nullptr || position < 0 ? -1 : position * shape.position_stride,
                  from.prompt == nullptr || prompt < 0 ? -1 : prompt * shape.dim};
  });
  for (int round = 0; round < rounds; ++round) {
    const int first = round * split.rows_a_block();
    add_up<T, Unit>(sources + first, from, out, shape, split, static_cast<int64_t>(block_x()) * rows_a_block + first);
  }
}

}  // namespace

int embed_fwd_cuda(const EmbedRows& rows, const void* table, const void* position, const void* prompt, void* out,
                   const EmbedShape& shape, Scalar dtype, void* stream) {
  if (shape.total == 0 || shape.dim == 0) return 0;
  const Histories histories{rows.offsets, shape.batch, shape.total};
  return with_type(dtype, [&](auto number) {
    using T = decltype(number);
    const auto run = [&](auto unit) {
      using Unit = decltype(unit);
      const RowSplit split = RowSplit::of(shape.dim / kNumbers<T, Unit>);
      const int rows_a_block = rounds_of(split) * split.rows_a_block();
      const int shared_bytes = 2 * sizeof(int64_t) + rows_a_block * sizeof(Sources);
      const Tables<T> from{static_cast<const T*>(table), static_cast<const T*>(position),
                           static_cast<const T*>(prompt)};
      return launch(embed_fwd_kernel<T, Unit>, {static_cast<unsigned>((shape.total + rows_a_block - 1) / rows_a_block)},
                    kRowThreads, shared_bytes, stream, rows, histories, from, static_cast<T*>(out), shape, split);
    };
    const int64_t size = sizeof(T);
    const bool wide = aligned16(table, position, prompt, out) &&
                      (shape.dim | shape.table_stride | shape.position_stride) * size % 16 == 0;
    return wide ? run(Vec16{}) : run(T{});
  });
}

}  // namespace pcl
