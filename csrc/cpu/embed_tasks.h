// What one instruction set's copy of embed offers: the work of one task. The driver shares tasks out.
#pragma once

#include "../embed.h"

namespace pcl {

struct EmbedTables {
  const void *table, *position, *prompt;
  void* out;
};

struct EmbedGrads {
  const void* grad_out;
  void *position, *prompt, *table;  // null where not asked for
};

// Rows first .. last - 1 of a task: packed rows, distances from the end of a history, or rows of the table.
struct EmbedTask {
  int64_t first, last;
};

// Packed rows by the item they hold: those of item i are order[begin[i]] .. order[begin[i + 1] - 1], in their order.
struct EmbedSorted {
  const int64_t *begin, *order;
};

struct EmbedKernels {
  // False, and nothing read through it, where an id of the task's rows is outside the table.
  bool (*fwd)(const EmbedRows& rows, const EmbedTables& tables, const EmbedShape& shape, const EmbedTask& task);
  // Whether all ids of the rows lie in the table.
  bool (*check)(const EmbedRows& rows, const EmbedShape& shape, const EmbedTask& task);
  // Position and prompt rows of some distances. sums: distance_sums(...) zeros.
  void (*bwd_distances)(const EmbedRows& rows, const EmbedGrads& grads, const EmbedShape& shape, const EmbedTask& task,
                        double* sums);
  // Rows of the table's gradient. sums: dim elements.
  void (*bwd_table)(const EmbedSorted& sorted, const EmbedGrads& grads, const EmbedShape& shape, const EmbedTask& task,
                    double* sums);
};

EmbedKernels embed_kernels_baseline(Scalar dtype);
EmbedKernels embed_kernels_avx2(Scalar dtype);
EmbedKernels embed_kernels_avx512(Scalar dtype);

// How many of a task's distances have a prompt row whose gradient is asked for.
static inline int64_t prompt_distances(const EmbedShape& shape, const EmbedGrads& grads, const EmbedTask& task) {
  if (!grads.prompt || task.first >= shape.prompt_len) return 0;
  return (task.last < shape.prompt_len ? task.last : shape.prompt_len) - task.first;
}

// One row of sums a distance for the positions, one a distance and prompt for the prompts.
static inline int64_t distance_sums(const EmbedShape& shape, const EmbedGrads& grads, const EmbedTask& task) {
  return (task.last - task.first + shape.num_prompts * prompt_distances(shape, grads, task)) * shape.dim;
}

}  // namespace pcl
