// Gradients of the position rows and of the prompts: of every table row, the sum of the gradients of all packed rows
// that read it. Both are rows at the same distance from the ends of their histories: over all histories, or over those
// that point at a prompt.
#include "embed.h"
#include "numbers.h"
#include "rows.h"

namespace pcl {

namespace {

constexpr int kSumThreads = 256;
constexpr int kHistoriesAtOnce = 8;  // rows a thread has under way

// One table: groups of rows [num_groups, rows, D]; group null: all histories are in group 0.
struct Table {
  const int64_t* group;
  int64_t num_groups, rows;
  bool newest_last;  // row rows - 1 belongs to the newest event, distance 0

  __device__ __forceinline__ int64_t row_of(int64_t distance) const {
    return newest_last ? rows - 1 - distance : distance;
  }
};

// A block sums a tile of rows_a_tile distances and a run of units, for one group, over one chunk of the histories.
struct Tiles {
  RowSplit split;
  int64_t row_tiles, column_tiles, chunk, chunks;

  int64_t blocks(const Table& table) const { return table.num_groups * row_tiles * column_tiles; }
  int64_t flags(const Table& table) const { return chunks * table.num_groups * row_tiles; }
};

Tiles make_tiles(const Table& table, const EmbedShape& shape, int64_t units) {
  constexpr int64_t kBlocks = 1024, kFewest = 64;  // blocks that fill a GPU; histories a chunk
  Tiles tiles{RowSplit::of(units), 0, 0, 0, 0};
  const int64_t rows = tiles.split.rows_a_pass(), columns = int64_t{1} << tiles.split.log2_lanes;
  tiles.row_tiles = (table.rows + rows - 1) / rows;
  tiles.column_tiles = (units + columns - 1) / columns;
  const int64_t wanted = kBlocks / tiles.blocks(table), most = (shape.batch + kFewest - 1) / kFewest;
  const int64_t chunks = wanted < most ? wanted : most;
  tiles.chunk = chunks < 2 ? shape.batch : (shape.batch + chunks - 1) / chunks;
  tiles.chunks = tiles.chunk == 0 ? 1 : (shape.batch + tiles.chunk - 1) / tiles.chunk;
  return tiles;
}

// Histories of one run that reach the tile, in their order.
struct Reaching {
  int64_t end[kSumThreads], length[kSumThreads];
  int warp_counts[kSumThreads / kWarp];
};

// Those of `begin` .. begin + kSumThreads - 1 before `stop`; how many. A thread looks at one history.
__device__ __forceinline__ int find_reaching(const Histories& histories, const Table& table, int64_t group,
                                             int64_t distance, int64_t begin, int64_t stop, Reaching& reaching) {
  const int64_t b = begin + thread_index();
  int64_t end = 0, length = 0;
  if (b < stop && (table.group == nullptr || table.group[b] == group)) {
    end = histories.end(b);
    length = end - histories.begin(b);
  }
  const unsigned kept = ballot(length > distance);
  if (lane_index() == 0) reaching.warp_counts[warp_index()] = count_bits(kept);
  sync_threads();
  int before = 0, all = 0;
  for (int w = 0; w < kSumThreads / kWarp; ++w) {
    if (w < warp_index()) before += reaching.warp_counts[w];
    all += reaching.warp_counts[w];
  }
  if (length > distance) {
    const int place = before + count_bits(kept & ((1u << lane_index()) - 1));
    reaching.end[place] = end;
    reaching.length[place] = length;
  }
  sync_threads();
  return all;
}

// partial [chunks, num_groups, rows, D]; a tile's rows are written only where its flag says so.
template <class T, class Unit>
__global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(Histories histories, const T* grad_out, int64_t grad_stride, Table table, Tiles tiles, int64_t dim,
                    Sum<T>* partial, int* flags) {
  constexpr int kWidth = kNumbers<T, Unit>;
  auto& reaching = *reinterpret_cast<Reaching*>(shared_memory());
  const int64_t column_tile = block_x() % tiles.column_tiles, tile = block_x() / tiles.column_tiles;
  const int64_t row_tile = tile % tiles.row_tiles, group = tile / tiles.row_tiles, chunk = block_y();
  const int lanes = 1 << tiles.split.log2_lanes;
  const int64_t nearest = row_tile * tiles.split.rows_a_pass();
  const int64_t distance = nearest + (thread_index() >> tiles.split.log2_lanes);
  const int64_t u = column_tile * lanes + (thread_index() & (lanes - 1));
  const bool owns = distance < table.rows && u < tiles.split.units;

  Sum<T> sum[kWidth] = {};
  int found = 0;
  const int64_t stop =
      chunk * tiles.chunk + tiles.chunk < histories.batch ? chunk * tiles.chunk + tiles.chunk : histories.batch;
  for (int64_t begin = chunk * tiles.chunk; begin < stop; begin += kSumThreads) {
    const int count = find_reaching(histories, table, group, nearest, begin, stop, reaching);
    found += count;
    for (int i = 0; owns && i < count; i += kHistoriesAtOnce) {
      Unit rows[kHistoriesAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kHistoriesAtOnce; ++j) {
        if (i + j >= count || distance >= reaching.length[i + j]) continue;
        const T* row = grad_out + (reaching.end[i + j] - 1 - distance) * grad_stride;
        rows[j] = load_once(reinterpret_cast<const Unit*>(row) + u);
      }
#pragma unroll
      for (int j = 0; j < kHistoriesAtOnce; ++j) {
        Sum<T> row[kWidth];
        widen<T>(rows[j], row);
#pragma unroll
        for (int n = 0; n < kWidth; ++n) sum[n] += row[n];
      }
    }
    sync_threads();  // before the next histories take their place
  }
  const int64_t flag = (chunk * table.num_groups + group) * tiles.row_tiles + row_tile;
  if (thread_index() == 0 && column_tile == 0) flags[flag] = found > 0;
  if (!owns || found == 0) return;
  Sum<T>* to = partial + ((chunk * table.num_groups + group) * table.rows + distance) * dim + u * kWidth;
  if constexpr (std::is_same_v<Unit, Vec16>) {
    constexpr int kWords = kWidth * sizeof(Sum<T>) / sizeof(Vec16);
    Vec16 words[kWords];
    memcpy(words, sum, sizeof(sum));
#pragma unroll
    for (int i = 0; i < kWords; ++i) store(reinterpret_cast<Vec16*>(to) + i, words[i]);
  } else {
    to[0] = sum[0];
  }
}

// A thread adds up the chunks of one number.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    add_chunks_kernel(const Sum<T>* partial, const int* flags, Table table, Tiles tiles, int64_t dim, T* grad) {
  const int64_t size = table.num_groups * table.rows * dim;
  const int64_t i = static_cast<int64_t>(block_x()) * kSumThreads + thread_index();
  if (i >= size) return;
  const int64_t row = i / dim, group = row / table.rows, distance = row % table.rows;
  const int64_t flag = group * tiles.row_tiles + distance / tiles.split.rows_a_pass();
  double sum = 0;
  for (int64_t c = 0; c < tiles.chunks; ++c) {
    if (flags[c * table.num_groups * tiles.row_tiles + flag] != 0) sum += partial[c * size + i];
  }
  const Sum<T> total[1] = {static_cast<Sum<T>>(sum)};
  grad[(group * table.rows + table.row_of(distance)) * dim + i % dim] = narrow<T, T>(total);
}

// 16 bytes a unit where every row of the gradient allows it.
template <class T>
bool is_wide(const void* grad_out, const EmbedShape& shape) {
  return aligned16(grad_out) && (shape.dim | shape.grad_stride) * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

int64_t numbers_of(const Table& table, const EmbedShape& shape) { return table.num_groups * table.rows * shape.dim; }

template <class T>
int64_t workspace_bytes(const Table& table, const EmbedShape& shape, int64_t units) {
  if (numbers_of(table, shape) == 0) return 0;
  const Tiles tiles = make_tiles(table, shape, units);
  return tiles.chunks * numbers_of(table, shape) * sizeof(Sum<T>) + tiles.flags(table) * sizeof(int);
}

template <class T>
int sum_rows(const Table& table, const EmbedRows& rows, const void* grad_out, void* workspace, void* grad,
             const EmbedShape& shape, void* stream) {
  const int64_t numbers = numbers_of(table, shape);
  if (numbers == 0) return 0;
  const bool wide = is_wide<T>(grad_out, shape);
  const Tiles tiles = make_tiles(table, shape, wide ? shape.dim / kNumbers<T, Vec16> : shape.dim);
  const Histories histories{rows.offsets, shape.batch, shape.total};
  auto* partial = static_cast<Sum<T>*>(workspace);
  auto* flags = reinterpret_cast<int*>(partial + tiles.chunks * numbers);
  const auto kernel = wide ? sum_rows_kernel<T, Vec16> : sum_rows_kernel<T, T>;
  const Grid grid{static_cast<unsigned>(tiles.blocks(table)), static_cast<unsigned>(tiles.chunks)};
  const int error = launch(kernel, grid, kSumThreads, sizeof(Reaching), stream, histories,
                           static_cast<const T*>(grad_out), shape.grad_stride, table, tiles, shape.dim, partial, flags);
  if (error != 0) return error;
  return launch(add_chunks_kernel<T>, {static_cast<unsigned>((numbers + kSumThreads - 1) / kSumThreads)}, kSumThreads,
                0, stream, partial, flags, table, tiles, shape.dim, static_cast<T*>(grad));
}

Table position_table(const EmbedShape& shape) { return {nullptr, 1, shape.max_len < 0 ? 0 : shape.max_len, false}; }

Table prompt_table(const EmbedRows& rows, const EmbedShape& shape) {
  return {rows.prompt_index, shape.num_prompts, shape.prompt_len, true};
}

}  // namespace

int64_t embed_bwd_cuda_bytes(const EmbedShape& shape, bool position, bool prompt, Scalar dtype) {
  int64_t most = 0;
  with_type(dtype, [&](auto number) {
    using T = decltype(number);
    const auto need = [&](const Table& table, int64_t units) {
      const int64_t bytes = workspace_bytes<T>(table, shape, units);
      most = bytes > most ? bytes : most;
    };
    for (const int64_t units : {shape.dim, shape.dim / kNumbers<T, Vec16>}) {
      if (units > 0 && position) need(position_table(shape), units);
      if (units > 0 && prompt) need(prompt_table({}, shape), units);
    }
    return 0;
  });
  return most;
}

int embed_bwd_cuda(const EmbedRows& rows, const void* grad_out, void* workspace, void* grad_position, void* grad_prompt,
                   const EmbedShape& shape, Scalar dtype, void* stream) {
  return with_type(dtype, [&](auto number) {
    using T = decltype(number);
    int error = 0;
    if (grad_position != nullptr) {
      error = sum_rows<T>(position_table(shape), rows, grad_out, workspace, grad_position, shape, stream);
    }
    if (grad_prompt != nullptr && error == 0) {
      error = sum_rows<T>(prompt_table(rows, shape), rows, grad_out, workspace, grad_prompt, shape, stream);
    }
    return error;
  });
}

}  // namespace pcl
