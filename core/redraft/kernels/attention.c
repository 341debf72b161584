/* Paged attention: reads keys and values where they lie; see pool.h for what all kernels promise.
 *
 * A task is up to QUERIES_PER_ITEM queries of one kv head: a row for each query and head that reads these keys and
 * values. They lie in memory far longer than the rows do in the cache, so all rows go over each run of them while it is
 * near. The context is taken in spans of fixed positions, each with a softmax of its own, and the spans are merged in
 * order: what a row gets depends on neither its neighbours nor on whether one thread or several had its spans. */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "vector.h"

enum {
  SPAN = 128,
  SCORES = SPAN + 8, /* of a row over a span, with room for whole vectors */
  WIDTH = 64,        /* of the values that a row keeps in registers */
  TASKS_PER_THREAD = 4, /* from here on tasks are not cut by spans */
  MOST_PARTS = 1 << 25, /* bytes; where more would be needed neither */
};

/* Queries and the positions that each of them sees. */
typedef struct {
  const int32_t *table;
  const float *keys, *values;
  long first_token, queries, start, first_head, group, rows;
} task;

/* What spans make of the rows: the largest score, the sum of exp(score - largest) and of the values weighted by it. */
typedef struct {
  float *highest, *total; /* [rows]; total 0: nothing yet */
  float *mixed;           /* [rows, head_dim] */
} weighted;

INLINE task task_of(const attention_job *job, long index) {
  const int32_t *item = job->items + index / job->kv_heads * 4;
  long kv_head = index % job->kv_heads, group = job->heads / job->kv_heads;
  long place = kv_head * job->num_slots * job->head_dim;
  return (task){.table = job->blocks + item[3] * job->table_width, .keys = job->keys + place,
                .values = job->values + place, .first_token = item[0], .queries = item[1], .start = item[2],
                .first_head = kv_head * group, .group = group, .rows = item[1] * group};
}

/* The spans [*first, *end) of which the task sees anything. */
INLINE void spans_of(const attention_job *job, const task *t, long *first, long *end) {
  *first = job->window > 0 ? larger(t->start + 1 - job->window, 0) / SPAN : 0;
  *end = (t->start + t->queries - 1) / SPAN + 1;
}

/* The positions [*first, *end) of a span that a query sees. */
INLINE void seen(const attention_job *job, const task *t, long query, long span, long *first, long *end) {
  long own = t->start + query + 1;
  *first = larger(span * SPAN, job->window > 0 ? own - job->window : 0);
  *end = smaller((span + 1) * SPAN, own);
}

INLINE weighted weighted_at(float *memory, long rows) {
  return (weighted){memory, memory + rows, memory + 2 * rows};
}
INLINE long weighted_size(long rows, long dim) { return rows * (dim + 2); }

/* The products of a query with four keys, `stride` floats apart. Each is summed in the same order, whichever it is. */
INLINE __m128 products(const float *q, const float *key, long stride, int dim) {
  __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
  for (int i = 0; i < dim; i += 8) {
    __m256 x = _mm256_loadu_ps(q + i);
    a = _mm256_fmadd_ps(x, _mm256_loadu_ps(key + i), a);
    b = _mm256_fmadd_ps(x, _mm256_loadu_ps(key + stride + i), b);
    c = _mm256_fmadd_ps(x, _mm256_loadu_ps(key + 2 * stride + i), c);
    d = _mm256_fmadd_ps(x, _mm256_loadu_ps(key + 3 * stride + i), d);
  }
  __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* Scores of `count` keys that follow one another, scaled and, if wanted, capped. */
INLINE void score(const attention_job *job, const float *q, const float *key, long count, float *scores, int dim) {
  __m128 scale = _mm_set1_ps(job->scale);
  long j = 0;
  for (; j + 4 <= count; j += 4, key += 4 * dim) _mm_storeu_ps(scores + j, _mm_mul_ps(products(q, key, dim, dim), scale));
  for (; j < count; j++, key += dim) scores[j] = _mm_cvtss_f32(_mm_mul_ps(products(q, key, 0, dim), scale));
  if (job->softcap > 0.0f)
    for (j = 0; j < count; j++) scores[j] = __builtin_tanhf(scores[j] / job->softcap) * job->softcap;
}

/* Scores -> exp(score - highest), in place, with some zeros behind; the highest and the sum. */
INLINE void exponentiate(float *scores, long count, float *highest, float *total) {
  long padded = (count + 7) / 8 * 8;
  for (long j = count; j < padded; j++) scores[j] = -__builtin_inff();
  __m256 largest = _mm256_loadu_ps(scores), sum = _mm256_setzero_ps();
  for (long j = 8; j < padded; j += 8) largest = _mm256_max_ps(largest, _mm256_loadu_ps(scores + j));
  float lanes[8];
  _mm256_storeu_ps(lanes, largest);
  *highest = lanes[0];
  for (int i = 1; i < 8; i++) if (lanes[i] > *highest) *highest = lanes[i];
  for (long j = 0; j < padded; j += 8) {
    __m256 e = exp_negative(_mm256_sub_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(*highest)));
    _mm256_storeu_ps(scores + j, e);
    sum = _mm256_add_ps(sum, e);
  }
  /* the padding's exp(-87) is 1e-38 each: below the resolution of a sum that is at least 1 */
  *total = sum8(sum);
}

/* mixed += weights times `count` values that follow one another */
INLINE void mix(const float *weights, const float *value, long count, float *mixed, int dim) {
  for (int from = 0; from < dim; from += WIDTH) {
    int vectors = (int)smaller(dim - from, WIDTH) / 8;
    __m256 sums[WIDTH / 8];
    for (int v = 0; v < vectors; v++) sums[v] = _mm256_loadu_ps(mixed + from + 8 * v);
    for (long j = 0; j < count; j++) {
      __m256 weight = _mm256_set1_ps(weights[j]);
      const float *own = value + j * dim + from;
      for (int v = 0; v < vectors; v++) sums[v] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(own + 8 * v), sums[v]);
    }
    for (int v = 0; v < vectors; v++) _mm256_storeu_ps(mixed + from + 8 * v, sums[v]);
  }
}

/* Where the key or value of a position lies, and up to which position (at most `end`) the next ones lie behind it. */
INLINE const float *run_at(const attention_job *job, const task *t, const float *memory, long position, long end,
                           long *next) {
  long offset = position % job->block_size;
  *next = smaller(position + job->block_size - offset, end);
  return memory + (t->table[position / job->block_size] * job->block_size + offset) * job->head_dim;
}

/* How many positions of a run [position, next) a query sees of a span: where the first one stands in the run, and where
 * among the scores of the span. 0 or less: none. */
INLINE long part_of_run(const attention_job *job, const task *t, long query, long span, long position, long next,
                        long *in_run, long *in_scores) {
  long first, end;
  seen(job, t, query, span, &first, &end);
  long from = larger(first, position);
  *in_run = from - position, *in_scores = from - first;
  return smaller(end, next) - from;
}

/* All rows over one span. `scores`: [rows, SCORES]. */
INLINE void attend_span(const attention_job *job, const task *t, long span, float *scores, weighted result, int dim) {
  long begin = span * SPAN, end = smaller(begin + SPAN, t->start + t->queries), in_run, in_scores;
  for (long position = begin, next; position < end; position = next) {
    const float *keys = run_at(job, t, t->keys, position, end, &next);
    for (long query = 0; query < t->queries; query++) {
      long count = part_of_run(job, t, query, span, position, next, &in_run, &in_scores);
      const float *q = job->query + (t->first_token + query) * job->query_stride + t->first_head * dim;
      float *own = scores + query * t->group * SCORES + in_scores;
      for (long head = 0; count > 0 && head < t->group; head++)
        score(job, q + head * dim, keys + in_run * dim, count, own + head * SCORES, dim);
    }
  }
  memset(result.mixed, 0, t->rows * dim * sizeof(float));
  for (long row = 0, query = 0; query < t->queries; query++) {
    long first, last;
    seen(job, t, query, span, &first, &last);
    for (long head = 0; head < t->group; head++, row++) {
      result.total[row] = 0.0f;
      if (last > first) exponentiate(scores + row * SCORES, last - first, result.highest + row, result.total + row);
    }
  }
  for (long position = begin, next; position < end; position = next) {
    const float *values = run_at(job, t, t->values, position, end, &next);
    for (long query = 0; query < t->queries; query++) {
      long count = part_of_run(job, t, query, span, position, next, &in_run, &in_scores), row = query * t->group;
      for (long end_row = row + t->group; count > 0 && row < end_row; row++)
        mix(scores + row * SCORES + in_scores, values + in_run * dim, count, result.mixed + row * dim, dim);
    }
  }
}

INLINE float exp_of(float x) { return _mm256_cvtss_f32(exp_negative(_mm256_set1_ps(x))); }

/* What the spans before make of the rows, and the next one. */
INLINE void merge(weighted sum, weighted next, long rows, int dim) {
  for (long row = 0; row < rows; row++) {
    if (next.total[row] == 0.0f) continue;
    int is_first = sum.total[row] == 0.0f;
    float highest = is_first || next.highest[row] > sum.highest[row] ? next.highest[row] : sum.highest[row];
    float kept = is_first ? 0.0f : exp_of(sum.highest[row] - highest), added = exp_of(next.highest[row] - highest);
    sum.highest[row] = highest;
    sum.total[row] = sum.total[row] * kept + next.total[row] * added;
    for (long i = row * dim; i < (row + 1) * dim; i += 8) {
      __m256 more = _mm256_mul_ps(_mm256_loadu_ps(next.mixed + i), _mm256_set1_ps(added));
      _mm256_storeu_ps(sum.mixed + i, _mm256_fmadd_ps(_mm256_loadu_ps(sum.mixed + i), _mm256_set1_ps(kept), more));
    }
  }
}

INLINE void finish(const attention_job *job, const task *t, weighted sum, int dim) {
  const float *mixed = sum.mixed, *total = sum.total;
  for (long query = 0; query < t->queries; query++) {
    float *out = job->output + ((t->first_token + query) * job->heads + t->first_head) * dim;
    for (long head = 0; head < t->group; head++, total++) {
      __m256 inverse = _mm256_set1_ps(1.0f / *total);
      for (long i = 0; i < dim; i += 8, mixed += 8, out += 8)
        _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_loadu_ps(mixed), inverse));
    }
  }
}

/* A whole task, span by span. */
INLINE void attend_task(attention_job *job, long index, int dim) {
  task t = task_of(job, index);
  long first, end;
  spans_of(job, &t, &first, &end);
  long size = weighted_size(t.rows, dim);
  float *memory = malloc((t.rows * SCORES + 2 * size) * sizeof(float));
  if (!memory) { atomic_store(&job->failed, 1); return; }
  weighted sum = weighted_at(memory, t.rows), next = weighted_at(memory + size, t.rows);
  float *scores = memory + 2 * size;
  attend_span(job, &t, first, scores, sum, dim);
  for (long span = first + 1; span < end; span++) {
    attend_span(job, &t, span, scores, next, dim);
    merge(sum, next, t.rows, dim);
  }
  finish(job, &t, sum, dim);
  free(memory);
}

/* One span of a task, left for `merge_parts`. */
INLINE void attend_part(attention_job *job, long index, int dim) {
  task t = task_of(job, index % job->num_tasks);
  long first, end;
  spans_of(job, &t, &first, &end);
  first += index / job->num_tasks;
  if (first >= end) return;
  float *scores = malloc(t.rows * SCORES * sizeof(float));
  if (!scores) { atomic_store(&job->failed, 1); return; }
  attend_span(job, &t, first, scores, weighted_at(job->parts + index * job->part_size, t.rows), dim);
  free(scores);
}

AVX2 static void merge_parts(const attention_job *job, long index) {
  task t = task_of(job, index);
  long first, end;
  spans_of(job, &t, &first, &end);
  weighted sum = weighted_at(job->parts + index * job->part_size, t.rows);
  for (long i = 1; i < end - first; i++)
    merge(sum, weighted_at(job->parts + (i * job->num_tasks + index) * job->part_size, t.rows), t.rows, job->head_dim);
  finish(job, &t, sum, job->head_dim);
}

INLINE void attend(attention_job *job, long index, int dim) {
  if (job->parts) attend_part(job, index, dim); else attend_task(job, index, dim);
}

/* a constant head_dim lets the compiler keep a row of values in registers */
AVX2 static void attention_item(void *arg, long index) {
  attention_job *job = arg;
  switch (job->head_dim) {
    case 64: attend(job, index, 64); break;
    case 128: attend(job, index, 128); break;
    default: attend(job, index, (int)job->head_dim);
  }
}

/* Memory for all parts, if there are too few tasks to share out evenly; else none. How many spans tasks have at most. */
AVX2 static int plan_parts(attention_job *job, long *num_spans) {
  static scratch held;
  long rows = 0;
  *num_spans = 1;
  job->parts = NULL;
  if (job->num_tasks >= TASKS_PER_THREAD * pool_threads()) return 0;
  for (long index = 0; index < job->num_tasks; index += job->kv_heads) {
    task t = task_of(job, index);
    long first, end;
    spans_of(job, &t, &first, &end);
    *num_spans = larger(*num_spans, end - first);
    rows = larger(rows, t.rows);
  }
  job->part_size = weighted_size(rows, job->head_dim);
  size_t size = *num_spans * job->num_tasks * job->part_size * sizeof(float);
  if (*num_spans == 1 || size > MOST_PARTS) return 0;
  job->parts = scratch_take(&held, size);
  return job->parts ? 0 : -1;
}

int attention_run(attention_job *job, long num_items) {
  long num_spans;
  job->num_tasks = num_items * job->kv_heads;
  atomic_store(&job->failed, 0);
  if (plan_parts(job, &num_spans)) return -1;
  pool_run(attention_item, job, job->parts ? job->num_tasks * num_spans : job->num_tasks);
  for (long index = 0; job->parts && index < job->num_tasks; index++) merge_parts(job, index);
  return atomic_load(&job->failed) ? -1 : 0;
}

/* Returns 0, or -1 if memory ran out. */
int redraft_attention(const float *query, const float *keys, const float *values, float *output, const int32_t *items,
                      long num_items, const int32_t *blocks, long table_width, long heads, long kv_heads,
                      long head_dim, long num_slots, long block_size, long window, float scale, float softcap) {
  attention_job job = {.query = query, .keys = keys, .values = values, .output = output, .items = items,
                       .blocks = blocks, .query_stride = heads * head_dim, .heads = heads, .kv_heads = kv_heads,
                       .head_dim = head_dim, .num_slots = num_slots, .block_size = block_size,
                       .table_width = table_width, .window = window, .scale = scale, .softcap = softcap};
  pool_enter();
  int status = attention_run(&job, num_items);
  pool_leave();
  return status;
}
